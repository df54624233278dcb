//! Which lines are written: a decision by the configuration, the record, and one number that is drawn.

use std::time::Duration;

use super::Record;
use crate::{
    config::{AccessLogConfig, AccessLogFilter},
    words::{Endpoint, KUBELET_PROBE, Mode, Path},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Written,
    SampledOut,
    Filtered,
}

/// `drawn` is from 0 to 1, without 1.
pub(super) fn judge(config: &AccessLogConfig, record: &Record<'_>, drawn: f64) -> Kept {
    if !passes(&config.filter, record) {
        return Kept::Filtered;
    }
    if is_well(record) && drawn >= config.sample { Kept::SampledOut } else { Kept::Written }
}

/// Whether it was let through and ended in order: all else is worth a line always.
fn is_well(record: &Record<'_>) -> bool {
    record.verdict == "allowed" && record.reason.is_none_or(|reason| reason == KUBELET_PROBE)
}

fn passes(filter: &AccessLogFilter, record: &Record<'_>) -> bool {
    let one_of = |wanted: &[&str], value: Option<&str>| wanted.is_empty() || value.is_some_and(|v| wanted.contains(&v));
    let ends = [record.source, record.destination];
    let of_end = |wanted: &[String], is: fn(&Endpoint, &str) -> bool| {
        wanted.is_empty() || ends.iter().any(|end| wanted.iter().any(|wanted| is(end, wanted)))
    };
    let small = record.bytes_sent + record.bytes_received < filter.min_bytes
        || Duration::from_millis(record.duration_ms) < filter.min_duration;
    one_of(&filter.directions, Some(record.direction.as_str()))
        && one_of(&filter.verdicts, Some(record.verdict))
        && one_of(&filter.modes, record.mode.map(Mode::as_str))
        && one_of(&filter.paths, record.path.map(Path::as_str))
        && of_end(&filter.namespaces, |end, wanted| end.namespace.as_deref() == Some(wanted))
        && of_end(&filter.workloads, is_workload)
        && !(small && is_well(record))
}

fn is_workload(end: &Endpoint, wanted: &str) -> bool {
    let (namespace, name) = wanted.split_once('/').map_or((None, wanted), |(namespace, name)| (Some(namespace), name));
    end.workload.as_deref() == Some(name) && (namespace.is_none() || end.namespace.as_deref() == namespace)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{config::AccessLogFormat, metrics::ResponseFlags, words::Direction};

    fn end(namespace: &str, workload: &str) -> Endpoint {
        Endpoint { namespace: Some(namespace.into()), workload: Some(workload.into()), ..Endpoint::default() }
    }

    fn record<'a>(source: &'a Endpoint, destination: &'a Endpoint) -> Record<'a> {
        Record {
            time: SystemTime::UNIX_EPOCH,
            end: SystemTime::UNIX_EPOCH,
            direction: Direction::Outbound,
            source,
            destination,
            service: None,
            mode: Some(Mode::Mtls),
            records: "ktls",
            pump: None,
            path: Some(Path::Proxied),
            path_reason: None,
            verdict: "allowed",
            reason: None,
            policy: None,
            audit: None,
            dry_run: None,
            close: "closed",
            response_flags: ResponseFlags::None,
            bytes_sent: 100,
            bytes_received: 900,
            duration_ms: 50,
            tls: None,
        }
    }

    fn config(sample: f64, filter: AccessLogFilter) -> AccessLogConfig {
        AccessLogConfig { path: None, format: AccessLogFormat::Json, sample, filter }
    }

    #[test]
    fn a_share_of_what_ends_well_is_written_and_all_that_does_not() {
        let (source, destination) = (end("shop", "web"), end("shop", "db"));
        let well = record(&source, &destination);
        let tenth = config(0.1, AccessLogFilter::default());
        let written = (0..1000).filter(|n| judge(&tenth, &well, f64::from(*n) / 1000.0) == Kept::Written).count();
        assert_eq!(written, 100);
        assert_eq!(judge(&config(0.0, AccessLogFilter::default()), &well, 0.0), Kept::SampledOut);
        assert_eq!(judge(&config(1.0, AccessLogFilter::default()), &well, 0.999_999), Kept::Written);
        let refused = Record { verdict: "refused", reason: Some("policy"), ..record(&source, &destination) };
        let cut = Record { reason: Some("truncated"), ..record(&source, &destination) };
        for record in [refused, cut] {
            assert_eq!(judge(&config(0.0, AccessLogFilter::default()), &record, 0.9), Kept::Written);
        }
    }

    #[test]
    fn each_filter_keeps_what_it_names_and_nothing_else() {
        let (source, destination) = (end("shop", "web"), end("data", "db"));
        let of = |filter| judge(&config(1.0, filter), &record(&source, &destination), 0.0) == Kept::Written;
        let none = AccessLogFilter::default;
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let cases = [
            (none(), true),
            (AccessLogFilter { directions: vec!["outbound"], ..none() }, true),
            (AccessLogFilter { directions: vec!["inbound"], ..none() }, false),
            (AccessLogFilter { verdicts: vec!["refused"], ..none() }, false),
            (AccessLogFilter { modes: vec!["plaintext"], ..none() }, false),
            (AccessLogFilter { modes: vec!["plaintext", "mtls"], ..none() }, true),
            (AccessLogFilter { paths: vec!["direct"], ..none() }, false),
            (AccessLogFilter { namespaces: names(&["data"]), ..none() }, true),
            (AccessLogFilter { namespaces: names(&["dat"]), ..none() }, false),
            (AccessLogFilter { workloads: names(&["db"]), ..none() }, true),
            (AccessLogFilter { workloads: names(&["data/db"]), ..none() }, true),
            (AccessLogFilter { workloads: names(&["shop/db"]), ..none() }, false),
            (AccessLogFilter { min_bytes: 1000, ..none() }, true),
            (AccessLogFilter { min_bytes: 1001, ..none() }, false),
            (AccessLogFilter { min_duration: Duration::from_millis(50), ..none() }, true),
            (AccessLogFilter { min_duration: Duration::from_millis(51), ..none() }, false),
        ];
        for (filter, kept) in cases {
            assert_eq!(of(filter.clone()), kept, "{filter:?}");
        }
    }

    #[test]
    fn a_refusal_is_not_too_short_for_a_line_and_is_held_back_only_by_name() {
        let (source, destination) = (end("shop", "web"), end("data", "db"));
        let refused = |filter| {
            let refused = Record {
                verdict: "refused",
                reason: Some("policy"),
                mode: None,
                bytes_sent: 0,
                bytes_received: 0,
                ..record(&source, &destination)
            };
            judge(&config(0.0, filter), &refused, 0.9)
        };
        let none = AccessLogFilter::default;
        let minutes = Duration::from_secs(60);
        assert_eq!(refused(AccessLogFilter { min_bytes: 1, min_duration: minutes, ..none() }), Kept::Written);
        assert_eq!(refused(AccessLogFilter { verdicts: vec!["allowed"], ..none() }), Kept::Filtered);
        assert_eq!(refused(AccessLogFilter { modes: vec!["mtls"], ..none() }), Kept::Filtered);
    }
}
