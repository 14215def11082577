//! `mirror`, `mirrors` and what says how often: who gets a copy of the request.
//!
//! Tested in `tests.rs` beside it.

use serde::Deserialize;

use super::{
    RuleMirror,
    action::WireTarget,
    fault::{WirePercentage, share},
};
use crate::state::{
    defaults,
    resource::field::{Checked, FieldError, item, under},
    snapshot::Percentage,
};

/// One entry of `mirrors`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireMirror {
    destination: Option<WireTarget>,
    percentage: Option<WirePercentage>,
}

/// All that a rule says about mirrors.
#[derive(Debug)]
pub struct Wire {
    /// `mirror`.
    pub mirror: Option<WireTarget>,
    /// `mirrorPercentage`.
    pub percentage: Option<WirePercentage>,
    /// `mirrorPercent`, the older form of it.
    pub percent: Option<u32>,
    /// `mirrors`.
    pub mirrors: Option<Vec<WireMirror>>,
}

impl Wire {
    /// The mirrors; `None` when nothing is said, which a delegate takes from its root. Those that get nothing are left
    /// out.
    pub fn check(self) -> Checked<Option<Vec<RuleMirror>>> {
        let single = percentage(self.percentage, self.percent)?;
        let mut mirrors = Vec::new();
        let said = self.mirror.is_some() || self.mirrors.as_ref().is_some_and(|mirrors| !mirrors.is_empty());
        if let Some(target) = self.mirror {
            let target = target.check().map_err(under("mirror"))?;
            mirrors.push(RuleMirror { field: "mirror".to_owned(), target, percentage: single });
        }
        for (i, wire) in self.mirrors.unwrap_or_default().into_iter().enumerate() {
            mirrors.push(wire.check(i).map_err(item("mirrors", i))?);
        }
        mirrors.retain(|mirror| mirror.percentage > Percentage(0));
        Ok(said.then_some(mirrors))
    }
}

impl WireMirror {
    fn check(self, index: usize) -> Checked<RuleMirror> {
        let target =
            self.destination.ok_or_else(|| FieldError::new("destination", "destination is required"))?;
        let share = self.percentage.map(|share| share.check("percentage")).transpose()?;
        Ok(RuleMirror {
            field: format!("mirrors[{index}].destination"),
            target: target.check().map_err(under("destination"))?,
            percentage: share.unwrap_or(defaults::MIRROR_PERCENTAGE),
        })
    }
}

/// The newer form wins where both are written.
fn percentage(newer: Option<WirePercentage>, older: Option<u32>) -> Checked<Percentage> {
    let older = match older {
        Some(percent) if percent > 100 => {
            let message = format!("mirror_percent must have a max value of 100 (it has {percent})");
            return Err(FieldError::new("mirrorPercent", message));
        }
        Some(percent) => Some(share(f64::from(percent))?),
        None => None,
    };
    let newer = newer.map(|percentage| percentage.check("mirrorPercentage")).transpose()?;
    Ok(newer.or(older).unwrap_or(defaults::MIRROR_PERCENTAGE))
}
