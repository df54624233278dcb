//! One connection from a local pod: capture, identify, authorize, handshake, offload, pump, account, in this order.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use tokio::net::TcpStream;

use super::{
    Context,
    account::Account,
    authorize::{self, Permit, Way},
    capture,
    carry::{Carried, carry},
    handshake,
    identify::{self, ClientAddr, OrigDst},
    offload::{self, Records},
    pod::{Pod, Turn},
    pool::{self, Aim, Spare},
    pump::PumpError,
    refusal::Refusal,
    target::Target,
};
use crate::{
    state::Snapshot,
    tls::{
        config::{self, Ciphers, Learned, Offer},
        records::RecordError,
    },
    words::Direction,
};

pub(super) async fn serve(ctx: Arc<Context>, pod: Arc<Pod>, app: TcpStream, client: ClientAddr, turn: Turn) {
    // In a box, which goes with the handshake: the task would have room for it as long as the connection lives.
    let Some((carried, records, aimed)) = Box::pin(opened(&ctx, &pod, app, client, turn)).await else { return };
    let ended = carry(&ctx, carried, records).await;
    let (destination, target) = *aimed;
    ctx.learn_from(&ended.result, Direction::Outbound, target.address);
    if let Err(PumpError::Record(RecordError::Alert(_))) = ended.result
        && ended.received == 0
    {
        // Of a service's endpoints another may take the next one.
        match &target.service {
            Some(_) => ctx.loads.refused(&target),
            None => remember_refused(&ctx, &pod, destination),
        }
    }
}

/// The connection, what it was to, and what that became. Nothing if it was refused, or is none.
async fn opened(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    app: TcpStream,
    client: ClientAddr,
    _turn: Turn,
) -> Option<(Box<Carried>, Records, Box<(OrigDst, Target)>)> {
    let origin = match origin(ctx, pod, client) {
        Ok((origin, _)) if ctx.selftest.claim_outbound(pod.netns.cookie(), origin.0) => {
            capture::pass(&app);
            return None;
        }
        origin => origin,
    };
    let mut account = Account::open(ctx, Direction::Outbound);
    account.live.learn(|facts| facts.source = identify::of(Some(&pod.workload), seen_by_app(pod, client)));
    if let (Some(direct), Ok((_, socket))) = (&ctx.direct, &origin) {
        let why = direct.why(pod.netns.cookie(), *socket);
        account.live.learn(|facts| facts.path_reason = Some(why.label()));
    }
    match open(ctx, pod, &app, client, origin.map(|(origin, _)| origin), &mut account).await {
        Err(refusal) => {
            account.refused(refusal.reason(), &refusal);
            None
        }
        Ok((wire, records, permit, destination, target)) => {
            Some((Box::new(Carried { account, app, wire, permit }), records, Box::new((destination, target))))
        }
    }
}

/// Where it wanted to go, and the cookie of the application's socket.
fn origin(ctx: &Context, pod: &Pod, client: ClientAddr) -> Result<(OrigDst, u64), Refusal> {
    match ctx.capture.original_destination(pod.netns.cookie(), client.0)? {
        Some(origin) => Ok((OrigDst(origin.address), origin.socket_cookie)),
        None => Err(Refusal::NotCaptured),
    }
}

async fn open(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    app: &TcpStream,
    client: ClientAddr,
    origin: Result<OrigDst, Refusal>,
    account: &mut Account,
) -> Result<(Arc<TcpStream>, Records, Permit, OrigDst, Target), Refusal> {
    let destination = origin?;
    let snapshot = ctx.state.load();
    let targets = ctx.loads.targets(&snapshot, pod, destination.0)?;
    let (target, leg) = match reach(ctx, pod, &snapshot, (app, chosen(client)), targets, account).await {
        Err(refusal @ Refusal::Refused(_)) => {
            remember_refused(ctx, pod, destination);
            return Err(refusal);
        }
        reached => reached?,
    };
    let (wire, records, permit) = match leg {
        Leg::Plaintext(wire, permit) => (wire, Records::Plain(ctx.kernel.pump), permit),
        Leg::Mtls(wire, permit, aim) => {
            let (wire, records) = secure(ctx, pod, wire, aim, chosen(client).is_none(), account).await?;
            (wire, records, permit)
        }
        Leg::Spare(spare, permit, aim) => {
            let Spare { wire, records, proved, .. } = *spare;
            proved.note(Direction::Outbound, &account.live);
            pool::asked(ctx, pod, &aim);
            (wire, records, permit)
        }
    };
    if let Some(wanted) = &target.traffic.keepalive {
        capture::keep_alive(&wire, wanted).map_err(Refusal::Unreachable)?;
    }
    Ok((Arc::new(wire), records, permit, destination, target))
}

/// A connection to a target, as far as it is.
enum Leg {
    Plaintext(TcpStream, Permit),
    /// Without its handshake.
    Mtls(TcpStream, Permit, Aim),
    /// It was there, and is the application's now.
    Spare(Box<Spare>, Permit, Aim),
}

/// Connects to the first target that can be reached. Policy is asked for each: who may answer is another's for another.
async fn reach(
    ctx: &Context,
    pod: &Pod,
    snapshot: &Snapshot,
    (app, from): (&TcpStream, Option<IpAddr>),
    targets: Vec<Target>,
    account: &mut Account,
) -> Result<(Target, Leg), Refusal> {
    let mut refusal = Refusal::NotCaptured;
    for target in targets {
        account.aims_at(ctx, &target);
        let mut way = authorize::towards(snapshot, &target, &account.live)?;
        let aim = match &mut way {
            Way::Plaintext { .. } => None,
            Way::Mtls { expect, .. } => {
                let (port, host) = (target.port, target.host().to_owned());
                Some(Aim { address: target.address, port, host, expect: std::mem::take(expect) })
            }
        };
        // What had bound an address connects from there.
        let spare = match &aim {
            Some(aim) if from.is_none() => pool::claim(ctx, pod, aim, app)?,
            _ => None,
        };
        let permit = way.permit();
        if let (Some(spare), Some(aim)) = (spare, &aim) {
            return Ok((target, Leg::Spare(Box::new(spare), permit, aim.clone())));
        }
        let limit = target.traffic.connect_timeout.unwrap_or(ctx.settings.connect);
        match capture::connect(&pod.netns, from, target.address, limit).await {
            Ok(wire) => {
                capture::guard(&wire, ctx.settings.dead_peer).map_err(Refusal::Unreachable)?;
                let leg = match aim {
                    Some(aim) => Leg::Mtls(wire, permit, aim),
                    None => Leg::Plaintext(wire, permit),
                };
                return Ok((target, leg));
            }
            Err(error) => {
                ctx.loads.refused(&target);
                refusal = Refusal::connecting(error);
            }
        }
    }
    Err(refusal)
}

/// The handshake, and its keys to where the records will be.
async fn secure(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    mut wire: TcpStream,
    aim: Aim,
    usual: bool,
    account: &Account,
) -> Result<(TcpStream, Records), Refusal> {
    let svid = ctx.svid(&pod.workload.id)?;
    let parameters = ctx.parameters(Direction::Outbound, aim.address);
    let offer = if ctx.direct.is_some() { Offer::ProxiedFinOk } else { Offer::Proxied };
    let (trust, learned) = (ctx.identities.trust(), Learned::default());
    let config = config::client_config_with(parameters, &svid, trust, &aim.expect, offer, learned.clone())?;
    let name = config::server_name(aim.port, &aim.host);
    let since = Instant::now();
    let handshake = handshake::connect(&mut wire, config, name, ctx.settings.handshake).await;
    let secured = ctx.handshaken(account, Direction::Outbound, since, &learned, handshake)?;
    // Another agent's proxied connection, sealed as a spare one would be.
    if usual && secured.alpn.as_deref() == Some(config::MARLINE) && parameters.ciphers == Ciphers::Fastest {
        pool::asked(ctx, pod, &aim);
    }
    let records = offload::offload(&wire, secured, ctx.settings.records, &ctx.kernel)?;
    Ok((wire, records))
}

/// The address that the application had bound, if it had: an unbound one comes from loopback.
fn chosen(client: ClientAddr) -> Option<IpAddr> {
    Some(client.0.ip()).filter(|ip| !ip.is_loopback())
}

/// The source as the application sees it: the kernel programs hide that an unbound socket's address is loopback's.
fn seen_by_app(pod: &Pod, client: ClientAddr) -> SocketAddr {
    let own = pod.workload.addresses.iter().copied().find(|own| own.is_ipv4() == client.0.is_ipv4());
    SocketAddr::new(own.filter(|_| client.0.ip().is_loopback()).unwrap_or(client.0.ip()), client.0.port())
}

fn remember_refused(ctx: &Context, pod: &Pod, destination: OrigDst) {
    if let Err(error) = ctx.capture.remember_refused(pod.netns.cookie(), destination.0) {
        tracing::warn!(%error, "a refused destination could not be remembered");
    }
}
