//! Finds what selects a pod by its labels, however much there is that does not.
//!
//! Each selector is filed under that of its labels which the fewest others ask for: a label that all of them share costs
//! nothing. Tested below and through `tests/authorization.rs`.

use std::collections::{BTreeMap, HashMap};

use super::endpoints::selects;

/// Labels of a pod, or those that a selector asks for.
pub(super) type Labels = BTreeMap<String, String>;

/// Things that are for pods with certain labels.
#[derive(Debug)]
pub(super) struct Selectors<'a, T> {
    /// Those that ask for no label.
    all: Vec<T>,
    /// The others, by one of the labels that they ask for.
    by_label: HashMap<(&'a str, &'a str), Vec<(&'a Labels, T)>>,
}

impl<'a, T: Copy> Selectors<'a, T> {
    /// Files all of them.
    pub fn new(entries: Vec<(&'a Labels, T)>) -> Self {
        let mut asked: HashMap<(&str, &str), usize> = HashMap::new();
        let pairs = |labels: &'a Labels| labels.iter().map(|(name, value)| (&**name, &**value));
        for pair in entries.iter().flat_map(|(labels, _)| pairs(labels)) {
            *asked.entry(pair).or_default() += 1;
        }
        let mut filed = Self { all: Vec::new(), by_label: HashMap::new() };
        for (labels, thing) in entries {
            match pairs(labels).min_by_key(|pair| asked.get(pair).copied()) {
                None => filed.all.push(thing),
                Some(rarest) => filed.by_label.entry(rarest).or_default().push((labels, thing)),
            }
        }
        filed
    }

    /// Those that select a pod with these labels.
    pub fn of<'s>(&'s self, labels: &'s Labels) -> impl Iterator<Item = T> + use<'s, 'a, T> {
        let filed = labels.iter().filter_map(|(name, value)| self.by_label.get(&(&**name, &**value)));
        let those = filed.flatten().filter(|(wanted, _)| selects(wanted, Some(labels)));
        self.all.iter().copied().chain(those.map(|(_, thing)| *thing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> Labels {
        let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn what_selects_a_pod_is_found_once() {
        let written =
            ["", "app=web", "app=web tier=front", "app=db", "app=web tier=back", "tier=front"].map(labels);
        let filed = Selectors::new(written.iter().zip(0..).collect());
        let of = |text: &str| {
            let pod = labels(text);
            let mut found: Vec<i32> = filed.of(&pod).collect();
            found.sort_unstable();
            found
        };
        assert_eq!(of(""), [0]);
        assert_eq!(of("app=web"), [0, 1]);
        assert_eq!(of("app=web tier=front zone=a"), [0, 1, 2, 5]);
        assert_eq!(of("app=mail tier=front"), [0, 5]);
    }

    /// A label that all ask for is not what they are filed under, whatever its name is.
    #[test]
    fn a_label_that_all_share_is_passed_over() {
        let written: Vec<Labels> = (0..100).map(|i| labels(&format!("all=same z=of-{i}"))).collect();
        let filed = Selectors::new(written.iter().zip(0..).collect());
        assert!(filed.by_label.values().all(|those| those.len() == 1), "{filed:?}");
        let pod = labels("all=same z=of-7");
        assert_eq!(filed.of(&pod).collect::<Vec<i32>>(), [7]);
    }
}
