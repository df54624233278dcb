//! What an attempt of `marline check` means: what is reported, whether it is well, why not, and the way out.

use std::{net::SocketAddr, path::Path};

use serde::Serialize;

use super::{
    super::table::{Colour, Paint, plain},
    attempt::Attempt,
    probe::Event,
    wire::Flow,
};
use crate::{
    admin::status::Pod,
    state::explain::{Answer, Party},
    words::TlsFacts,
};

/// What `--json` prints. Fields are added, not renamed.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) well: bool,
    /// Why it is not well, or that it is.
    reason: String,
    way_out: Option<String>,
    source: Party,
    destination: Party,
    /// connect() has succeeded.
    connected: bool,
    /// Whether this node's agent had the connection.
    captured: bool,
    /// `open` still, `closed` or `reset` by the other end, `failed` to connect.
    outcome: &'static str,
    mode: Option<String>,
    tls: Option<TlsFacts>,
    records: Option<String>,
    path: Option<String>,
    path_reason: Option<String>,
    /// Whom the destination's certificate has proved.
    proved: Option<String>,
    /// What the agent at the source says of its end, and at the destination, if that is on this node.
    said: Option<String>,
    said_there: Option<String>,
    policy: Policy,
    wire: Wire,
    /// Bytes of the application's.
    received: usize,
}

/// What this node's policies make of it.
#[derive(Debug, Serialize)]
struct Policy {
    allowed: bool,
    /// `mtls` or `plaintext`.
    encryption: String,
    reason: String,
}

/// What was seen on the links.
#[derive(Debug, Default, Serialize)]
struct Wire {
    links: Vec<String>,
    /// The connection's ends there, if it is known which it is.
    stream: Option<[SocketAddr; 2]>,
    sent: Option<Flow>,
    received: Option<Flow>,
    /// Packets that the watcher missed.
    lost: u32,
    /// Whether the text that was sent can be read there. None if none was sent, or nothing was seen.
    marker_readable: Option<bool>,
    /// What that amounts to. None if too little was seen to say.
    encrypted: Option<bool>,
}

impl Report {
    pub(super) fn of(
        pod: Option<&Pod>,
        netns: &Path,
        explained: Answer,
        attempt: Attempt,
        marker: Option<&str>,
    ) -> Self {
        let one = attempt.outbound.as_ref();
        let outcome = match (attempt.connected(), attempt.end()) {
            (false, _) => "failed",
            (true, None) if one.is_some_and(|one| one.reason.is_some()) => "reset",
            (true, None) => "open",
            (true, Some(Event::Ended)) => "closed",
            (true, Some(_)) => "reset",
        };
        let mut source = explained.source;
        if pod.is_none() {
            source.name = source.name.or_else(|| Some(netns.display().to_string()));
        }
        source.address = attempt.local.unwrap_or(source.address);
        let said = |one: &super::super::connections::model::Connection| {
            let reason = one.reason.as_deref()?;
            Some(format!("{}, {reason}: {}", one.verdict.as_deref()?, one.close.as_deref().unwrap_or_default()))
        };
        let mut report = Self {
            well: false,
            reason: String::new(),
            way_out: None,
            source,
            destination: explained.destination,
            connected: attempt.connected(),
            captured: one.is_some(),
            outcome,
            mode: one.and_then(|one| one.mode.clone()),
            tls: one.and_then(|one| one.tls.clone()),
            records: one.and_then(|one| one.records.clone()),
            path: one.and_then(|one| one.path.clone()),
            path_reason: one.and_then(|one| one.path_reason.clone()),
            proved: one.and_then(|one| one.peer()).map(str::to_owned),
            said: one.and_then(said),
            said_there: attempt.inbound.as_ref().and_then(said),
            policy: Policy { allowed: explained.allowed, encryption: explained.encryption, reason: explained.reason },
            wire: Wire::of(&attempt, marker),
            received: attempt.received(),
        };
        let closed = pod.filter(|pod| pod.state != "ready");
        let failure = match attempt.end() {
            Some(Event::Failed { text, .. } | Event::Reset(text)) => text.as_str(),
            _ => "the other end closed it",
        };
        (report.well, report.reason, report.way_out) = judge(&report, closed, pod.is_some(), failure);
        report
    }

    pub(super) fn text(&self, colour: Colour) -> String {
        let mut out = String::new();
        let mut line = |name: &str, text: &str| out.push_str(&format!("{name:<12} {}\n", plain(text)));
        line("source", &party(&self.source));
        line("destination", &party(&self.destination));
        let taken = if self.captured {
            "yes: this node's agent had the connection"
        } else {
            "no: this node's agent knows nothing of it"
        };
        line("captured", taken);
        let tls = self.tls.as_ref().map_or_else(String::new, |tls| {
            let part = |text: &Option<String>| text.as_ref().map_or_else(String::new, |text| format!(", {text}"));
            format!(", {}{}{}", tls.cipher, part(&tls.group), part(&tls.alpn))
        });
        let none =
            if self.captured { "none: it did not come so far" } else { "unknown: it is not in this agent's hands" };
        line("mode", &format!("{}{tls}", self.mode.as_deref().unwrap_or(none)));
        if let Some(proved) = &self.proved {
            line("proved", &format!("{proved}, by its certificate"));
        }
        if let (Some(records), Some(path)) = (&self.records, &self.path) {
            let why = self.path_reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
            line("records", &format!("{records}, {path}{why}"));
        }
        let allowed = if self.policy.allowed { "allowed" } else { "refused" };
        line("policy", &format!("{allowed}, in {}: {}", self.policy.encryption, self.policy.reason));
        for (name, said) in [("agent", &self.said), ("agent there", &self.said_there)] {
            if let Some(said) = said {
                line(name, said);
            }
        }
        line("wire", &self.wire.text());
        let (word, paint) = if self.well { ("OK", Paint::Good) } else { ("NOT WELL", Paint::Bad) };
        out.push_str(&format!("{:<12} {}: {}\n", "result", colour.paint(word, paint), plain(&self.reason)));
        if let Some(way_out) = &self.way_out {
            out.push_str(&format!("             -> {}\n", colour.paint(&plain(way_out), Paint::Faint)));
        }
        out
    }
}

fn party(party: &Party) -> String {
    let identity = party.identity.as_deref().unwrap_or("not in the mesh, as far as is known");
    match (&party.name, party.endpoints.is_empty()) {
        (Some(name), false) => format!("{name} (a service) at {}", party.address),
        (Some(name), true) => format!("{name} ({identity}) at {}", party.address),
        (None, _) => format!("{} ({identity})", party.address),
    }
}

impl Wire {
    fn of(attempt: &Attempt, marker: Option<&str>) -> Self {
        let stream = attempt.wire.and_then(|[client, server]| attempt.streams.get(client, server));
        let Some(stream) = stream else {
            return Self { links: attempt.links.clone(), lost: attempt.lost, ..Self::default() };
        };
        let (sent, received) = (stream.sent(), stream.received());
        let whole = !sent.hole && !received.hole && attempt.lost == 0;
        let marker_readable = marker.filter(|_| sent.bytes + received.bytes > 0).map(|marker| stream.shows(marker));
        let encrypted = encrypted(&sent, &received, marker_readable, whole);
        Self {
            links: attempt.links.clone(),
            stream: Some([stream.client, stream.server]),
            lost: attempt.lost,
            sent: Some(sent),
            received: Some(received),
            // What was missed may have held it.
            marker_readable: marker_readable.filter(|readable| *readable || whole),
            encrypted,
        }
    }

    fn text(&self) -> String {
        let links = if self.links.is_empty() { "the pod's links".to_owned() } else { self.links.join(", ") };
        let (Some(sent), Some(received)) = (&self.sent, &self.received) else {
            return format!("{links}: this connection was not seen there");
        };
        let told = |flow: &Flow| {
            let records = [
                (flow.handshake, "handshake"),
                (flow.change_cipher_spec, "change cipher spec"),
                (flow.alert, "alert"),
                (flow.application_data, "application data"),
            ];
            let records: Vec<_> =
                records.iter().filter(|(count, _)| *count > 0).map(|(count, name)| format!("{count} {name}")).collect();
            let records =
                if records.is_empty() { String::new() } else { format!(" in TLS records ({})", records.join(", ")) };
            let readable =
                if flow.not_tls == 0 { String::new() } else { format!(", {} of them NOT in TLS", flow.not_tls) };
            let hole = if flow.hole { ", something was missed" } else { "" };
            format!("{} bytes{records}{readable}{hole}", flow.bytes)
        };
        let marker = match self.marker_readable {
            Some(true) => "; the text that was sent CAN BE READ there",
            Some(false) => "; the text that was sent cannot be read there",
            None => "",
        };
        let lost = if self.lost > 0 { format!("; {} packets were missed", self.lost) } else { String::new() };
        let verdict = match self.encrypted {
            Some(true) => "encrypted",
            Some(false) => "NOT encrypted",
            None => "too little was seen to say whether it is encrypted",
        };
        format!("{links}: {verdict}; sent {}; received {}{marker}{lost}", told(sent), told(received))
    }
}

/// Nothing but records both ways, some of them sealed, and all of it seen: or else nothing is claimed.
fn encrypted(sent: &Flow, received: &Flow, marker_readable: Option<bool>, whole: bool) -> Option<bool> {
    if sent.not_tls + received.not_tls > 0 || marker_readable == Some(true) {
        return Some(false);
    }
    let sealed = |flow: &Flow| flow.handshake > 0 && flow.application_data > 0;
    (whole && sealed(sent) && sealed(received)).then_some(true)
}

fn judge(report: &Report, closed: Option<&Pod>, enrolled: bool, failure: &str) -> (bool, String, Option<String>) {
    let not = |reason: String, way_out: &str| (false, reason, Some(way_out.to_owned()));
    let policy = &report.policy;
    let stands = report.said.is_none() && matches!(report.outcome, "open" | "closed");
    if let Some(pod) = closed {
        let reason = pod.reason.as_deref().unwrap_or("no reason is known");
        return not(
            format!("the source pod is closed, its agent refuses all its connections: {reason}"),
            "mend what the reason names; marline status shows when it is ready",
        );
    }
    if !stands || !report.connected {
        return refused(report, enrolled, failure);
    }
    if enrolled && !report.captured {
        return not(
            "connected, and this node's agent did NOT capture it: it goes by the agent, and nobody encrypts it".into(),
            "marline status tells which hook is not in force",
        );
    }
    if !policy.allowed && report.mode.as_deref() != Some("mtls") {
        return not(
            format!(
                "TCP is connected, and policy refuses what is not mTLS, as soon as something is sent: {}",
                policy.reason
            ),
            "enrol the source, or let the destination's PeerAuthentication be PERMISSIVE; --send TEXT shows the end",
        );
    }
    match (report.mode.as_deref(), report.wire.encrypted) {
        (Some("mtls"), Some(true)) if policy.encryption == "mtls" => {
            (true, "connected, and on the wire there is TLS alone, as policy wants".into(), None)
        }
        (Some("mtls"), Some(true)) => not(
            format!("connected under mTLS, where this node's policies want {}: {}", policy.encryption, policy.reason),
            "the configurations of the two nodes may differ: marline status on both",
        ),
        (Some("mtls"), Some(false)) => not(
            "the agent says mTLS, and on the wire there were bytes that are NOT TLS".into(),
            "this must not be: marline bugreport, and report it as a security matter",
        ),
        (Some("mtls"), None) => not(
            "connected under mTLS, as the agent says; too little was seen on the wire to say that it is encrypted"
                .into(),
            "try again; connections within one pod never leave it, and those of a busy pod may be missed",
        ),
        (_, seen) => {
            let seen = match seen {
                Some(_) => "it is NOT encrypted: the bytes can be read on the wire",
                None => "it is NOT encrypted (nothing was sent that could be seen; --send TEXT shows it)",
            };
            let way_out = if enrolled {
                "enrol the destination (label marline.io/mesh: enabled), or see its PeerAuthentication and DestinationRule"
            } else {
                "enrol the source; STRICT in a PeerAuthentication refuses plaintext"
            };
            not(format!("connected, and {seen}; {}", policy.reason), way_out)
        }
    }
}

fn refused(report: &Report, enrolled: bool, failure: &str) -> (bool, String, Option<String>) {
    let not = |reason: String, way_out: &str| (false, reason, Some(way_out.to_owned()));
    let (policy, port) = (&report.policy, report.destination.address.port());
    if !policy.allowed {
        let way_out = match policy.reason.contains("AuthorizationPolicy") {
            true => {
                "change that AuthorizationPolicy, if this is to be allowed; marline policy explain shows all that have a say"
            }
            false if !enrolled => "enrol the source, or let the destination's PeerAuthentication be PERMISSIVE",
            false => "see PeerAuthentication and DestinationRule of the destination; is it meant to be in the mesh?",
        };
        return not(format!("refused, as policy wants: {} ({failure})", policy.reason), way_out);
    }
    // What the destination's own agent says is the best there is.
    if let Some(said) = report.said_there.as_ref().or(report.said.as_ref().filter(|said| !said.contains("peer_alert")))
    {
        let way_out = match said.as_str() {
            said if said.contains("refused:") || said.contains("refuses") => {
                format!(
                    "is anything listening on port {port} of the destination, and on its address, not on 127.0.0.1 alone?"
                )
            }
            said if said.contains("no_svid") => "marline certs tells why there is no certificate".into(),
            _ => "the reason names it; the access log and the log of the agents have more".into(),
        };
        return (false, format!("policy allows it, and it failed: {said}"), Some(way_out));
    }
    if report.said.is_some() {
        return not(
            format!(
                "the handshake succeeded, policy allows it by what this node knows, and the destination's agent ended it: most likely \
                 nothing listens on port {port} there"
            ),
            "start the application, or see the access log of the destination's node, which has the reason",
        );
    }
    not(
        format!("policy allows it, and the connection failed: {failure}"),
        "is the destination there, and does anything listen on that port? marline connections --ended on both nodes has more",
    )
}
