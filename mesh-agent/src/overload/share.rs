//! What is refused at which use of memory: how near the limit is (a level), and how much a pod may hold then (its share).
//!
//! Pure. Tested by the tables below.

/// How near the agent is to its memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Level {
    /// Far enough: nothing is refused.
    #[default]
    None = 0,
    /// Pods that hold their share or more are refused what is new.
    High = 1,
    /// Everybody is refused what is new.
    Critical = 2,
}

impl Level {
    /// The word in the log and in `meshctl status`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

impl From<u8> for Level {
    fn from(number: u8) -> Self {
        match number {
            0 => Self::None,
            1 => Self::High,
            _ => Self::Critical,
        }
    }
}

/// A level is left only once the use is so far below its mark, in percent of the limit: it does not flap.
const SLACK: u64 = 5;

/// From which use on which level holds, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    high: u64,
    critical: u64,
    slack: u64,
}

impl Marks {
    /// `high` and `critical` are percentages of `limit`.
    pub const fn new(limit: u64, high: u8, critical: u8) -> Self {
        let percent = limit / 100;
        Self { high: percent * high as u64, critical: percent * critical as u64, slack: percent * SLACK }
    }

    /// The level at this use, after `before`. `promised`: what will come to be used on top by what is under way; on that
    /// account only those who hold most are refused anything.
    pub fn level(&self, before: Level, used: u64, promised: u64) -> Level {
        let at = |bytes: u64, mark: u64, holds: bool| {
            bytes >= if holds { mark.saturating_sub(self.slack) } else { mark }
        };
        if at(used, self.critical, before >= Level::Critical) {
            Level::Critical
        } else if at(used.saturating_add(promised), self.high, before >= Level::High) {
            Level::High
        } else {
            Level::None
        }
    }

    /// Whether the use is so near to the first mark, or over it, that it is to be looked at often.
    pub const fn is_near(&self, used: u64) -> bool {
        used >= self.high.saturating_sub(2 * self.slack)
    }
}

/// Who holds less is refused nothing at [`Level::High`], however little others hold: an agent has room for so many.
const LEAST: u64 = 32;

/// Every pod may hold what it likes.
pub const ANY: u64 = u64::MAX;

/// How much a pod may hold at this level: one that holds so much or more is refused what is new. `held`: what each pod
/// holds now.
///
/// It is the fair share (max-min) of three quarters of what all hold: if every pod above it came down to it, a quarter
/// would be free. The pods that hold most go first, and nobody is refused who holds less than three quarters of the mean,
/// whatever others hold.
pub fn share(level: Level, held: &[u64]) -> u64 {
    match level {
        Level::None => ANY,
        Level::Critical => 0,
        Level::High => fair_share(held).max(LEAST),
    }
}

fn fair_share(held: &[u64]) -> u64 {
    let mut held: Vec<u64> = held.iter().copied().filter(|held| *held > 0).collect();
    held.sort_unstable();
    let total: u64 = held.iter().fold(0, |total, held| total.saturating_add(*held));
    let mut left = total - total / 4;
    for (n, one) in held.iter().enumerate() {
        let share = left / (held.len() - n) as u64;
        if *one > share {
            return share;
        }
        left -= one;
    }
    ANY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_reached_at_its_mark_and_left_below_it() {
        use Level::{Critical, High, None};
        let marks = Marks::new(1000, 85, 95);
        for (before, used, after) in [
            (None, 0, None),
            (None, 849, None),
            (None, 850, High),
            (None, 949, High),
            (None, 950, Critical),
            (None, 5000, Critical),
            (High, 849, High),
            (High, 800, High),
            (High, 799, None),
            (High, 949, High),
            (High, 950, Critical),
            (Critical, 949, Critical),
            (Critical, 900, Critical),
            (Critical, 899, High),
            (Critical, 800, High),
            (Critical, 799, None),
        ] {
            assert_eq!(marks.level(before, used, 0), after, "{before:?} at {used}");
        }
        // What is only promised is refused to the greedy, never to all.
        for (used, promised, after) in
            [(400, 449, None), (400, 450, High), (400, 9000, High), (949, 9000, High)]
        {
            assert_eq!(marks.level(None, used, promised), after, "{used} and {promised}");
        }
        assert!(!marks.is_near(749) && marks.is_near(750));
    }

    #[test]
    fn the_greedy_are_refused_and_the_modest_are_not() {
        // What each pod holds, and which of them are refused, in order of their appearance.
        let table: &[(&[u64], &[bool])] = &[
            (&[], &[]),
            (&[0, 0], &[false, false]),
            (&[31], &[false]),
            (&[1000], &[true]),
            // What little there is is not theirs to give back.
            (&[5, 3, 1], &[false, false, false]),
            (&[1000, 3], &[true, false]),
            (&[3, 1000, 0], &[false, true, false]),
            // All alike: nobody is less to blame.
            (&[100, 100, 100], &[true, true, true]),
            // The one that holds most comes down first.
            (&[10_000, 5_000], &[true, false]),
            (&[10_000, 9_000], &[true, true]),
            // Many small ones beside a large one.
            (&[3000, 50, 50, 50, 50, 50, 50, 100], &[true, false, false, false, false, false, false, false]),
            (&[u64::MAX, u64::MAX], &[true, true]),
        ];
        for (held, refused) in table {
            let share = share(Level::High, held);
            let now: Vec<bool> = held.iter().map(|held| *held >= share).collect();
            assert_eq!(now, *refused, "{held:?}: {share}");
        }
    }

    #[test]
    fn levels_decide_who_is_asked_at_all() {
        assert_eq!(share(Level::None, &[1000, 1]), ANY);
        assert_eq!(share(Level::Critical, &[1000, 1]), 0);
        assert_eq!([0, 1, 2].map(|number| Level::from(number) as u8), [0, 1, 2]);
    }

    #[test]
    fn whoever_holds_less_than_three_quarters_of_the_mean_is_never_refused() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let held: Vec<u64> = (0..random.usize(1..40)).map(|_| random.u64(1..10_000)).collect();
            let mean = held.iter().sum::<u64>() / held.len() as u64;
            let share = share(Level::High, &held);
            assert!(share >= mean * 3 / 4, "{held:?}: {share}, mean {mean}");
            let all_small = held.iter().all(|held| *held < LEAST);
            assert!(all_small || held.iter().any(|held| *held >= share), "nobody is refused: {held:?}");
        }
    }
}
