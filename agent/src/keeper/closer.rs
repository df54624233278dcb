//! Calls that end sockets while there is no agent, on a thread for each filter: making room takes the socket's lock, which its
//! application may hold for as long as it likes, and then nobody else's calls shall wait.

use std::{
    io,
    sync::mpsc::{Sender, channel},
    thread,
};

use crate::sys::{
    process::Caller,
    seccomp::{Answer, Call, Listener, Notification},
    unsent,
};

pub(super) struct Closer(Sender<Notification>);

impl Closer {
    /// Its thread ends with this, when the calls that it has been given are done.
    pub fn start(listener: &Listener) -> io::Result<Self> {
        let listener = listener.try_clone()?;
        let (give, calls) = channel::<Notification>();
        thread::Builder::new().name("marline-closer".into()).spawn(move || {
            for call in calls {
                last_room(&listener, &call);
                if let Err(error) = listener.answer(call.id, Answer::Continue) {
                    tracing::error!(%error, "a call that ends a socket cannot be answered");
                }
            }
        })?;
        Ok(Self(give))
    }

    /// The thread lives as long as this.
    pub fn close(&self, call: Notification) {
        if self.0.send(call).is_err() {
            // The thread has panicked. A keeper that ends gives its calls back; one that goes on without it would keep them.
            std::process::abort();
        }
    }
}

/// What an agent would do before a socket of an application ends: see `sys::unsent`.
fn last_room(listener: &Listener, held: &Notification) {
    let Ok(caller) = Caller::of(held.tid) else { return };
    if !listener.valid(held.id) {
        return;
    }
    match held.call {
        Call::Close { fd } | Call::Shutdown { fd, .. } => drop(unsent::before_close(&caller, fd)),
        Call::CloseRange { first, last } => unsent::before_closing(&caller, first, last),
        _ => {}
    }
}
