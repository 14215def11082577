//! Whether what was counted is what was promised, for tests whose random numbers have a seed.

use std::collections::BTreeMap;

/// Critical values of the chi-square distribution at a confidence of 99.9 %, by degrees of freedom from 1 on (NIST/SEMATECH
/// e-Handbook of Statistical Methods, section 1.3.6.7.4).
const CRITICAL: [f64; 12] =
    [10.828, 13.816, 16.266, 18.467, 20.515, 22.458, 24.322, 26.125, 27.877, 29.588, 31.264, 32.910];

/// Fails where counts differ so much from these shares that it happens by chance once in a thousand times; and where
/// anything was counted that has no share.
pub(super) fn assert_shares<K: Ord + std::fmt::Debug>(
    what: &str,
    counts: &BTreeMap<K, usize>,
    shares: &[(K, f64)],
) {
    let total: usize = counts.values().sum();
    let whole: f64 = shares.iter().map(|(_, share)| share).sum();
    let chi_square: f64 = shares
        .iter()
        .map(|(key, share)| {
            let expected = total as f64 * share / whole;
            let found = counts.get(key).copied().unwrap_or(0) as f64;
            (found - expected).powi(2) / expected
        })
        .sum();
    let known: usize = shares.iter().filter_map(|(key, _)| counts.get(key)).sum();
    assert_eq!(known, total, "{what}: something without a share in {counts:?}");
    let critical = CRITICAL[shares.len() - 2];
    assert!(chi_square < critical, "{what}: chi-square {chi_square} of at most {critical}: {counts:?}");
}

#[test]
fn shares_that_are_kept_pass_and_others_do_not() {
    let fair = BTreeMap::from([("a", 1_010), ("b", 990)]);
    assert_shares("fair", &fair, &[("a", 1.0), ("b", 1.0)]);
    let unfair = BTreeMap::from([("a", 1_100), ("b", 900)]);
    assert!(
        std::panic::catch_unwind(|| assert_shares("unfair", &unfair, &[("a", 1.0), ("b", 1.0)])).is_err()
    );
    let strange = BTreeMap::from([("a", 1_010), ("b", 990), ("c", 1)]);
    assert!(
        std::panic::catch_unwind(|| assert_shares("strange", &strange, &[("a", 1.0), ("b", 1.0)])).is_err()
    );
}
