//! One connection to a local pod: the outbound way read from the other end. Who the source is, is known only when its
//! certificate was checked, so the final Permit comes after the handshake.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use tokio::net::TcpStream;

use super::{
    Context,
    account::Account,
    authorize::{self, Arrival, Permit},
    capture,
    carry::{Carried, carry},
    connections::Facts,
    direct::{Offered, Ready, Why, canonical},
    handshake::{self, HandshakeError},
    identify::{self, ClientAddr},
    offload::{self, Records},
    pod::{Pod, Turn},
    pump,
    refusal::Refusal,
    spare,
};
use crate::{
    bpf::ClientEntry,
    identity::SpiffeId,
    policy::Inbound,
    state::Snapshot,
    tls::{
        config::{self, Accept, Learned},
        records::Ending,
    },
    words::{Direction, Mode, with_causes},
};

/// `internal_error`: the application behind this agent does not take the connection (RFC 8446 section 6.2).
const UNAVAILABLE: u8 = 80;
/// `access_denied`: the certificate is fine and policy says no.
const ACCESS_DENIED: u8 = 49;

pub(super) async fn serve(ctx: Arc<Context>, pod: Arc<Pod>, wire: TcpStream, client: ClientAddr, turn: Turn) {
    // In a box, which goes with the handshake: the task would have room for it as long as the connection lives.
    let Some((carried, records, entry, local)) = Box::pin(opened(&ctx, &pod, wire, client, turn)).await else { return };
    let ended = carry(&ctx, carried, records).await;
    ctx.learn_from(&ended.result, Direction::Inbound, local);
    drop(entry);
}

/// The connection, the entry that tells the application who its client is, and where it came to. Nothing if it was refused, or is not the
/// agent's to carry.
async fn opened(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    wire: TcpStream,
    client: ClientAddr,
    turn: Turn,
) -> Option<(Box<Carried>, Records, ClientEntry, SocketAddr)> {
    // IPv4 clients of an application that listens for IPv6 come v4-mapped.
    let client = ClientAddr(canonical(client.0));
    let local = match wire.local_addr().map(canonical) {
        Ok(local) if ctx.selftest.claim_inbound(pod.netns.cookie(), client.0, local) => {
            capture::pass(&wire);
            return None;
        }
        Ok(local) => local,
        Err(error) => {
            tracing::debug!(%error, "an accepted connection was gone at once");
            return None;
        }
    };
    let account = Account::open(ctx, Direction::Inbound);
    account.live.learn(|facts| {
        facts.destination = identify::of(Some(&pod.workload), local);
        facts.served = Some(pod.workload.clone());
    });
    // Each in a box of its own: a spare connection may wait for long, and needs no room for the others.
    let arrived = match Box::pin(secure(ctx, pod, wire, client, local, &account)).await {
        Err(refusal) => {
            account.refused(refusal.reason(), &refusal);
            return None;
        }
        Ok(arrived) => arrived,
    };
    let (account, arrived, turn) = if arrived.spare {
        drop(turn);
        Box::pin(wait(ctx, pod, arrived, account.set_aside())).await?
    } else {
        (account, arrived, turn)
    };
    match Box::pin(admit(ctx, pod, arrived, client, local, &account)).await {
        Err(refusal) => {
            account.refused(refusal.reason(), &refusal);
            None
        }
        Ok(opened) => {
            let Opened { app, wire, records, mut permit, entry, offered } = opened;
            let why = match offered {
                Ok(mut offered) => match offered.wait(&app, &mut permit).await {
                    Ok(handover) => {
                        let records = records.name_in(permit.mode());
                        offered.give(handover, Ready { wire, records, account, permit });
                        // The leg has done its work, and its end in the application's queue was taken out.
                        drop((app, entry, turn));
                        return None;
                    }
                    Err(why) => Some(why),
                },
                Err(why) => why,
            };
            drop(turn);
            account.live.learn(|facts| facts.path_reason = why.map(Why::label));
            Some((Box::new(Carried { account, app, wire: Arc::new(wire), permit }), records, entry, local))
        }
    }
}

/// Why the connection cannot be offered to the application.
fn reason(ctx: &Context, pod: &Pod, port: u16, mode: Mode, fit: bool) -> Option<Why> {
    let direct = ctx.direct.as_ref()?;
    Some(match mode {
        Mode::Plaintext => Why::Plaintext,
        Mode::Mtls if !direct.usable() => Why::Kernel,
        Mode::Mtls if !direct.filtered(pod.netns.cookie()) => Why::NoFilter,
        Mode::Mtls if !direct.ready(pod.netns.cookie()) => Why::Agent,
        // The last one that was offered was taken without a word: this one was not.
        Mode::Mtls if !direct.heard(pod.netns.cookie(), port) => Why::NotNotified,
        Mode::Mtls if !fit => Why::Kernel,
        Mode::Mtls => Why::PeerNotReady,
    })
}

struct Opened {
    app: TcpStream,
    wire: TcpStream,
    records: Records,
    permit: Permit,
    /// That an accept() of the application may take it, or why none may.
    offered: Result<Offered, Option<Why>>,
    /// The true client's address for getpeername, for as long as the application may ask.
    entry: ClientEntry,
}

/// What has come, after its handshake if it had one.
struct Arrived {
    wire: TcpStream,
    records: Records,
    peer: Option<SpiffeId>,
    snapshot: Arc<Snapshot>,
    rule: Inbound,
    /// Bytes of the handshake, there and back.
    handshake: (u64, u64),
    /// Whether streams end by FIN.
    fin: bool,
    /// Whether an application will come for it later.
    spare: bool,
}

async fn secure(
    ctx: &Context,
    pod: &Pod,
    mut wire: TcpStream,
    client: ClientAddr,
    local: SocketAddr,
    account: &Account,
) -> Result<Arrived, Refusal> {
    // Only a program in the pod that connects to the agent's listener by itself comes to loopback.
    if local.ip().is_loopback() {
        return Err(Refusal::NotCaptured);
    }
    let snapshot = ctx.state.load();
    let (workload, endpoint) = identify::endpoint(&snapshot, client.0);
    account.live.learn(|facts| facts.source = endpoint);
    let arrival = Arrival { workload: snapshot.now(&pod.workload), client: client.0, local };
    let rule = authorize::arriving(&snapshot, arrival, workload.as_deref());
    let tls = match &rule {
        Inbound::Mtls => true,
        Inbound::Plaintext | Inbound::Deny(_) => false,
        Inbound::Sniff => capture::speaks_mesh_tls(&wire, ctx.settings.handshake).await.map_err(Refusal::Client)?,
    };
    let secured = if tls {
        let svid = ctx.svid(&pod.workload.id)?;
        let learned = Learned::default();
        let (parameters, accept) = (ctx.parameters(Direction::Inbound, local), accept(ctx, pod, local.port()));
        let config = config::server_config_with(parameters, &svid, ctx.identities.trust(), accept, learned.clone())?;
        // A client may close as soon as it has spoken; too late then.
        offload::prepare(&wire, ctx.settings.records, &ctx.kernel);
        let since = Instant::now();
        let secured = match handshake::accept(&mut wire, config, ctx.settings.handshake).await {
            // What speaks no TLS at all is for policy to refuse, which has the better words. A client whose hello was seen is past that:
            // bytes were taken from its stream.
            Err(HandshakeError::NotTls(_)) if matches!(rule, Inbound::Mtls) => None,
            result => Some(ctx.handshaken(account, Direction::Inbound, since, &learned, result)?),
        };
        account.live.learn(|facts| facts.sni = learned.sni().map(str::to_owned));
        secured
    } else {
        None
    };
    let Some(secured) = secured else {
        let (records, peer, handshake) = (Records::Plain(ctx.kernel.pump), None, (0, 0));
        return Ok(Arrived { wire, records, peer, snapshot, rule, handshake, fin: false, spare: false });
    };
    let alpn = secured.alpn.as_deref();
    let (fin, spare) = (config::ending(alpn) == Ending::Fin, alpn == Some(config::SPARE));
    let (peer, handshake) = (Some(secured.peer.clone()), (secured.sent, secured.received));
    let records = offload::offload(&wire, secured, ctx.settings.records, &ctx.kernel)?;
    Ok(Arrived { wire, records, peer, snapshot, rule, handshake, fin, spare })
}

/// Until the client's application comes for it. Then it is a connection like others, judged by what holds now; `None` if none comes.
async fn wait(ctx: &Context, pod: &Pod, mut arrived: Arrived, known: Facts) -> Option<(Account, Arrived, Turn)> {
    // Beyond the bound the client hears of it by the end, and goes on without.
    let place = pod.spares.clone().try_acquire_owned().ok()?;
    let mut served = pod.served.clone();
    let claimed = tokio::select! {
        claimed = spare::claimed(&mut arrived.wire, &mut arrived.records) => claimed,
        // Nobody sends: it tells its sender's end.
        _ = served.changed() => return None,
    };
    drop(place);
    match claimed {
        Ok(true) => {}
        Ok(false) => return None,
        Err(error) => {
            tracing::warn!(source = ?known.source.address, "a spare connection was given up: {}", with_causes(&error));
            return None;
        }
    }
    let turn = pod.inbound.clone().acquire_owned().await.ok()?;
    let account = Account::open(ctx, Direction::Inbound);
    let (client, local) = (known.source.address?, known.destination.address?);
    arrived.snapshot = ctx.state.load();
    let (workload, mut source) = identify::endpoint(&arrived.snapshot, client);
    source.identity = known.source.identity.clone();
    account.live.learn(|facts| *facts = Facts { source, ..known });
    // While it waited it was nobody's, and not judged with those that live: its application must not hear of what does not stand.
    if let Some(withdrawn) = authorize::withdrawn(&ctx.identities.trust(), &account.live.facts()) {
        ctx.metrics.trust_withdrawn(Direction::Inbound, withdrawn.label());
        pump::refuse(arrived.wire, arrived.records, ACCESS_DENIED).await;
        let refusal = Refusal::Withdrawn(withdrawn);
        account.refused(refusal.reason(), &refusal);
        return None;
    }
    let arrival = Arrival { workload: arrived.snapshot.now(&pod.workload), client, local };
    arrived.rule = authorize::arriving(&arrived.snapshot, arrival, workload.as_deref());
    Some((account, arrived, turn))
}

/// Policy's word, and the way to the application.
async fn admit(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    arrived: Arrived,
    client: ClientAddr,
    local: SocketAddr,
    account: &Account,
) -> Result<Opened, Refusal> {
    let Arrived { wire, records, peer, snapshot, rule, handshake, fin, .. } = arrived;
    let arrival = Arrival { workload: snapshot.now(&pod.workload), client: client.0, local };
    let permit = match authorize::inbound(&snapshot, arrival, peer.as_ref(), &rule, &account.live) {
        Ok(permit) => permit,
        Err(denied) => {
            pump::refuse(wire, records, ACCESS_DENIED).await;
            return Err(denied.into());
        }
    };
    // Before the leg is connected: whoever accepts it must find the connection.
    let offers = fin && accept(ctx, pod, local.port()) == Accept::DirectReady && records.kernel_keeps();
    let offered = if offers {
        Offered::new(ctx, pod, client.0, &wire, account, handshake).map_err(Some)
    } else {
        Err(reason(ctx, pod, local.port(), permit.mode(), records.kernel_keeps()))
    };
    match connect(ctx, pod, client, local).await {
        Ok((app, entry)) => Ok(Opened { app, wire, records, permit, entry, offered }),
        Err(refusal) => {
            pump::refuse(wire, records, UNAVAILABLE).await;
            Err(refusal)
        }
    }
}

/// What this end is ready for.
fn accept(ctx: &Context, pod: &Pod, port: u16) -> Accept {
    match &ctx.direct {
        None => Accept::Plain,
        Some(direct) if direct.ready(pod.netns.cookie()) && direct.heard(pod.netns.cookie(), port) => {
            Accept::DirectReady
        }
        Some(_) => Accept::DirectClients,
    }
}

/// Connects to the application as the client that it will see.
async fn connect(
    ctx: &Context,
    pod: &Pod,
    client: ClientAddr,
    local: SocketAddr,
) -> Result<(TcpStream, ClientEntry), Refusal> {
    let (socket, source) = capture::bound_leg(&pod.netns, local).map_err(Refusal::Unreachable)?;
    let entry = ctx.capture.announce_client(pod.netns.cookie(), source, client.0)?;
    let app = tokio::time::timeout(ctx.settings.connect, socket.connect(local))
        .await
        .unwrap_or(Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(Refusal::connecting)?;
    capture::guard(&app, ctx.settings.dead_peer).map_err(Refusal::Unreachable)?;
    Ok((app, entry))
}
