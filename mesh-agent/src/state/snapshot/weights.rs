//! Choosing by weight: at random in constant time (Walker's alias method), and in turns in logarithmic time.
//!
//! Promises that in as many turns as the weights come to, each has exactly its weight, spread evenly. Built once, with the
//! snapshot. Tested below, and by chi-square in `balance/distribution.rs`.

/// Tables for weights that differ.
#[derive(Debug)]
pub struct Weights {
    /// Of each place: up to which number it is itself, and who it is beyond.
    slots: Box<[(u32, u32)]>,
    /// The sum of the weights up to and with each place.
    ends: Box<[u64]>,
    /// How far the next turn is from the last; has no factor in common with the sum.
    stride: u64,
}

impl Weights {
    /// `None` where all weights are the same, or there is none: then no table is needed.
    pub fn new(weights: &[u32]) -> Option<Self> {
        let (first, rest) = weights.split_first()?;
        if rest.iter().all(|weight| weight == first) {
            return None;
        }
        let mut sum = 0;
        let ends: Box<[u64]> = weights
            .iter()
            .map(|weight| {
                sum += u64::from(*weight);
                sum
            })
            .collect();
        Some(Self { slots: slots(weights, sum), stride: stride(sum), ends })
    }

    /// The place that this random number stands for.
    pub fn draw(&self, random: u64) -> usize {
        let (high, low) = ((random >> 32) as u32, random as u32);
        let place = ((u64::from(high) * self.slots.len() as u64) >> 32) as usize;
        let (own, other) = self.slots[place];
        if low <= own { place } else { other as usize }
    }

    /// The place whose turn it is.
    pub fn turn(&self, turn: u64) -> usize {
        let sum = self.ends.last().copied().unwrap_or(1).max(1);
        let at = (u128::from(turn % sum) * u128::from(self.stride) % u128::from(sum)) as u64;
        self.ends.partition_point(|end| *end <= at)
    }
}

/// Vose's way to make the table: who has less than the mean is filled up by one who has more.
fn slots(weights: &[u32], sum: u64) -> Box<[(u32, u32)]> {
    let count = weights.len() as u64;
    // In parts of the mean.
    let mut left: Vec<u128> = weights.iter().map(|weight| u128::from(*weight) * u128::from(count)).collect();
    let mean = u128::from(sum);
    let mut slots: Vec<(u32, u32)> = (0..weights.len() as u32).map(|place| (u32::MAX, place)).collect();
    let (mut small, mut large): (Vec<u32>, Vec<u32>) =
        (0..weights.len() as u32).partition(|place| left[*place as usize] < mean);
    while let (Some(less), Some(more)) = (small.last().copied(), large.last().copied()) {
        small.pop();
        let has = left[less as usize];
        slots[less as usize] = (((has << 32) / mean).saturating_sub(1) as u32, more);
        left[more as usize] -= mean - has;
        if left[more as usize] < mean {
            large.pop();
            small.push(more);
        }
    }
    slots.into_boxed_slice()
}

/// About the golden section of the sum, so that turns of one place are far from one another.
fn stride(sum: u64) -> u64 {
    let about = ((sum as f64) * 0.618_033_988_75) as u64;
    // A prime is never far.
    (about.max(1)..sum.max(2)).find(|stride| common_factor(*stride, sum) == 1).unwrap_or(1)
}

fn common_factor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn equal_weights_need_no_table() {
        assert!(
            Weights::new(&[]).is_none() && Weights::new(&[7]).is_none() && Weights::new(&[3, 3]).is_none()
        );
    }

    #[test]
    fn in_a_round_of_turns_each_has_its_weight() {
        for weights in [vec![1, 2], vec![5, 1, 1], vec![100, 1, 7, 30], vec![1, 10_000]] {
            let table = Weights::new(&weights).unwrap();
            let sum: u32 = weights.iter().sum();
            let mut counts = vec![0_u32; weights.len()];
            for turn in 0..u64::from(sum) {
                counts[table.turn(turn + 1_000_003)] += 1;
            }
            assert_eq!(counts, weights);
        }
        // Even within a round: five of seven never come more than four in a row, the end of a round and the next one's begin.
        let table = Weights::new(&[5, 1, 1]).unwrap();
        let turns: Vec<usize> = (0..700).map(|turn| table.turn(turn)).collect();
        assert!(turns.windows(5).all(|five| five.iter().any(|place| *place != 0)), "{:?}", &turns[..14]);
    }

    #[test]
    fn the_whole_range_of_numbers_has_the_shares_of_the_weights() {
        let weights = [1_u32, 2, 3, 10, 84];
        let table = Weights::new(&weights).unwrap();
        let mut counts = [0_u32; 5];
        let steps = 2_000_u64;
        for high in 0..steps {
            for low in 0..steps {
                counts[table.draw((((high << 32) / steps) << 32) | ((low << 32) / steps))] += 1;
            }
        }
        for (count, weight) in counts.iter().zip(weights) {
            let share = f64::from(*count) / (steps * steps) as f64;
            assert!((share - f64::from(weight) / 100.0).abs() < 0.002, "{counts:?}");
        }
    }
}
