//! Pods: the annotations that say how a pod is captured.
//!
//! Promises that a value it cannot read, or that the kernel's tables cannot hold, refuses the object and is named with
//! its annotation. Tested below.

use std::{collections::BTreeMap, fmt::Display};

use k8s_openapi::api::core::v1::Pod;
use mesh_common::maps::{EXCLUDED_CIDRS_OF_A_POD, EXCLUDED_PORTS_CAPACITY, port};

use super::{
    dns_name,
    field::{Checked, FieldError, under},
};
use crate::state::{
    defaults::LARGEST_WEIGHT,
    snapshot::{CapturePolicy, Exclusions, PortRange, Subnet, WhenAgentIsDown},
};

const EXCLUDE_OUTBOUND_PORTS: &str = "mesh.io/exclude-outbound-ports";
const EXCLUDE_OUTBOUND_CIDRS: &str = "mesh.io/exclude-outbound-cidrs";
const EXCLUDE_INBOUND_PORTS: &str = "mesh.io/exclude-inbound-ports";
const EXCLUDE_INBOUND_CIDRS: &str = "mesh.io/exclude-inbound-cidrs";
const WHEN_AGENT_IS_DOWN: &str = "mesh.io/when-agent-is-down";
const EGRESS: &str = "mesh.io/egress";
const DIRECT: &str = "mesh.io/direct";
const WEIGHT: &str = "mesh.io/weight";

type Annotations = BTreeMap<String, String>;

/// Checks what becomes part of an identity, and the annotations.
pub(super) fn check(pod: Box<Pod>) -> Checked<Box<Pod>> {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
    if let Some(account) = account.filter(|account| !account.is_empty()) {
        dns_name(account).map_err(under("spec.serviceAccountName"))?;
    }
    capture_policy(pod.metadata.annotations.as_ref())?;
    weight(pod.metadata.annotations.as_ref())?;
    Ok(pod)
}

/// Its share as an endpoint, among those of the others (annotation `mesh.io/weight`). Never an error for those of a pod that
/// was checked.
pub fn weight(annotations: Option<&Annotations>) -> Checked<u32> {
    let Some(text) = annotations.and_then(|all| all.get(WEIGHT)) else { return Ok(1) };
    let weight = text.trim().parse::<u32>().ok().filter(|weight| (1..=LARGEST_WEIGHT).contains(weight));
    weight.ok_or_else(|| wrong(WEIGHT, format!("{text:?} is not a number from 1 to {LARGEST_WEIGHT}")))
}

/// What these annotations of a pod say of its capture. Never an error for those of a pod that was checked.
pub fn capture_policy(annotations: Option<&Annotations>) -> Checked<CapturePolicy> {
    let value = |name: &str| annotations.and_then(|all| all.get(name)).map(|value| value.trim());
    let named = |name: &'static str| {
        let value = value(name).filter(|value| !value.is_empty());
        value.map(|value| (name, value))
    };
    let down = value(WHEN_AGENT_IS_DOWN).map(|word| match word {
        "closed" => Ok(WhenAgentIsDown::Closed),
        "open" => Ok(WhenAgentIsDown::Open),
        _ => Err(wrong(WHEN_AGENT_IS_DOWN, format!("{word:?} is neither closed nor open"))),
    });
    let restricted = value(EGRESS).map(|word| match word {
        "restricted" => Ok(true),
        "unrestricted" => Ok(false),
        _ => Err(wrong(EGRESS, format!("{word:?} is neither restricted nor unrestricted"))),
    });
    let no_direct = value(DIRECT).map(|word| match word {
        "enabled" => Ok(false),
        "disabled" => Ok(true),
        _ => Err(wrong(DIRECT, format!("{word:?} is neither enabled nor disabled"))),
    });
    let policy = CapturePolicy {
        exclude_outbound: Exclusions {
            ports: named(EXCLUDE_OUTBOUND_PORTS).map_or(Ok(Vec::new()), ports)?,
            cidrs: named(EXCLUDE_OUTBOUND_CIDRS).map_or(Ok(Vec::new()), cidrs)?,
        },
        exclude_inbound: Exclusions {
            ports: named(EXCLUDE_INBOUND_PORTS).map_or(Ok(Vec::new()), ports)?,
            cidrs: named(EXCLUDE_INBOUND_CIDRS).map_or(Ok(Vec::new()), cidrs)?,
        },
        when_agent_is_down: down.transpose()?,
        restrict_egress: restricted.transpose()?.unwrap_or_default(),
        no_direct: no_direct.transpose()?.unwrap_or_default(),
        probes: Vec::new(),
    };
    if policy.exclude_inbound.ports.iter().any(|range| (range.first..=range.last).contains(&port::MESH)) {
        let message = format!("port {} is the mesh's own and cannot be excluded", port::MESH);
        return Err(wrong(EXCLUDE_INBOUND_PORTS, message));
    }
    Ok(policy)
}

/// A list as `80,443,9000-9010`, in order and without overlaps.
fn ports((name, value): (&str, &str)) -> Checked<Vec<PortRange>> {
    let one = |text: &str| {
        // Digits alone: `+80` is no port.
        let number = |text: &str| {
            text.parse::<u16>().ok().filter(|port| *port != 0 && text.bytes().all(|b| b.is_ascii_digit()))
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Some(PortRange { first: number(first)?, last: number(last)? });
        range.filter(|range| range.first <= range.last)
    };
    let mut ranges = Vec::new();
    for text in value.split(',').map(str::trim) {
        let message = || format!("{text:?} is not a port (1 to 65535) or a range of them, as in 9000-9010");
        ranges.push(one(text).ok_or_else(|| wrong(name, message()))?);
    }
    ranges.sort_unstable_by_key(|range| range.first);
    ranges.dedup_by(|next, range| {
        let touches = next.first <= range.last.saturating_add(1);
        if touches {
            range.last = range.last.max(next.last);
        }
        touches
    });
    at_most(EXCLUDED_PORTS_CAPACITY, "ranges of ports", name, &ranges)?;
    Ok(ranges)
}

/// A list as `10.0.0.0/8,2001:db8::/32`; an address is a subnet of its own.
fn cidrs((name, value): (&str, &str)) -> Checked<Vec<Subnet>> {
    let mut subnets = Vec::new();
    for text in value.split(',').map(str::trim) {
        let message = || format!("{text:?} is not a subnet, as in 10.0.0.0/8 or 2001:db8::/32");
        let subnet = Subnet::parse(text).ok_or_else(|| wrong(name, message()))?;
        if !subnets.contains(&subnet) {
            subnets.push(subnet);
        }
    }
    at_most(EXCLUDED_CIDRS_OF_A_POD, "subnets", name, &subnets)?;
    Ok(subnets)
}

fn at_most<T>(most: usize, what: &str, name: &str, list: &[T]) -> Checked<()> {
    if list.len() <= most {
        return Ok(());
    }
    Err(wrong(name, format!("{} {what}; the kernel's table of a pod holds {most}", list.len())))
}

fn wrong(annotation: &str, message: impl Display) -> FieldError {
    FieldError::new(format!("metadata.annotations.{annotation}"), message.to_string())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn policy(pairs: &[(&str, &str)]) -> Checked<CapturePolicy> {
        let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        capture_policy(Some(&pairs.collect()))
    }

    fn written<T: Display>(list: &[T]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_said_is_nothing_asked() {
        assert_eq!(capture_policy(None), Ok(CapturePolicy::default()));
        assert_eq!(policy(&[(EXCLUDE_INBOUND_PORTS, ""), ("other", "x")]), Ok(CapturePolicy::default()));
    }

    #[test]
    fn lists_are_read_sorted_and_merged() {
        let read = policy(&[
            (EXCLUDE_OUTBOUND_PORTS, "443, 80,9000-9010,9005-9020,81"),
            (EXCLUDE_OUTBOUND_CIDRS, "10.0.0.0/8, 2001:db8::/32,10.0.0.0/8"),
            (EXCLUDE_INBOUND_PORTS, "1-15007,15009-65535"),
            (EXCLUDE_INBOUND_CIDRS, "192.0.2.1"),
            (WHEN_AGENT_IS_DOWN, "open"),
        ]);
        let read = read.unwrap();
        assert_eq!(written(&read.exclude_outbound.ports), ["80-81", "443", "9000-9020"]);
        assert_eq!(written(&read.exclude_outbound.cidrs), ["10.0.0.0/8", "2001:db8::/32"]);
        assert_eq!(written(&read.exclude_inbound.ports), ["1-15007", "15009-65535"]);
        assert_eq!(written(&read.exclude_inbound.cidrs), ["192.0.2.1/32"]);
        assert_eq!(read.when_agent_is_down, Some(WhenAgentIsDown::Open));
        let closed = policy(&[(WHEN_AGENT_IS_DOWN, "closed")]).unwrap();
        assert_eq!(closed.when_agent_is_down, Some(WhenAgentIsDown::Closed));
        assert!(!closed.restrict_egress && policy(&[(EGRESS, "restricted")]).unwrap().restrict_egress);
        assert!(!policy(&[(EGRESS, "unrestricted")]).unwrap().restrict_egress);
        for (word, no_direct) in [("enabled", false), ("disabled", true)] {
            assert_eq!(policy(&[(DIRECT, word)]).unwrap().no_direct, no_direct);
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let many = |one: fn(usize) -> String, n| (0..n).map(one).collect::<Vec<_>>().join(",");
        let ports = many(|n| (1 + 2 * n).to_string(), EXCLUDED_PORTS_CAPACITY + 1);
        let cidrs = many(|n| format!("10.{}.{}.0/24", n / 256, n % 256), EXCLUDED_CIDRS_OF_A_POD + 1);
        let table = [
            (EXCLUDE_OUTBOUND_PORTS, "80,http", "\"http\""),
            (EXCLUDE_OUTBOUND_PORTS, "0", "\"0\""),
            (EGRESS, "none", "\"none\""),
            (EXCLUDE_OUTBOUND_PORTS, "65536", "\"65536\""),
            (EXCLUDE_OUTBOUND_PORTS, "9-8", "\"9-8\""),
            (EXCLUDE_OUTBOUND_PORTS, "80,,81", "\"\""),
            (EXCLUDE_OUTBOUND_PORTS, "+80", "\"+80\""),
            (EXCLUDE_INBOUND_PORTS, "80-", "\"80-\""),
            (EXCLUDE_INBOUND_PORTS, "15000-15010", "15008"),
            (EXCLUDE_INBOUND_PORTS, &ports, "65 ranges"),
            (EXCLUDE_OUTBOUND_CIDRS, "10.0.0.0/33", "\"10.0.0.0/33\""),
            (EXCLUDE_INBOUND_CIDRS, "example.com", "\"example.com\""),
            (EXCLUDE_INBOUND_CIDRS, &cidrs, "257 subnets"),
            (WHEN_AGENT_IS_DOWN, "Open", "\"Open\""),
            (WHEN_AGENT_IS_DOWN, "", "\"\""),
            (DIRECT, "false", "\"false\""),
        ];
        for (name, value, says) in table {
            let error = policy(&[(name, value)]).unwrap_err();
            assert_eq!(error.field, format!("metadata.annotations.{name}"), "{value}");
            assert!(error.message.contains(says), "{value}: {}", error.message);
        }
        assert!(
            policy(&[(EXCLUDE_OUTBOUND_PORTS, "15008")]).is_ok(),
            "only the pod's own port is the mesh's"
        );
    }
}
