//! How much one key seals on a direct connection.
//!
//! AES-GCM bounds it (RFC 8446 section 5.5), and keys cannot be changed there: an application that receives a KeyUpdate knows nothing of
//! records. So a connection that has sent so much is ended in good order, and from half of that on new connections to the same
//! place, or to the same port of the pod, are made with ChaCha20-Poly1305, for which no bound is known that a connection could reach.

use std::{
    io,
    net::{Shutdown, SocketAddr},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;

use super::{REMEMBERED, ask, watch::Limited};
use crate::{
    proxy::{Context, connections::lock, pod::Pod},
    sys::{diag::Diag, options, process, unsent},
    tls::config::Ciphers,
    words::Direction,
};

/// How often the counts are looked at.
pub(super) const LOOK: Duration = Duration::from_secs(5);
/// What an application may take to close a connection on which it cannot send any more.
const PATIENCE: Duration = Duration::from_secs(30);
/// As in `close`.
const WORKER: Duration = Duration::from_millis(5);

impl super::Direct {
    /// What a connection to `remote`, or one that came to the pod's own address, should be sealed with.
    pub fn ciphers(&self, direction: Direction, end: SocketAddr) -> Ciphers {
        if lock(&self.lasting).contains(&(direction, end)) { Ciphers::Lasting } else { Ciphers::Fastest }
    }

    /// Connections of this kind last.
    pub fn lasts(&self, direction: Direction, end: SocketAddr) {
        let mut lasting = lock(&self.lasting);
        if lasting.len() >= REMEMBERED {
            lasting.clear();
        }
        if self.lasting_possible && lasting.insert((direction, end)) {
            tracing::info!(direction = direction.as_str(), %end, "a connection has sealed much: later ones get a cipher without a limit");
        }
    }
}

/// Looks at what the pod's direct connections have sent.
pub(super) async fn check(ctx: Arc<Context>, pod: Arc<Pod>) {
    let Some(direct) = &ctx.direct else { return };
    let sockets = match ask::ask(&pod, Diag::all).await {
        Ok(sockets) => sockets,
        Err(error) => return tracing::warn!(%error, "what direct connections have sent is not known"),
    };
    for socket in sockets {
        let Some(counts) = socket.counts else { continue };
        let sent = counts.bytes_acked + u64::from(socket.unacknowledged);
        let limit = direct.settings.key_limit;
        let Some(limited) = direct.watch.count(&socket, sent, limit) else { continue };
        let Limited { direction, end, spent } = limited;
        if sent >= limit / 2 {
            direct.lasts(direction, end);
        }
        match spent {
            None => {}
            Some(since) if since.elapsed() > PATIENCE => ask::end(&pod, socket.id).await,
            Some(since) if since.elapsed() < LOOK => {
                tracing::warn!(local = %socket.id.local, remote = %socket.id.remote, sent, "a key has sealed as much as it may: the connection is ended");
                let id = socket.id;
                let finished = ask::finish(&pod, move || finish(socket.inode, id.cookie)).await;
                if let Err(error) = finished {
                    tracing::warn!(%error, "a connection cannot be ended in good order, and is reset");
                    ask::end(&pod, id).await;
                }
            }
            Some(_) => {}
        }
    }
}

/// Ends the application's stream as shutdown() would: what was sent arrives, and the application cannot send any more.
fn finish(inode: u32, cookie: u64) -> io::Result<()> {
    let socket = process::holding(inode)?;
    if options::cookie(&socket)? != cookie {
        return Err(io::ErrorKind::NotFound.into());
    }
    unsent::make_room(&socket)?;
    std::thread::sleep(WORKER);
    SockRef::from(&socket).shutdown(Shutdown::Write)
}
