//! Direct connections: a pod's own socket that the agent connects and handshakes on before the application has it back.
//!
//! [`Gate`] is the kernel's hold on one such socket: it lets out what was announced and tells who else wrote. When to connect,
//! what to say and whether to release is `proxy`'s. Also kept here is what a successor must know of direct connections, and
//! which ports of a pod want their IPv4 clients v4-mapped.
use std::{
    fmt,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use aya::maps::MapError;
use marline_common::{
    DIRECT_HANDSHAKE, DIRECT_RELEASED, DIRECT_SHUT, DIRECT_WITHOUT_RECORDS, DirectEntry, DirectFacts, Endpoint,
    GateEntry, MAX_ANNOUNCED, MAX_DIRECT_FACTS, POD_READY, PodPort, Transcript,
};

use super::{BpfError, Capture, entries::absent_is_fine};
use crate::sys::netns::{NetnsCookie, socket_netns};

/// `BPF_EXIST`: only what is there is replaced.
const REPLACE: u64 = 2;

/// What a released socket may send. Only the build without records lets out what is none.
const RELEASED: u32 = if cfg!(feature = "without-records") { DIRECT_WITHOUT_RECORDS } else { DIRECT_RELEASED };

/// A pod's socket in handshake. Nothing leaves it but announced bytes, until [`Gate::release`].
///
/// Dropping it shuts the socket: nothing more leaves it, until it is disconnected and connected anew, which the hooks turn
/// around like any connect. So the way back to the proxied path is to disconnect the socket, drop this, and let the
/// application's own connect go on. Should the agent die instead, the socket is shut for good.
#[must_use = "dropping it shuts the socket"]
pub struct Gate {
    capture: Capture,
    /// A duplicate: entries are found by descriptor.
    socket: OwnedFd,
    entry: DirectEntry,
    transcript: Box<Transcript>,
    released: bool,
}

impl Capture {
    /// Lets the agent connect a pod's unconnected socket to `to`, past the redirect, once. From then on the application sees
    /// `shown` as its peer.
    pub fn direct(&self, socket: BorrowedFd<'_>, to: SocketAddr, shown: SocketAddr) -> Result<Gate, BpfError> {
        let netns = socket_netns(socket).map_err(BpfError::Socket)?;
        let entry = DirectEntry { state: DIRECT_HANDSHAKE, to: canonical(to), shown: canonical(shown), announced: 0 };
        let socket = socket.try_clone_to_owned().map_err(BpfError::Socket)?;
        let mut maps = self.maps();
        // Said here, because from connect() itself it could not be told from the destination's refusal.
        match maps.pods.get(&netns, 0) {
            Ok(pod) if pod.state == POD_READY => {}
            Ok(_) | Err(MapError::KeyNotFound) => return Err(BpfError::NotEnrolled { netns }),
            Err(source) => return Err(BpfError::Map { name: "PODS", source }),
        }
        maps.gates.insert(&socket, GateEntry::default(), 0).map_err(BpfError::map("GATES"))?;
        maps.transcripts.insert(&socket, Transcript::EMPTY, 0).map_err(BpfError::map("TRANSCRIPTS"))?;
        maps.direct.insert(&socket, entry, 0).map_err(BpfError::map("DIRECT"))?;
        drop(maps);
        let transcript = Box::new(Transcript::EMPTY);
        Ok(Gate { capture: self.clone(), socket, entry, transcript, released: false })
    }

    /// From now on new IPv4 clients of this port of the pod reach the v4-mapped listener, or the plain one again.
    pub fn map_clients(&self, netns: NetnsCookie, port: u16, mapped: bool) -> Result<(), BpfError> {
        let key = PodPort::new(netns, port.to_be());
        let mut maps = self.maps();
        let result =
            if mapped { maps.mapped_ports.insert(key, 1, 0) } else { absent_is_fine(maps.mapped_ports.remove(&key)) };
        result.map_err(BpfError::map("MAPPED_PORTS"))
    }

    /// Keeps what a successor must know of a direct connection, by its socket's cookie.
    pub fn keep_direct(&self, cookie: u64, facts: &[u8]) -> Result<(), BpfError> {
        let mut kept = DirectFacts { length: 0, bytes: [0; MAX_DIRECT_FACTS] };
        let (Some(room), Ok(length)) = (kept.bytes.get_mut(..facts.len()), u32::try_from(facts.len())) else {
            return Err(BpfError::TooLong { what: "the facts of a direct connection", limit: MAX_DIRECT_FACTS });
        };
        room.copy_from_slice(facts);
        kept.length = length;
        self.maps().direct_facts.insert(cookie, kept, 0).map_err(BpfError::map("DIRECT_FACTS"))
    }

    /// What was kept and not forgotten, also by a predecessor. Sockets may be gone that this still knows of.
    pub fn direct_kept(&self) -> Result<Vec<(u64, Vec<u8>)>, BpfError> {
        let maps = self.maps();
        let kept = maps.direct_facts.iter().map(|entry| {
            let (cookie, facts) = entry.map_err(BpfError::map("DIRECT_FACTS"))?;
            let length = usize::try_from(facts.length).unwrap_or(MAX_DIRECT_FACTS).min(MAX_DIRECT_FACTS);
            Ok((cookie, facts.bytes[..length].to_vec()))
        });
        kept.collect()
    }

    /// The connection has ended.
    pub fn forget_direct(&self, cookie: u64) -> Result<(), BpfError> {
        absent_is_fine(self.maps().direct_facts.remove(&cookie)).map_err(BpfError::map("DIRECT_FACTS"))
    }
}

impl Gate {
    /// Lets these bytes leave, after those that were announced before. To be called before they are written.
    pub fn announce(&mut self, more: &[u8]) -> Result<(), BpfError> {
        let start = usize::try_from(self.transcript.length).unwrap_or(MAX_ANNOUNCED);
        let end = start.saturating_add(more.len());
        let (true, Ok(length)) = (end <= MAX_ANNOUNCED, u32::try_from(end)) else {
            return Err(BpfError::TooLong { what: "a handshake", limit: MAX_ANNOUNCED });
        };
        self.transcript.bytes[start..end].copy_from_slice(more);
        self.transcript.length = length;
        let mut maps = self.capture.maps();
        maps.transcripts.insert(&self.socket, self.transcript.as_ref(), REPLACE).map_err(BpfError::map("TRANSCRIPTS"))
    }

    /// How many bytes were announced in all.
    pub fn announced(&self) -> u64 {
        self.transcript.length.into()
    }

    /// Whether something else than what was announced tried to leave, or somebody else connected the socket: reset it.
    pub fn poisoned(&self) -> Result<bool, BpfError> {
        let seen = self.capture.maps().gates.get(&self.socket, 0).map_err(BpfError::map("GATES"))?;
        Ok(seen.poisoned != 0)
    }

    /// Gives the socket to the application: from the end of what was announced on, TLS records pass. A poisoned one is shut instead.
    ///
    /// To be called when the kernel encrypts all that is written, and TCP has been given no byte but the agent's, all of them: what
    /// was announced is not compared any more. Another thread may have been inside send() since before the kernel had the keys,
    /// and append its plaintext whenever it wakes up. So the gate stays for the life of the connection: what is no record is
    /// dropped and poisons the socket. It looks at headers only: what a thread forges to look like records is not stopped, nor
    /// what falls into the midst of a record of which TCP has taken only a part.
    pub fn release(mut self) -> Result<(), BpfError> {
        if self.poisoned()? {
            return Err(BpfError::Poisoned);
        }
        let entry = DirectEntry { state: RELEASED, announced: self.transcript.length, ..self.entry };
        let mut maps = self.capture.maps();
        maps.direct.insert(&self.socket, entry, REPLACE).map_err(BpfError::map("DIRECT"))?;
        self.released = true;
        // Not needed any more, and not a failure of the release if it stays: it goes with the socket.
        if let Err(error) = absent_is_fine(maps.transcripts.remove(&self.socket)) {
            tracing::debug!(%error, "what was announced for a released socket could not be removed");
        }
        Ok(())
    }
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let announced = self.announced();
        f.debug_struct("Gate").field("entry", &self.entry).field("announced", &announced).finish_non_exhaustive()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let entry = DirectEntry { state: DIRECT_SHUT, ..self.entry };
        let mut maps = self.capture.maps();
        // Left in handshake it is as shut, but cannot be used for another connection.
        if let Err(error) = maps.direct.insert(&self.socket, entry, REPLACE) {
            tracing::warn!(%error, "a socket in handshake could not be given up");
        }
        if let Err(error) = absent_is_fine(maps.transcripts.remove(&self.socket)) {
            tracing::debug!(%error, "what was announced for a socket could not be removed");
        }
    }
}

/// v4-mapped addresses are IPv4 to the hooks.
fn canonical(address: SocketAddr) -> Endpoint {
    Endpoint::from(SocketAddr::new(address.ip().to_canonical(), address.port()))
}
