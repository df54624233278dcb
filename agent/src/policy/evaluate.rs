//! AuthorizationPolicy, compiled and asked: DENY before ALLOW; where an ALLOW policy applies, what none allows is denied;
//! where none applies, what is not denied is allowed (istio/api security/v1beta1/authorization_policy.proto).
//!
//! Rules can be asked before the handshake, too: what then depends on the peer's identity is left open.

use std::{collections::HashSet, fmt};

use serde::Serialize;

use super::{
    Workload, aliases,
    authorization::{Action, Attempt, AuthorizationPolicy, Condition, Peer, Rule, Test},
    matching::{Blocks, Patterns},
    select::{Header, Index, PolicyName, Selective},
};
use crate::identity::TrustDomains;

/// All AuthorizationPolicies, ready to be asked.
#[derive(PartialEq, Default, Debug)]
pub struct Authorization {
    index: Index<Compiled>,
}

/// What becomes of a connection, and by whose word.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision<'a> {
    pub verdict: Verdict<'a>,
    /// The first AUDIT rule that matches.
    pub audited_by: Option<Cited<'a>>,
    /// Why the policies with `istio.io/dry-run` would have denied it. As in Istio they are asked by themselves, as if there
    /// were no others.
    pub rehearsed: Option<Denial<'a>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict<'a> {
    /// By a rule, or because no ALLOW policy applies.
    Allowed(Option<Cited<'a>>),
    Denied(Denial<'a>),
    /// It depends on what the handshake will prove.
    Open,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Denial<'a> {
    /// A DENY rule matches.
    Rule(Cited<'a>),
    /// These ALLOW policies apply, and no rule of theirs matches.
    NothingAllows(Vec<&'a PolicyName>),
}

/// A rule, counted from 0 as in the YAML path `spec.rules[0]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cited<'a> {
    pub policy: &'a PolicyName,
    pub rule: usize,
}

impl fmt::Display for Cited<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rules[{}]", self.policy, self.rule)
    }
}

#[derive(PartialEq, Debug)]
struct Compiled {
    header: Header,
    action: Action,
    dry_run: bool,
    rules: Vec<CompiledRule>,
    /// As they were written.
    written: Vec<Rule>,
}

/// A policy as it was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written<'a> {
    pub header: &'a Header,
    pub action: Action,
    pub dry_run: bool,
    pub rules: &'a [Rule],
}

#[derive(PartialEq, Debug)]
struct CompiledRule {
    /// Its place in the resource: rules that can never match are left out.
    at: usize,
    from: Vec<Vec<(Ready, bool)>>,
    to: Vec<Vec<(Ready, bool)>>,
    when: Vec<(Ready, bool)>,
}

/// A test with its values in sets.
#[derive(PartialEq, Debug)]
enum Ready {
    SourceIp(Blocks),
    Principal(Patterns),
    Namespace(Patterns),
    TrustDomain(Patterns),
    ServiceAccount(HashSet<(String, String)>),
    DestinationIp(Blocks),
    DestinationPort(HashSet<u16>),
    Sni(Patterns),
}

/// An attempt, with what many rules ask for made once.
struct Question<'a> {
    attempt: &'a Attempt<'a>,
    /// `TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`; empty if nothing was proved.
    principal: String,
}

impl Selective for Compiled {
    fn header(&self) -> &Header {
        &self.header
    }
}

impl Authorization {
    pub fn compile(domains: impl Into<TrustDomains>, policies: Vec<AuthorizationPolicy>) -> Self {
        let domains = domains.into();
        let compile = |policy: AuthorizationPolicy| Compiled {
            action: policy.action,
            dry_run: policy.dry_run,
            written: policy.rules.clone(),
            rules: policy
                .rules
                .into_iter()
                .enumerate()
                .filter_map(|(at, rule)| compile_rule(&domains, policy.action, at, rule))
                .collect(),
            header: policy.header,
        };
        Self { index: Index::new(policies.into_iter().map(compile).collect()) }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// All policies, the oldest first.
    pub fn written(&self) -> impl Iterator<Item = Written<'_>> {
        self.index.iter().map(|policy| Written {
            header: &policy.header,
            action: policy.action,
            dry_run: policy.dry_run,
            rules: &policy.written,
        })
    }

    /// The names of those that apply to a workload.
    pub fn applying(&self, workload: &Workload) -> impl Iterator<Item = &PolicyName> {
        self.index.applying(workload).into_iter().map(|policy| &policy.header.name)
    }

    pub fn decide(&self, destination: &Workload, attempt: &Attempt<'_>) -> Decision<'_> {
        let applying = self.index.applying(destination);
        if applying.is_empty() {
            return Decision { verdict: Verdict::Allowed(None), audited_by: None, rehearsed: None };
        }
        let question = Question::new(attempt);
        let audited_by = match first(&applying, Action::Audit, false, &question) {
            Found::Match(cited) => Some(cited),
            Found::Open | Found::None(_) => None,
        };
        let rehearsed = match verdict(&applying, true, &question) {
            Verdict::Denied(denial) => Some(denial),
            Verdict::Allowed(_) | Verdict::Open => None,
        };
        Decision { verdict: verdict(&applying, false, &question), audited_by, rehearsed }
    }

    /// The policies that apply to a workload, in the order in which they are asked, each with the first of its rules that
    /// matches.
    pub fn asked(&self, destination: &Workload, attempt: &Attempt<'_>) -> Vec<Asked<'_>> {
        let order = |action: Action| match action {
            Action::Audit => 0,
            Action::Deny => 1,
            Action::Allow => 2,
        };
        let question = Question::new(attempt);
        let mut applying = self.index.applying(destination);
        applying.sort_by_key(|policy| (policy.dry_run, order(policy.action)));
        let first =
            |rules: &[CompiledRule]| rules.iter().find(|rule| question.matches(rule) == Some(true)).map(|rule| rule.at);
        applying
            .into_iter()
            .map(|policy| Asked {
                policy: &policy.header.name,
                action: policy.action,
                dry_run: policy.dry_run,
                matches: first(&policy.rules),
            })
            .collect()
    }
}

/// One policy and what it says of a connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Asked<'a> {
    pub policy: &'a PolicyName,
    pub action: Action,
    pub dry_run: bool,
    /// The rule, counted from 0.
    pub matches: Option<usize>,
}

fn verdict<'a>(applying: &[&'a Compiled], dry_run: bool, question: &Question<'_>) -> Verdict<'a> {
    let denied = first(applying, Action::Deny, dry_run, question);
    if let Found::Match(cited) = denied {
        return Verdict::Denied(Denial::Rule(cited));
    }
    match (first(applying, Action::Allow, dry_run, question), denied) {
        (Found::None(policies), _) if !policies.is_empty() => Verdict::Denied(Denial::NothingAllows(policies)),
        (_, Found::Open) | (Found::Open, _) => Verdict::Open,
        (Found::Match(cited), _) => Verdict::Allowed(Some(cited)),
        (Found::None(_), _) => Verdict::Allowed(None),
    }
}

enum Found<'a> {
    Match(Cited<'a>),
    /// One may match when more is known, and none does yet.
    Open,
    /// None of these matches.
    None(Vec<&'a PolicyName>),
}

/// The first rule of an action that matches; policies are asked oldest first.
fn first<'a>(applying: &[&'a Compiled], action: Action, dry_run: bool, question: &Question<'_>) -> Found<'a> {
    let (mut open, mut asked) = (false, Vec::new());
    for policy in applying.iter().filter(|policy| policy.action == action && policy.dry_run == dry_run) {
        for rule in &policy.rules {
            match question.matches(rule) {
                Some(true) => return Found::Match(Cited { policy: &policy.header.name, rule: rule.at }),
                Some(false) => {}
                None => open = true,
            }
        }
        asked.push(&policy.header.name);
    }
    if open { Found::Open } else { Found::None(asked) }
}

impl<'a> Question<'a> {
    fn new(attempt: &'a Attempt<'a>) -> Self {
        let principal = match attempt.peer {
            Peer::Proved { id, .. } => {
                format!("{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account())
            }
            Peer::NotYetKnown | Peer::Nobody => String::new(),
        };
        Self { attempt, principal }
    }

    /// None where it is not known yet.
    fn matches(&self, rule: &CompiledRule) -> Option<bool> {
        let any_of = |groups: &[Vec<(Ready, bool)>]| match groups {
            [] => Some(true),
            groups => any(groups.iter().map(|group| self.all_of(group))),
        };
        all([any_of(&rule.to), self.all_of(&rule.when), any_of(&rule.from)])
    }

    fn all_of(&self, conditions: &[(Ready, bool)]) -> Option<bool> {
        all(conditions.iter().map(|(test, negated)| self.test(test).map(|met| met != *negated)))
    }

    fn test(&self, test: &Ready) -> Option<bool> {
        let proved = |met: &dyn Fn() -> bool| match self.attempt.peer {
            Peer::NotYetKnown => None,
            Peer::Nobody => Some(false),
            Peer::Proved { .. } => Some(met()),
        };
        let id = match self.attempt.peer {
            Peer::Proved { id, .. } => Some(id),
            Peer::NotYetKnown | Peer::Nobody => None,
        };
        match test {
            Ready::SourceIp(blocks) => Some(blocks.any(self.attempt.source)),
            Ready::DestinationIp(blocks) => Some(blocks.any(self.attempt.destination.ip())),
            Ready::DestinationPort(ports) => Some(ports.contains(&self.attempt.destination.port())),
            Ready::Principal(patterns) => proved(&|| patterns.any(&self.principal)),
            Ready::Namespace(patterns) => proved(&|| id.is_some_and(|id| patterns.any(id.namespace()))),
            Ready::TrustDomain(patterns) => proved(&|| id.is_some_and(|id| patterns.any(id.trust_domain().as_str()))),
            Ready::ServiceAccount(accounts) => proved(&|| {
                id.is_some_and(|id| accounts.contains(&(id.namespace().to_owned(), id.service_account().to_owned())))
            }),
            Ready::Sni(patterns) => match self.attempt.peer {
                Peer::NotYetKnown => None,
                Peer::Nobody => Some(false),
                Peer::Proved { sni, .. } => Some(sni.is_some_and(|sni| patterns.any(sni))),
            },
        }
    }
}

/// Kleene's AND: one that is false settles it.
fn all(parts: impl IntoIterator<Item = Option<bool>>) -> Option<bool> {
    let mut result = Some(true);
    for part in parts {
        match part {
            Some(false) => return Some(false),
            Some(true) => {}
            None => result = None,
        }
    }
    result
}

fn any(parts: impl IntoIterator<Item = Option<bool>>) -> Option<bool> {
    all(parts.into_iter().map(|part| part.map(|met| !met))).map(|none| !none)
}

fn compile_rule(domains: &TrustDomains, action: Action, at: usize, rule: Rule) -> Option<CompiledRule> {
    let Rule { from, to, when } = rule;
    let needs_http = from.iter().chain(&to).chain([&when]).flatten().any(|condition| condition.test == Test::Http);
    if needs_http && action == Action::Allow {
        return None;
    }
    let group = |conditions: Vec<Condition>| {
        let compile = |condition: Condition| Some((ready(domains, condition.test)?, condition.negated));
        conditions.into_iter().filter_map(compile).collect::<Vec<_>>()
    };
    let groups = |groups: Vec<Vec<Condition>>| groups.into_iter().map(group).collect();
    Some(CompiledRule { at, from: groups(from), to: groups(to), when: group(when) })
}

fn ready(domains: &TrustDomains, test: Test) -> Option<Ready> {
    Some(match test {
        Test::SourceIp(blocks) => Ready::SourceIp(blocks.into_iter().collect()),
        Test::DestinationIp(blocks) => Ready::DestinationIp(blocks.into_iter().collect()),
        Test::DestinationPort(ports) => Ready::DestinationPort(ports.into_iter().collect()),
        Test::Principal(patterns) => {
            Ready::Principal(patterns.into_iter().flat_map(|pattern| aliases::principal(domains, pattern)).collect())
        }
        Test::Namespace(patterns) => Ready::Namespace(patterns.into_iter().collect()),
        Test::TrustDomain(patterns) => Ready::TrustDomain(
            patterns.into_iter().flat_map(|pattern| aliases::trust_domain(domains, pattern)).collect(),
        ),
        Test::ServiceAccount(accounts) => Ready::ServiceAccount(accounts.into_iter().collect()),
        Test::Sni(patterns) => Ready::Sni(patterns.into_iter().collect()),
        Test::Http => return None,
    })
}
