//! The last stages, which both ways share: pump, then account.

use std::sync::{Arc, atomic::Ordering};

use tokio::net::TcpStream;

use super::{
    Context,
    account::Account,
    authorize::Permit,
    capture,
    offload::Records,
    pump::{self, PumpError},
};
use crate::{tls::config, words::Mode};

/// A connection that is let through, with all that it takes. In a box: each future that it passed through by value would have room for it.
pub(super) struct Carried {
    pub account: Account,
    pub app: TcpStream,
    pub wire: Arc<TcpStream>,
    pub permit: Permit,
}

pub(super) struct Ended {
    pub result: Result<(), PumpError>,
    pub received: u64,
    /// Dropped by whoever has heard of the end: the application learns of it by that, and may act on it at once.
    _app: TcpStream,
}

pub(super) async fn carry(ctx: &Context, mut carried: Box<Carried>, records: Records) -> Ended {
    begin(ctx, &carried, &records);
    let Carried { account, app, wire, permit } = &mut *carried;
    let result = match account.live.revoked() {
        Some(reason) => Err(PumpError::Revoked(reason)),
        None => pump::run(app, wire, records, &account.live.moved, &mut permit.revoked).await,
    };
    finish(*carried, result)
}

fn begin(ctx: &Context, carried: &Carried, records: &Records) {
    let Carried { account, wire, permit, .. } = carried;
    let without = config::WITHOUT_RECORDS && matches!(records, Records::Plain(_));
    if (permit.mode() == Mode::Plaintext) != matches!(records, Records::Plain(_)) && !without {
        account.live.revoke("its records are not what its permit says");
    }
    account.offloaded(permit.mode(), records);
    account.live.watch_wire(wire);
    // Between the decision and here the rules may have changed.
    ctx.judge_now(&account.live);
}

fn finish(carried: Carried, result: Result<(), PumpError>) -> Ended {
    let Carried { account, app, wire, .. } = carried;
    if result.is_ok() {
        for leg in [&app, &*wire] {
            if let Err(error) = capture::settle(leg) {
                tracing::debug!(%error, "a leg was gone at its end");
            }
        }
    }
    let received = account.live.moved.received.load(Ordering::Relaxed);
    account.finished(&result);
    Ended { result, received, _app: app }
}
