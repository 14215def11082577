//! Near its memory limit the agent refuses new work: first of the pods that hold most, at last of everybody.
//!
//! Promises: what is open goes on; a pod that holds little is served for as long as others hold more; asking costs one
//! relaxed atomic read where nothing is refused. Never closes what anybody uses. How much memory there is is told in
//! `memory.rs`, who is refused in `share.rs` (pure). Tested below with a paused clock and made-up figures, and in the lab
//! (`tests/tests/overload.rs`).

mod memory;
mod share;

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};

pub use self::{
    memory::Memory,
    share::{ANY, Level, Marks},
};
use crate::error::{Error, Kind, Result};

/// How often memory is looked at while it is far from its limit.
const EVERY: Duration = Duration::from_millis(50);

/// How often near it: a flood fills what is left in less than a second.
const EVERY_NEAR: Duration = Duration::from_millis(10);

/// How often what is free is given back at most: that takes milliseconds.
const RELIEF_EVERY: Duration = Duration::from_millis(500);

/// Whether the agent refuses new work, and whose. Read by every connection and request, written by [`watch`].
#[derive(Debug)]
pub struct Overload {
    /// Pods that hold so much are refused.
    share: AtomicU64,
    level: AtomicU8,
    used: AtomicU64,
    promised: AtomicU64,
    limit: Option<u64>,
}

impl Overload {
    /// Nothing is refused yet. `limit`: for those who ask.
    pub const fn new(limit: Option<u64>) -> Self {
        let [used, promised] = [AtomicU64::new(0), AtomicU64::new(0)];
        Self { share: AtomicU64::new(ANY), level: AtomicU8::new(0), used, promised, limit }
    }

    /// Whether new work is refused of a pod that holds so much; that is only asked under pressure.
    pub fn sheds(&self, held: impl FnOnce() -> u64) -> bool {
        let share = self.share.load(Relaxed);
        share != ANY && held() >= share
    }

    /// The same, as the refusal.
    ///
    /// # Errors
    /// [`Kind::Overload`], where it is refused.
    pub fn admit(&self, held: impl FnOnce() -> u64) -> Result<()> {
        if self.sheds(held) { Err(self.refusal()) } else { Ok(()) }
    }

    #[cold]
    fn refusal(&self) -> Error {
        let text = match self.level() {
            Level::Critical => "the agent has hardly any memory left",
            Level::None | Level::High => {
                "the agent is near its memory limit, and the pod holds its share of it or more"
            }
        };
        Error::new(Kind::Overload, text)
    }

    /// How near the limit is.
    pub fn level(&self) -> Level {
        self.level.load(Relaxed).into()
    }

    /// Bytes in use when they were last looked at; 0 before that and where there is no limit.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Bytes that were not in use then, but are to be expected of what was under way.
    pub fn promised(&self) -> u64 {
        self.promised.load(Relaxed)
    }

    /// Bytes that may be used.
    pub const fn limit(&self) -> Option<u64> {
        self.limit
    }
}

/// What pods hold of the agent.
#[derive(Debug, Clone, Default)]
pub struct Pods {
    /// Each of them, in a unit in which they can be compared.
    pub held: Vec<u64>,
    /// Bytes that are not in use yet, but will be by what all of them have under way.
    pub promised: u64,
}

/// What [`watch`] sees and does.
pub struct Senses {
    /// Bytes in use.
    pub used: Box<dyn FnMut() -> io::Result<u64> + Send>,
    /// What pods hold.
    pub pods: Box<dyn FnMut() -> Pods + Send>,
    /// Gives back what is free, and what is idle of pods that hold so much. Takes its time.
    pub relieve: Box<dyn FnMut(u64) + Send>,
    /// Told after every look.
    pub tell: Box<dyn FnMut(&Overload) + Send>,
}

impl fmt::Debug for Senses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Senses").finish_non_exhaustive()
    }
}

/// Keeps `overload` true, for ever.
pub async fn watch(overload: Arc<Overload>, marks: Marks, mut senses: Senses) {
    let mut relieved: Option<Instant> = None;
    let mut failing = false;
    loop {
        match look(&overload, &marks, &mut senses, &mut relieved) {
            Ok(()) => failing = false,
            // What was decided last stands.
            Err(error) if !failing => {
                tracing::error!(%error, "memory in use cannot be read: shedding stays as it is");
                failing = true;
            }
            Err(_) => {}
        }
        sleep(if marks.is_near(overload.used() + overload.promised()) { EVERY_NEAR } else { EVERY }).await;
    }
}

fn look(
    overload: &Overload,
    marks: &Marks,
    senses: &mut Senses,
    relieved: &mut Option<Instant>,
) -> io::Result<()> {
    let before = overload.level();
    let (mut used, mut pods) = ((senses.used)()?, (senses.pods)());
    let mut level = marks.level(before, used, pods.promised);
    let may_relieve = relieved.is_none_or(|at| at.elapsed() >= RELIEF_EVERY);
    if level > Level::None && may_relieve {
        // Freed memory that the allocator keeps is nobody's fault: before anybody is refused, it goes back.
        (senses.relieve)(share::share(level, &pods.held));
        *relieved = Some(Instant::now());
        (used, pods) = ((senses.used)()?, (senses.pods)());
        level = marks.level(before, used, pods.promised);
    }
    let share = share::share(level, &pods.held);
    overload.used.store(used, Relaxed);
    overload.promised.store(pods.promised, Relaxed);
    overload.level.store(level as u8, Relaxed);
    overload.share.store(share, Relaxed);
    (senses.tell)(overload);
    if level != before {
        log(overload, before, level, &pods);
    }
    Ok(())
}

/// With what pods hold in all, and the one that holds most.
fn log(overload: &Overload, before: Level, level: Level, pods: &Pods) {
    let (used, limit) = (overload.used(), overload.limit.unwrap_or_default());
    let Pods { held, promised } = pods;
    let (all, most) = (held.iter().sum::<u64>(), held.iter().max().copied().unwrap_or_default());
    let (was, now) = (before.word(), level.word());
    let text = match level {
        Level::None => "memory pressure is over: all is served",
        Level::High => "near the memory limit: new work of the pods that hold most is refused",
        Level::Critical => "at the memory limit: all new work is refused",
    };
    if level == Level::None {
        tracing::info!(was, now, used, limit, promised, all, most, "{text}");
    } else {
        tracing::warn!(was, now, used, limit, promised, all, most, "{text}");
    }
}

#[cfg(test)]
mod tests;
