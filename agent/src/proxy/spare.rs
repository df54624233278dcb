//! A spare connection: mTLS to a peer agent that is made before an application asks for it, and becomes one application's connection when
//! that comes. Both ends agree on it by ALPN. The client's agent says so with one byte, the first of the stream; until then the server's
//! agent has decided nothing, and asks policy for its word when the byte is here. Who keeps spare connections, and how many, is `pool`'s.

use std::{io, os::fd::AsFd, time::Duration};

use tokio::{
    io::{AsyncReadExt, Interest},
    net::TcpStream,
    time::timeout,
};

use super::{
    offload::Records,
    pump::{READ, try_read},
};
use crate::{
    sys::{
        options,
        socket::{self, Received},
        tcp_info::TcpState,
    },
    tls::records::{APPLICATION_DATA, Control, HEADER, OVERHEAD, RecordError, read_control, sealed_body_length},
};

/// From here on the stream is an application's.
const CLAIM: u8 = 1;
/// The record that has it, where records are made here: nobody pads it.
const CLAIM_RECORD: usize = OVERHEAD as usize + 1;
/// How long the server's end waits for it. The client's gives a connection up sooner (`pool::LIFE`).
const WAIT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub(super) enum SpareError {
    #[error("the connection")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("a spare connection begins with something else than its claim")]
    NotAClaim,
    #[error("a spare connection has no records")]
    Plain,
}

/// The client's word: an application has come. If that has written already and records are made here, its first bytes leave together with
/// it, and the server's agent is woken once for both. The kernel would put both into one record, and the claim has one of its own.
pub(super) fn claim(wire: &TcpStream, records: &mut Records, app: impl AsFd) -> Result<(), SpareError> {
    let (record, joins) = match records {
        Records::Plain(_) => return Err(SpareError::Plain),
        Records::Kernel { .. } => (vec![CLAIM], false),
        Records::Userspace { sealer, .. } => (sealer.seal(APPLICATION_DATA, &[CLAIM])?, socket::unread(app)? > 0),
    };
    let send = if joins { socket::send_more } else { socket::send };
    // Nothing was sent on it yet: a socket without room for this is broken.
    match wire.try_io(Interest::WRITABLE, || send(wire, &record))? {
        sent if sent == record.len() => Ok(()),
        _ => Err(io::Error::from(io::ErrorKind::WriteZero).into()),
    }
}

/// Waits for the client's word; false if it gave the connection up, or has let it wait for too long.
pub(super) async fn claimed(wire: &mut TcpStream, records: &mut Records) -> Result<bool, SpareError> {
    let word = async {
        match records {
            Records::Plain(_) => Err(SpareError::Plain),
            Records::Kernel { .. } => kernel(wire).await,
            Records::Userspace { opener, .. } => {
                let mut record = [0; CLAIM_RECORD];
                match wire.read_exact(&mut record).await {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                    read => read?,
                };
                if sealed_body_length(&record)? != Some(CLAIM_RECORD - HEADER) {
                    return Err(SpareError::NotAClaim);
                }
                judge(opener.open(&mut record[HEADER..])?)
            }
        }
    };
    timeout(WAIT, word).await.unwrap_or(Ok(false))
}

/// One byte is read, because the kernel gives as much as there is room for, of as many records as have come: what is behind the claim is the
/// application's.
async fn kernel(wire: &TcpStream) -> Result<bool, SpareError> {
    let mut byte = [0; 1];
    loop {
        wire.ready(READ).await?;
        match try_read(wire, || socket::recv_record(wire, &mut byte)) {
            Ok(Received { content_type: None, .. }) => return Ok(false),
            Ok(Received { len, content_type: Some(APPLICATION_DATA) }) => {
                return judge((APPLICATION_DATA, byte.get(..len).unwrap_or_default()));
            }
            // Of an alert one byte says little; there is none that goes on.
            Ok(Received { content_type: Some(_), .. }) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Keys are not changed, and tickets not sent, on a connection that nobody uses yet.
fn judge((content_type, content): (u8, &[u8])) -> Result<bool, SpareError> {
    match (content_type, content) {
        (APPLICATION_DATA, &[CLAIM]) => Ok(true),
        (APPLICATION_DATA, _) => Err(SpareError::NotAClaim),
        (other, content) => match read_control(other, content)? {
            Control::Closed => Ok(false),
            Control::KeyUpdate { .. } | Control::Nothing => Err(SpareError::NotAClaim),
        },
    }
}

/// Whether the peer still holds a connection on which it has nothing to say.
pub(super) fn lives(wire: impl AsFd) -> bool {
    let established = options::counts(&wire).is_ok_and(|counts| counts.state == TcpState::ESTABLISHED);
    established && socket::unread(&wire).is_ok_and(|unread| unread == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::sync::Arc;

    use rustls::RootCertStore;
    use tokio::{io::AsyncWriteExt, net::TcpListener};

    use super::*;
    use crate::{
        identity::{Ca, SpiffeId, Trust, TrustDomain},
        proxy::{
            handshake,
            offload::{self, Capabilities, RecordsChoice},
            pump,
        },
        tls::{
            config::{self, Accept, Offer},
            records::{ALERT, HANDSHAKE, key_update_message},
        },
        words::PumpKind,
    };

    /// Two ends after their handshake, with records in userspace.
    async fn ends() -> [(TcpStream, Records); 2] {
        let ca = Ca::ephemeral(&TrustDomain::default()).unwrap();
        let id = SpiffeId::new(&TrustDomain::default(), "shop", "web").unwrap();
        let svid = ca.issue(&id, Duration::from_secs(3600)).unwrap();
        let mut roots = RootCertStore::empty();
        for root in ca.root_certificates() {
            roots.add(root.clone()).unwrap();
        }
        let trust = Arc::new(Trust::new(TrustDomain::default(), Arc::new(roots)));
        let client = config::client_config(&svid, trust.clone(), &[id], Offer::Spare).unwrap();
        let server = config::server_config(&svid, trust, Accept::DirectReady).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let (name, limit) = (config::server_name(80, "web"), Duration::from_secs(10));
        let (connected, accepted) = tokio::join!(
            handshake::connect(&mut near, client, name, limit),
            handshake::accept(&mut far, server, limit)
        );
        let kernel = Capabilities::none("a test");
        let records = |wire: &TcpStream, secured: handshake::Secured| {
            assert_eq!(secured.alpn.as_deref(), Some(config::SPARE));
            offload::offload(wire, secured, RecordsChoice::Userspace, &kernel).unwrap()
        };
        let (of_near, of_far) = (records(&near, connected.unwrap()), records(&far, accepted.unwrap()));
        [(near, of_near), (far, of_far)]
    }

    /// An application's end and the agent's, to which it has written so many bytes.
    async fn application(written: usize) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        app.write_all(&vec![7; written]).await.unwrap();
        let (leg, _) = listener.accept().await.unwrap();
        (app, leg)
    }

    #[tokio::test]
    async fn what_is_behind_the_claim_is_left_to_the_application() {
        let [(near, mut of_near), (mut far, mut of_far)] = ends().await;
        let (_app, leg) = application(0).await;
        claim(&near, &mut of_near, &leg).unwrap();
        // Loopback delivers before the call returns: it has left alone.
        assert_eq!(socket::unread(&far).unwrap(), CLAIM_RECORD);
        let Records::Userspace { sealer, .. } = &mut of_near else { panic!("records are here") };
        let behind = sealer.seal(APPLICATION_DATA, b"hello").unwrap();
        assert_eq!(socket::send(&near, &behind).unwrap(), behind.len());
        assert!(claimed(&mut far, &mut of_far).await.unwrap());
        let mut record = vec![0; behind.len()];
        far.read_exact(&mut record).await.unwrap();
        let Records::Userspace { opener, .. } = &mut of_far else { panic!("records are here") };
        assert_eq!(opener.open(&mut record[HEADER..]).unwrap(), (APPLICATION_DATA, &b"hello"[..]));
    }

    #[tokio::test]
    async fn the_claim_leaves_with_what_the_application_has_written_already() {
        let [(near, mut of_near), (mut far, mut of_far)] = ends().await;
        let (_app, leg) = application(5).await;
        claim(&near, &mut of_near, &leg).unwrap();
        assert_eq!(socket::unread(&far).unwrap(), 0, "the server's agent would be woken twice");
        let Records::Userspace { sealer, .. } = &mut of_near else { panic!("records are here") };
        let behind = sealer.seal(APPLICATION_DATA, b"hello").unwrap();
        assert_eq!(socket::send(&near, &behind).unwrap(), behind.len());
        assert_eq!(socket::unread(&far).unwrap(), CLAIM_RECORD + behind.len());
        assert!(claimed(&mut far, &mut of_far).await.unwrap());
    }

    #[tokio::test]
    async fn where_the_kernel_makes_the_records_the_claim_leaves_alone_whatever_is_written() {
        let [(near, of_near), (far, _)] = ends().await;
        let Records::Userspace { session, .. } = of_near else { panic!("records are here") };
        // Without its keys the kernel sends the claim as it is, and shows what it is told to keep back.
        let mut of_near = Records::Kernel { pump: PumpKind::Copy, session };
        let (_app, leg) = application(5).await;
        claim(&near, &mut of_near, &leg).unwrap();
        assert_eq!(socket::unread(&far).unwrap(), 1, "what comes next would be in the claim's record");
    }

    #[tokio::test]
    async fn one_that_is_given_up_is_not_claimed_and_other_bytes_are_an_error() {
        let [(near, _), (mut far, mut of_far)] = ends().await;
        drop(near);
        assert!(!claimed(&mut far, &mut of_far).await.unwrap());
        // An alert is longer than a claim by a byte.
        let [(near, of_near), (mut far, mut of_far)] = ends().await;
        pump::refuse(near, of_near, 80).await;
        assert!(claimed(&mut far, &mut of_far).await.is_err());
        let [(near, mut of_near), (mut far, mut of_far)] = ends().await;
        let Records::Userspace { sealer, .. } = &mut of_near else { panic!("records are here") };
        let other = sealer.seal(APPLICATION_DATA, &[CLAIM + 1]).unwrap();
        assert_eq!(socket::send(&near, &other).unwrap(), other.len());
        assert!(matches!(claimed(&mut far, &mut of_far).await, Err(SpareError::NotAClaim)));
    }

    #[test]
    fn one_byte_is_a_claim_and_nothing_else_is() {
        assert!(judge((APPLICATION_DATA, &[CLAIM])).unwrap());
        for not in [&[][..], &[0], &[2], &[CLAIM, CLAIM]] {
            assert!(matches!(judge((APPLICATION_DATA, not)), Err(SpareError::NotAClaim)), "{not:?}");
        }
        assert!(!judge((ALERT, &[1, 0])).unwrap());
        assert!(matches!(judge((ALERT, &[2, 40])), Err(SpareError::Record(_))));
        assert!(matches!(judge((HANDSHAKE, &key_update_message(false))), Err(SpareError::NotAClaim)));
    }

    proptest! {
        #[test]
        fn nothing_but_the_claim_is_taken_for_it(content_type: u8, content: Vec<u8>) {
            let taken = matches!(judge((content_type, &content)), Ok(true));
            prop_assert_eq!(taken, content_type == APPLICATION_DATA && content == [CLAIM]);
        }
    }
}
