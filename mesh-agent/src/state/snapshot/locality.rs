//! Where an endpoint or a node is: region, zone and sub-zone, as Kubernetes and Istio call them.
//!
//! Tested below.

use std::{fmt, sync::Arc};

/// A place; what is not known of it is empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone`.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone`.
    pub subzone: Arc<str>,
}

impl Locality {
    /// From Istio's form, `region/zone/subzone`, of which the end may be missing.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(Arc::from);
        let mut next = || parts.next().unwrap_or_default();
        Self { region: next(), zone: next(), subzone: next() }
    }

    /// Whether nothing at all is known.
    pub fn is_unknown(&self) -> bool {
        [&self.region, &self.zone, &self.subzone].into_iter().all(|part| part.is_empty())
    }

    /// How far it is from another place, as Istio counts: 0 the same sub-zone, 1 the same zone, 2 the same region, 3 another
    /// region.
    pub fn distance(&self, other: &Self) -> usize {
        if self.region != other.region {
            3
        } else if self.zone != other.zone {
            2
        } else {
            usize::from(self.subzone != other.subzone)
        }
    }

    /// Whether a pattern of `distribute` means it, `region/zone/*` for example: `*` and what is missing stand for anything.
    pub fn is_meant_by(&self, pattern: &Self) -> bool {
        let any = |part: &str| part == "*" || part.is_empty();
        (&*pattern.region == "*" || pattern.region == self.region)
            && (any(&pattern.zone) || pattern.zone == self.zone)
            && (any(&pattern.subzone) || pattern.subzone == self.subzone)
    }
}

impl fmt::Display for Locality {
    /// Istio's form, without what is missing at its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}/{}/{}", self.region, self.zone, self.subzone);
        f.write_str(text.trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_written_as_istio_writes_them() {
        for text in ["", "r", "r/z", "r/z/s", "/z"] {
            assert_eq!(Locality::parse(text).to_string(), text);
        }
        assert!(Locality::parse("").is_unknown() && !Locality::parse("/z").is_unknown());
    }

    #[test]
    fn distance_grows_from_the_sub_zone_to_the_region() {
        let here = Locality::parse("r/z/s");
        for (there, distance) in
            [("r/z/s", 0), ("r/z/t", 1), ("r/z", 1), ("r/y/s", 2), ("r", 2), ("q/z/s", 3), ("", 3)]
        {
            assert_eq!(here.distance(&Locality::parse(there)), distance, "{there}");
        }
    }

    #[test]
    fn patterns_leave_their_end_open() {
        let here = Locality::parse("r/z/s");
        for (pattern, means) in [
            ("*", true),
            ("r", true),
            ("r/*", true),
            ("r/z/*", true),
            ("r/z/s", true),
            ("r/z/t", false),
            ("q/*", false),
        ] {
            assert_eq!(here.is_meant_by(&Locality::parse(pattern)), means, "{pattern}");
        }
    }
}
