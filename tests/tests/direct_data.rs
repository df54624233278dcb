//! Databases and bulk with both ends under the filter: redis, PostgreSQL, iperf3 in both directions.

use anyhow::{Context, Result, ensure};
use marline_tests::{
    amount::{amount, families},
    cluster::Family,
    direct::{Route, Stage, on_direct_mesh},
    traffic::{Seen, iperf::Iperf, postgres::Postgres, redis::Redis},
};

const MARKER: &str = "marker-of-the-data";

#[test]
fn redis_keeps_what_it_is_given_by_many_clients() -> Result<()> {
    on_direct_mesh(|stage| {
        let redis = Redis::start(&stage.server, MARKER)?;
        let (size, clients, requests) = amount((1_000_000, 20, 1_000), (200_000, 4, 50));
        for family in families(0) {
            let (client, address) = (&stage.client, stage.server.address(family));
            exact(stage, stage.route(family, redis.port(), 1), || redis.set_and_get(client, address))?;
            exact(stage, stage.route(family, redis.port(), 2), || redis.big_value(client, address, size))?;
            let route = stage.route(family, redis.port(), 2 * clients + 1);
            exact(stage, route, || redis.benchmark(client, address, clients, requests))?;
        }
        Ok(())
    })
}

#[test]
fn postgresql_forks_a_server_for_each_session() -> Result<()> {
    on_direct_mesh(|stage| {
        let postgres = Postgres::start(&stage.server)?;
        let (rows, sessions) = amount((20_000, 8), (1_000, 3));
        for family in families(1) {
            let (client, address) = (&stage.client, stage.server.address(family));
            exact(stage, stage.route(family, postgres.port(), 2), || postgres.copy(client, address, rows))?;
            let route = stage.route(family, postgres.port(), usize::from(sessions) + 2);
            exact(stage, route, || postgres.bench(client, address, sessions))?;
        }
        Ok(())
    })
}

#[test]
fn iperf3_moves_bytes_both_ways_over_parallel_streams() -> Result<()> {
    on_direct_mesh(|stage| {
        let iperf = Iperf::new(&stage.server, MARKER);
        let kinds = [
            (Family::V4, 4, Some("-R"), 5),
            (Family::V6, 4, None, 5),
            (Family::V6, 2, Some("--bidir"), 5),
            (Family::V4, 1, None, 2),
            (Family::V6, 1, Some("-R"), 2),
        ];
        for (family, streams, direction, connections) in kinds.into_iter().take(amount(5, 3)) {
            // For a second: of a few bytes its receiver may have counted none when its sender is done.
            let words: Vec<&str> = ["-t", "1"].into_iter().chain(direction).collect();
            // It ends with bytes on their way.
            let route = Route { counted: false, ..stage.route(family, iperf.port(), connections) };
            exact(stage, route, || iperf.streams(&stage.client, stage.server.address(family), streams, &words))
                .with_context(|| format!("{streams} streams {words:?}"))?;
        }
        Ok(())
    })
}

fn exact(stage: &Stage<'_>, route: Route<'_>, run: impl FnOnce() -> Result<Seen>) -> Result<()> {
    let port = route.port;
    let (seen, _) = stage.flow(route, run)?;
    ensure!(seen.exact, "port {port}: {}", seen.note);
    Ok(())
}
