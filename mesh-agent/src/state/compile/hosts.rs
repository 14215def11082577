//! Things by host, where a host may be a wildcard.
//!
//! Promises that what covers a name is found without looking at hosts that are no wildcards. Tested below.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use super::covers;

/// Things by host.
#[derive(Debug)]
pub(super) struct Hosts<T> {
    exact: HashMap<String, T>,
    /// Longest first.
    wildcards: BTreeMap<(Reverse<usize>, String), T>,
}

impl<T> Default for Hosts<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), wildcards: BTreeMap::new() }
    }
}

impl<T: Default> Hosts<T> {
    /// What belongs to exactly this host, made when it is not there.
    pub fn entry(&mut self, host: String) -> &mut T {
        if host.starts_with('*') {
            self.wildcards.entry((Reverse(host.len()), host)).or_default()
        } else {
            self.exact.entry(host).or_default()
        }
    }
}

impl<T> Hosts<T> {
    /// What covers a name, most specific first: the name itself, then the longest wildcard.
    pub fn covering<'s>(&'s self, name: &str) -> impl Iterator<Item = &'s T> {
        let wildcards = self.wildcards.iter().filter(move |((_, pattern), _)| covers(pattern, name));
        self.exact.get(name).into_iter().chain(wildcards.map(|(_, found)| found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_specific_first() {
        let mut hosts: Hosts<&str> = Hosts::default();
        for host in ["*.b.c", "a.b.c", "*.c", "*", "x.b.c"] {
            *hosts.entry(host.to_owned()) = host;
        }
        let covering = |name: &str| hosts.covering(name).copied().collect::<Vec<_>>();
        assert_eq!(covering("a.b.c"), ["a.b.c", "*.b.c", "*.c", "*"]);
        assert_eq!(covering("y.b.c"), ["*.b.c", "*.c", "*"]);
        assert_eq!(covering("b.c"), ["*.c", "*"], "a wildcard does not cover what it is below");
        assert_eq!(covering("z"), ["*"]);
    }
}
