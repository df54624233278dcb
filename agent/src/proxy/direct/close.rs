//! Calls that end sockets are held for a moment, so that what kernel TLS has accepted from the application is not lost with them:
//! see `sys::unsent`. A pod without direct connections is not looked at.

use std::time::Duration;

use crate::{
    keeper::Pending,
    sys::{
        process::Caller,
        seccomp::{Answer, Call},
        unsent::{self, Unsent},
    },
};

/// How long the kernel's worker may take to hand a record to TCP once there is room.
const WORKER: Duration = Duration::from_millis(5);

/// close and close_range: the kernel itself makes the last try, and there is room for it now.
pub(super) fn closing(call: Pending, ending: Call) {
    if let Some(caller) = caller(&call) {
        match ending {
            Call::Close { fd } => drop(unsent::before_close(&caller, fd)),
            Call::CloseRange { first, last } => unsent::before_closing(&caller, first, last),
            _ => {}
        }
    }
    let _ = call.answer(Answer::Continue);
}

/// shutdown: the kernel makes no try, so its worker is waited for where there may be something for it to do.
pub(super) async fn shutting(call: Pending, fd: i32, how: i32) {
    if how != libc::SHUT_RD
        && let Some(caller) = caller(&call)
        && unsent::before_close(&caller, fd) != Unsent::Nothing
    {
        tokio::time::sleep(WORKER).await;
    }
    let _ = call.answer(Answer::Continue);
}

fn caller(call: &Pending) -> Option<Caller> {
    let caller = Caller::of(call.notification.tid).ok()?;
    call.valid().then_some(caller)
}
