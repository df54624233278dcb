//! Where a policy applies, and which policies apply to a workload without looking at all of them: by namespace, then by
//! one label of the selector.

use std::{cmp::Ordering, collections::HashMap, fmt, time::Duration};

use serde::{Serialize, Serializer};

use super::{Labels, Workload};

/// Istio's namespace for what holds in the whole mesh.
pub const ROOT_NAMESPACE: &str = "istio-system";

/// Which resource a policy is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyName {
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

impl Serialize for PolicyName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What every policy has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    pub name: PolicyName,
    /// Since the Unix epoch. Istio takes a resource without a time for the oldest of all.
    pub created: Option<Duration>,
    /// The labels that a workload must have; none are for all workloads.
    pub selector: Labels,
}

impl Header {
    pub fn selects(&self, labels: &Labels) -> bool {
        labels.satisfy(&self.selector)
    }

    pub fn is_of_mesh(&self) -> bool {
        self.name.namespace == ROOT_NAMESPACE
    }

    /// Oldest first; then by name and namespace, as Istio orders what was created in one second
    /// (istio/istio pilot/pkg/model/config.go, `configCompareByCreationTime`).
    pub fn by_age(&self, other: &Self) -> Ordering {
        let key = |header: &Self| (header.created, header.name.name.clone(), header.name.namespace.clone());
        key(self).cmp(&key(other))
    }
}

/// A policy that can be looked up by what it selects.
pub(super) trait Selective {
    fn header(&self) -> &Header;
}

/// Policies, oldest first, and where to find those for one workload.
#[derive(PartialEq, Debug)]
pub(super) struct Index<T> {
    items: Vec<T>,
    namespaces: HashMap<String, Scope>,
}

#[derive(PartialEq, Default, Debug)]
struct Scope {
    everywhere: Vec<usize>,
    /// By one label of each selector: the one that fewest selectors of the namespace share.
    labelled: HashMap<String, HashMap<String, Vec<usize>>>,
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self { items: Vec::new(), namespaces: HashMap::new() }
    }
}

impl<T: Selective> Index<T> {
    pub(super) fn new(mut items: Vec<T>) -> Self {
        items.sort_by(|a, b| a.header().by_age(b.header()));
        let mut uses: HashMap<(&str, &str, &str), usize> = HashMap::new();
        for header in items.iter().map(T::header) {
            for (key, value) in header.selector.iter() {
                *uses.entry((&header.name.namespace, key, value)).or_default() += 1;
            }
        }
        let mut namespaces: HashMap<String, Scope> = HashMap::new();
        for (at, header) in items.iter().map(T::header).enumerate() {
            let scope = namespaces.entry(header.name.namespace.clone()).or_default();
            let shared = |key: &str, value: &str| uses.get(&(&*header.name.namespace, key, value)).copied();
            match header.selector.iter().min_by_key(|(key, value)| shared(key, value)) {
                None => scope.everywhere.push(at),
                Some((key, value)) => {
                    scope.labelled.entry(key.to_owned()).or_default().entry(value.to_owned()).or_default().push(at);
                }
            }
        }
        Self { items, namespaces }
    }

    /// Those for a workload, oldest first: of its own namespace, and of the root namespace.
    pub(super) fn applying(&self, workload: &Workload) -> Vec<&T> {
        let mut found = Vec::new();
        self.collect(&workload.namespace, &workload.labels, &mut found);
        if workload.namespace != ROOT_NAMESPACE {
            self.collect(ROOT_NAMESPACE, &workload.labels, &mut found);
        }
        found.sort_unstable();
        found.into_iter().filter_map(|at| self.items.get(at)).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    fn collect(&self, namespace: &str, labels: &Labels, found: &mut Vec<usize>) {
        let Some(scope) = self.namespaces.get(namespace) else { return };
        found.extend(&scope.everywhere);
        if scope.labelled.is_empty() {
            return;
        }
        for (key, value) in labels.iter() {
            let candidates = scope.labelled.get(key).and_then(|values| values.get(value));
            // A selector of one label is the label that it was found by.
            let chosen = |at: &usize| {
                let header = self.items.get(*at).map(T::header);
                header.is_some_and(|header| header.selector.len() == 1 || header.selects(labels))
            };
            found.extend(candidates.into_iter().flatten().filter(|at| chosen(at)));
        }
    }
}
