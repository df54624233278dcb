//! Trust domains in the rules of AuthorizationPolicy: a mesh with several names means all of them by each, as Istio has it (istio/istio
//! pilot/pkg/security/trustdomain/bundle.go, `ReplaceTrustDomainAliases` and `ExpandTrustDomainAliases`, and util.go beside it).

use super::matching::Pattern;
use crate::identity::TrustDomains;

/// A principal that names our trust domain or an alias, in whole or by a wildcard, is meant in each of them; `cluster.local` stands for
/// ours, whatever that is called. Only where it has five parts, TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT, and the first is not `*` alone;
/// all others are left as they are.
pub(super) fn principal(domains: &TrustDomains, pattern: Pattern) -> Vec<Pattern> {
    let text = written(&pattern);
    let Some((domain, rest)) = text.split_once('/').filter(|(_, rest)| rest.split('/').count() == 4) else {
        return vec![pattern];
    };
    let ours = domain == "cluster.local" || domains.iter().any(|known| ends_like(known.as_str(), domain));
    if domain == "*" || !ours {
        return vec![pattern];
    }
    let mut all: Vec<Pattern> = Vec::new();
    for known in domains.iter() {
        // A wildcard that covers the name already stays one.
        let meant = if ends_like(known.as_str(), domain) && domain.starts_with('*') {
            Some(pattern.clone())
        } else {
            format!("{known}/{rest}").parse().ok()
        };
        all.extend(meant.filter(|meant| !all.contains(meant)));
    }
    all
}

/// One of our trust domains means all of them. Wildcards are left as they are.
pub(super) fn trust_domain(domains: &TrustDomains, pattern: Pattern) -> Vec<Pattern> {
    match &pattern {
        Pattern::Exact(text) if domains.iter().any(|known| known.as_str() == text) => {
            domains.iter().map(|known| Pattern::Exact(known.as_str().to_owned())).collect()
        }
        _ => vec![pattern],
    }
}

fn ends_like(known: &str, domain: &str) -> bool {
    match domain.strip_prefix('*') {
        Some(suffix) => known.ends_with(suffix),
        None => known == domain,
    }
}

fn written(pattern: &Pattern) -> String {
    match pattern {
        Pattern::Exact(text) => text.clone(),
        Pattern::Prefix(text) => format!("{text}*"),
        Pattern::Suffix(text) => format!("*{text}"),
        Pattern::Presence => "*".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    fn domains(own: &str, aliases: &[&str]) -> TrustDomains {
        let parse = |name: &str| TrustDomain::parse(name).unwrap();
        TrustDomains::new(parse(own), aliases.iter().map(|alias| parse(alias)))
    }

    fn expanded(domains: &TrustDomains, text: &str) -> Vec<String> {
        principal(domains, text.parse().unwrap()).iter().map(written).collect()
    }

    /// The cases of istio/istio pilot/pkg/security/trustdomain/bundle_test.go that a pattern of ours can express.
    #[test]
    fn principals_are_meant_in_every_trust_domain_of_the_mesh_as_in_istio() {
        let cases: [(&str, &[&str], &str, &[&str]); 11] = [
            ("td2", &[], "*", &["*"]),
            ("td2", &[], "cluster.local/ns/foo/sa/bar", &["td2/ns/foo/sa/bar"]),
            ("td2", &["td1"], "td1/ns/foo/sa/bar", &["td2/ns/foo/sa/bar", "td1/ns/foo/sa/bar"]),
            ("td2", &["td1"], "td2/ns/foo/sa/*", &["td2/ns/foo/sa/*", "td1/ns/foo/sa/*"]),
            ("td2", &["td1"], "cluster.local/ns/foo/sa/bar", &["td2/ns/foo/sa/bar", "td1/ns/foo/sa/bar"]),
            (
                "td1",
                &["cluster.local"],
                "cluster.local/ns/foo/sa/bar",
                &["td1/ns/foo/sa/bar", "cluster.local/ns/foo/sa/bar"],
            ),
            ("td2", &["td1"], "*/ns/foo/sa/bar", &["*/ns/foo/sa/bar"]),
            ("td2", &["td1"], "other/ns/foo/sa/bar", &["other/ns/foo/sa/bar"]),
            ("new-td", &["old-td"], "*-td/ns/foo/sa/bar", &["*-td/ns/foo/sa/bar"]),
            ("new-td", &["some-td", "other"], "*-td/ns/foo/sa/bar", &["*-td/ns/foo/sa/bar", "other/ns/foo/sa/bar"]),
            ("td2", &["td1"], "td1/ns/foo*", &["td1/ns/foo*"]),
        ];
        for (own, aliases, text, expected) in cases {
            assert_eq!(expanded(&domains(own, aliases), text), expected, "{own} {aliases:?} {text}");
        }
    }

    #[test]
    fn one_of_the_meshs_trust_domains_means_all_of_them() {
        let domains = domains("td2", &["td1"]);
        let cases: [(&str, &[&str]); 4] =
            [("td1", &["td2", "td1"]), ("td2", &["td2", "td1"]), ("other", &["other"]), ("td*", &["td*"])];
        for (text, expected) in cases {
            let all = trust_domain(&domains, text.parse().unwrap());
            assert_eq!(all.iter().map(written).collect::<Vec<_>>(), expected, "{text}");
        }
    }
}
