//! Durations as Istio's YAML writes them: `2s`, `0.5s`, `1m30s`, `100ms`.
//!
//! Never accepts a bare number: `5` of what? Tested by the table below.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

use super::field::{Checked, FieldError};
use crate::state::defaults;

/// A duration in Go's notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IstioDuration(pub Duration);

impl<'de> Deserialize<'de> for IstioDuration {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        parse(&text).map(Self).ok_or_else(|| {
            de::Error::custom(format!("{text:?} is not a duration; write it like 2s, 0.5s, 1m30s or 100ms"))
        })
    }
}

#[cfg(test)]
impl schemars::JsonSchema for IstioDuration {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "description": "A duration: 2s, 0.5s, 1m30s, 100ms."})
    }
}

impl IstioDuration {
    /// The duration, refused when it is shorter than [`defaults::DURATION`].
    pub fn at_least_a_millisecond(self, field: &str) -> Checked<Duration> {
        if self.0 < defaults::DURATION {
            return Err(FieldError::new(field, "duration must be greater than 1ms"));
        }
        Ok(self.0)
    }
}

/// Numbers with units, one after the other; `None` when it is anything else.
fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(unit_at);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, next) = tail.split_at(unit_end);
        sum = sum.checked_add(part(number, unit)?)?;
        rest = next;
    }
    (!text.is_empty()).then_some(sum)
}

/// One number with its unit, exact to the nanosecond.
fn part(number: &str, unit: &str) -> Option<Duration> {
    let nanos_per_unit: u128 = match unit {
        "h" => 3_600_000_000_000,
        "m" => 60_000_000_000,
        "s" => 1_000_000_000,
        "ms" => 1_000_000,
        "us" | "µs" => 1_000,
        "ns" => 1,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // Nine digits are nanoseconds of a second; more have no effect and could only overflow.
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 9 {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { u128::from(whole.parse::<u64>().ok()?) };
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let nanos = whole.checked_mul(nanos_per_unit)?.checked_add(fraction * nanos_per_unit / scale)?;
    Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let table = [
            ("2s", Some(2_000)),
            ("0.5s", Some(500)),
            (".5s", Some(500)),
            ("1m30s", Some(90_000)),
            ("100ms", Some(100)),
            ("1h0m0.25s", Some(3_600_250)),
            ("0s", Some(0)),
            ("0", Some(0)),
            ("", None),
            ("5", None),
            ("s", None),
            ("1.2.3s", None),
            ("-1s", None),
            ("2 s", None),
            ("2sec", None),
            ("99999999999999999999h", None),
            ("18446744073709551615h", None),
        ];
        for (text, millis) in table {
            assert_eq!(parse(text), millis.map(Duration::from_millis), "{text:?}");
        }
        assert_eq!(parse("1us"), Some(Duration::from_micros(1)));
    }
}
