//! Weights as places and aliases (Vose's method): one draw takes two numbers and two lookups, however many there are.

use mesh_common::maps::Slot;

/// The places for endpoints with these weights, in their order; endpoints are still to be filled in. Where all weights are
/// 0 they are equal.
pub(super) fn aliases(weights: &[u32]) -> Vec<Slot> {
    let count = weights.len() as u64;
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    let even = |place: usize| Slot { threshold: u32::MAX, alias: place as u32, ..Slot::default() };
    let mut slots: Vec<Slot> = (0..weights.len()).map(even).collect();
    if total == 0 {
        return slots;
    }
    // A share of `total` is one whole place.
    let mut shares: Vec<u64> = weights.iter().map(|weight| u64::from(*weight) * count).collect();
    let (mut less, mut more): (Vec<usize>, Vec<usize>) =
        (0..shares.len()).partition(|place| shares[*place] < total);
    while let (Some(small), Some(large)) = (less.pop(), more.pop()) {
        // What the small one leaves of its place is the large one's.
        let part = (u128::from(shares[small]) << 32) / u128::from(total);
        slots[small].threshold = u32::try_from(part.saturating_sub(1)).unwrap_or(u32::MAX);
        slots[small].alias = large as u32;
        shares[large] -= total - shares[small];
        if shares[large] < total { less.push(large) } else { more.push(large) }
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of them has of all that is drawn.
    fn shares(weights: &[u32]) -> Vec<f64> {
        let slots = aliases(weights);
        let mut shares = vec![0.0; slots.len()];
        for (place, slot) in slots.iter().enumerate() {
            let own = (f64::from(slot.threshold) + 1.0) / 2f64.powi(32);
            shares[place] += own / slots.len() as f64;
            shares[slot.alias as usize] += (1.0 - own) / slots.len() as f64;
        }
        shares
    }

    #[test]
    fn each_has_its_share() {
        for weights in [&[1][..], &[1, 1], &[1, 3], &[100, 1, 1], &[7, 0, 5, 9, 1], &[0, 0], &[u32::MAX, 1]] {
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (weight, share) in weights.iter().zip(shares(weights)) {
                let due = if total == 0.0 { 1.0 / weights.len() as f64 } else { f64::from(*weight) / total };
                assert!((share - due).abs() < 1e-6, "{weights:?}: {share} instead of {due}");
            }
        }
        assert!(aliases(&[]).is_empty());
    }
}
