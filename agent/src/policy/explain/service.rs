//! The same for a call to a service: the DestinationRules with a say, and each endpoint.

use std::{fmt, net::SocketAddr};

use serde::Serialize;

use super::{Callee, Caller, Explanation, explain};
use crate::policy::{Labels, Policies, PolicyName, Service, Traffic};

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ServiceExplanation<'a> {
    /// Whether all endpoints can be called; false if there are none.
    pub allowed: bool,
    pub service: &'a str,
    pub port: u16,
    /// DestinationRules for these clients and this host. The first counts, and it alone.
    pub destination_rules: Vec<RuleSaid<'a>>,
    pub endpoints: Vec<EndpointExplained<'a>>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RuleSaid<'a> {
    pub rule: &'a PolicyName,
    pub host: &'a str,
    /// Of this port, in words.
    pub says: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EndpointExplained<'a> {
    pub address: SocketAddr,
    /// NAMESPACE/NAME, if it is a known workload.
    pub workload: Option<String>,
    /// Of the rule that counts, by their labels. Without routes nothing chooses one.
    pub subsets: Vec<&'a str>,
    pub explanation: Explanation<'a>,
}

/// What becomes of a call to a service, at one of its addresses or of a node's. None if there is no such port.
pub fn explain_service<'a>(
    policies: &'a Policies,
    caller: Caller<'a>,
    service: &'a Service,
    to: SocketAddr,
) -> Option<ServiceExplanation<'a>> {
    let (port, endpoints) = service.leads(to)?;
    // Rules are for those who have an agent.
    let member = caller.workload.filter(|workload| workload.in_mesh && !caller.plaintext);
    let asked = |client| policies.destinations.asked(client, &service.namespace, &service.host).collect::<Vec<_>>();
    let rules = member.map(asked).unwrap_or_default();
    let (none, traffic) = (Traffic::default(), rules.first().map(|rule| &**rule.traffic_at(port)));
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|endpoint| {
            let workload = endpoint.workload.as_deref();
            let service = Some((service, traffic.unwrap_or(&none)));
            let has = |labels: &Labels| workload.is_some_and(|workload| workload.labels.satisfy(labels));
            let subsets = rules.first().into_iter().flat_map(|rule| &rule.subsets);
            EndpointExplained {
                address: endpoint.address,
                workload: workload.map(ToString::to_string),
                subsets: subsets.filter(|subset| has(&subset.labels)).map(|subset| subset.name.as_str()).collect(),
                explanation: explain(
                    policies,
                    caller,
                    Callee { workload, address: endpoint.address, service, told_plaintext: false },
                ),
            }
        })
        .collect();
    let allowed = !endpoints.is_empty() && endpoints.iter().all(|endpoint| endpoint.explanation.allowed);
    let said = |rule: &&'a crate::policy::DestinationRule| RuleSaid {
        rule: &rule.header.name,
        host: &rule.host,
        says: rule.traffic_at(port).to_string(),
    };
    let destination_rules = rules.iter().map(said).collect();
    Some(ServiceExplanation { allowed, service: &service.host, port, destination_rules, endpoints })
}

impl fmt::Display for ServiceExplanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "what the client's side does, of DestinationRule:")?;
        if self.destination_rules.is_empty() {
            writeln!(f, "    none applies: mTLS towards workloads of the mesh, plaintext towards others")?;
        }
        for (number, said) in self.destination_rules.iter().enumerate() {
            let mark = if number == 0 { "*" } else { " " };
            writeln!(f, "  {mark} {} for {}: {}", said.rule, said.host, said.says)?;
        }
        writeln!(f, "endpoints:")?;
        if self.endpoints.is_empty() {
            writeln!(f, "    there are none: the connection is refused")?;
        }
        for endpoint in &self.endpoints {
            let workload = endpoint.workload.as_deref().unwrap_or("no known workload");
            let subsets = match endpoint.subsets.as_slice() {
                [] => String::new(),
                subsets => format!(" (subset {})", subsets.join(", ")),
            };
            writeln!(f, "  {} {workload}{subsets}: {}", endpoint.address, endpoint.explanation.verdict())?;
        }
        // They are alike as a rule; whoever asks about another one can ask by its name.
        if let Some(first) = self.endpoints.first() {
            write!(f, "at {}: {}", first.address, first.explanation)?;
        }
        Ok(())
    }
}
