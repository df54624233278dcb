//! Web servers and their clients with both ends under the filter: nginx with one listener for all workers and with one for each, curl, wrk,
//! HTTP/2 in clear text, and HAProxy between them, which is a server and a client.

use std::path::Path;

use anyhow::{Result, ensure};
use marline_tests::{
    amount::{amount, families},
    cluster::Family,
    direct::{Count, Route, Stage, on_direct_mesh},
    traffic::{
        Seen,
        haproxy::Haproxy,
        nginx::{Nginx, Options},
    },
};

const MARKER: &str = "marker-of-the-web";

#[test]
fn nginx_serves_curl_and_wrk_with_one_worker_and_with_four() -> Result<()> {
    on_direct_mesh(|stage| {
        let (curls, wrks) = amount((12, 16), (4, 4));
        let kinds = [(1, false), (4, false), (1, true), (4, true)];
        for (turn, (port, (workers, reuseport))) in (80..).zip(kinds).enumerate() {
            let nginx =
                Nginx::start_with(&stage.server, port, MARKER, Options { workers, reuseport, ..Options::default() })?;
            nginx.add_file("file", file_size())?;
            for family in families(turn) {
                let address = stage.server.address(family);
                let name = format!("{workers} workers, reuseport {reuseport}, {}", family.as_str());
                exact(stage, &name, stage.route(family, port, 1), || nginx.keep_alive(&stage.client, address))?;
                exact(stage, &name, stage.route(family, port, 1), || nginx.fetch(&stage.client, address, "file"))?;
                exact(stage, &name, stage.route(family, port, curls), || {
                    nginx.many_curls(&stage.client, address, curls)
                })?;
            }
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/compare.lua");
            // wrk tries the address by a connection that it does not use, and leaves answers on their way.
            let route = Route { counted: false, ..stage.route(Family::V4, port, wrks + 1) };
            exact(stage, "wrk", route, || nginx.wrk(&stage.client, stage.server.address(Family::V4), wrks, &script))?;
        }
        Ok(())
    })
}

#[test]
fn http2_in_clear_text_has_many_streams_on_one_connection() -> Result<()> {
    on_direct_mesh(|stage| {
        let (curls, requests) = amount((8, 400), (3, 60));
        let options = Options { http2: true, ..Options::default() };
        let nginx = Nginx::start_with(&stage.server, 80, MARKER, options)?;
        nginx.add_file("file", file_size())?;
        for family in families(0) {
            let address = stage.server.address(family);
            // One request each: Debian 12's curl cannot use such a connection twice, with or without a mesh.
            exact(stage, "page", stage.route(family, 80, 1), || nginx.page(&stage.client, address))?;
            exact(stage, "file", stage.route(family, 80, 1), || nginx.fetch(&stage.client, address, "file"))?;
            exact(stage, "curls", stage.route(family, 80, curls), || nginx.many_curls(&stage.client, address, curls))?;
            exact(stage, "streams", stage.route(family, 80, 4), || nginx.streams(&stage.client, address, requests))?;
        }
        Ok(())
    })
}

#[test]
fn haproxy_passes_bytes_and_requests_on_to_nginx() -> Result<()> {
    on_direct_mesh(|stage| {
        let web = stage.cluster.filtered("server-a")?;
        let nginx = Nginx::start(&web, MARKER)?;
        nginx.add_file("file", file_size())?;
        for family in families(1) {
            let haproxy = Haproxy::start(&stage.server, web.socket(family, nginx.port()))?;
            let behind = stage.between(&stage.server, &web);
            let address = stage.server.address(family);
            // The same curls as ever, to another address and port.
            for (port, requests) in [(Haproxy::TCP, 1), (Haproxy::HTTP, 5)] {
                let front = nginx.behind(port);
                let before = behind.now()?;
                exact(stage, "in front", stage.route(family, port, 1), || front.keep_alive(&stage.client, address))?;
                exact(stage, "file", stage.route(family, port, 1), || front.fetch(&stage.client, address, "file"))?;
                let connections = Count::Exactly(requests + 1);
                // It resets what it has no more use for.
                let route = Route { connections, counted: false, ..behind.route(family, nginx.port(), 1) };
                behind.taken(before, route)?;
            }
            drop(haproxy);
        }
        Ok(())
    })
}

fn file_size() -> u64 {
    amount(2_000_000, 300_000)
}

fn exact(stage: &Stage<'_>, name: &str, route: Route<'_>, run: impl FnOnce() -> Result<Seen>) -> Result<()> {
    let (seen, _) = stage.flow(route, run)?;
    ensure!(seen.exact, "{name}: {}", seen.note);
    Ok(())
}
