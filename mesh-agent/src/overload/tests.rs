//! The watcher, with a paused clock and made-up figures.

use std::sync::{Mutex, PoisonError};

use super::*;

/// What the watcher is shown, and what it did.
#[derive(Debug, Default)]
struct World {
    used: AtomicU64,
    /// What the allocator keeps though nobody uses it.
    kept: AtomicU64,
    held: Mutex<Vec<u64>>,
    promised: AtomicU64,
    reliefs: Mutex<Vec<u64>>,
    looks: AtomicU64,
    broken: std::sync::atomic::AtomicBool,
}

impl World {
    fn held(&self) -> Vec<u64> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn reliefs(&self) -> Vec<u64> {
        self.reliefs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn senses(self: &Arc<Self>) -> Senses {
        let [used, held, relieve, tell] = [(); 4].map(|()| Arc::clone(self));
        Senses {
            used: Box::new(move || {
                if used.broken.load(Relaxed) {
                    return Err(io::Error::other("no such file"));
                }
                Ok(used.used.load(Relaxed) + used.kept.load(Relaxed))
            }),
            pods: Box::new(move || Pods { held: held.held(), promised: held.promised.load(Relaxed) }),
            relieve: Box::new(move |share| {
                relieve.kept.store(0, Relaxed);
                relieve.reliefs.lock().unwrap_or_else(PoisonError::into_inner).push(share);
            }),
            tell: Box::new(move |_| {
                tell.looks.fetch_add(1, Relaxed);
            }),
        }
    }

    /// Watched, with a limit of 1000 bytes and these pods.
    fn start(held: &[u64]) -> (Arc<Self>, Arc<Overload>) {
        let world = Arc::new(Self { held: Mutex::new(held.to_vec()), ..Self::default() });
        let overload = Arc::new(Overload::new(Some(1000)));
        tokio::spawn(watch(Arc::clone(&overload), Marks::new(1000, 85, 95), world.senses()));
        (world, overload)
    }

    async fn uses(&self, bytes: u64) {
        self.used.store(bytes, Relaxed);
        sleep(EVERY + Duration::from_millis(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_greedy_pod_is_refused_then_everybody_then_nobody() {
    let (world, overload) = World::start(&[900, 10]);
    let refused = |held: u64| overload.admit(|| held).err().map(|error| error.kind);
    world.uses(500).await;
    assert_eq!((overload.level(), overload.used()), (Level::None, 500));
    assert_eq!((refused(900), refused(10)), (None, None));
    world.uses(900).await;
    assert_eq!(overload.level(), Level::High);
    assert_eq!((refused(900), refused(10), refused(0)), (Some(Kind::Overload), None, None));
    world.uses(960).await;
    assert_eq!(overload.level(), Level::Critical);
    assert_eq!((refused(900), refused(10), refused(0)), ([Some(Kind::Overload); 3]).into());
    // Neither mark is left at once.
    world.uses(910).await;
    assert_eq!(overload.level(), Level::Critical);
    world.uses(880).await;
    assert_eq!((overload.level(), refused(10)), (Level::High, None));
    world.uses(810).await;
    assert_eq!((overload.level(), refused(900)), (Level::High, Some(Kind::Overload)));
    world.uses(790).await;
    assert_eq!((overload.level(), refused(900)), (Level::None, None));
}

#[tokio::test(start_paused = true)]
async fn what_the_allocator_keeps_goes_back_before_anybody_is_refused() {
    let (world, overload) = World::start(&[900, 10]);
    world.kept.store(400, Relaxed);
    world.uses(500).await;
    assert_eq!((overload.level(), overload.used()), (Level::None, 500));
    assert_eq!(world.reliefs().len(), 1);
    // Under pressure it goes back again and again, and the greedy pod's idle connections with it; not at every look.
    world.uses(900).await;
    sleep(RELIEF_EVERY * 4).await;
    let reliefs = world.reliefs();
    assert!((4..=6).contains(&reliefs.len()), "{reliefs:?}");
    assert!(reliefs.iter().all(|share| (11..=900).contains(share)), "{reliefs:?}");
}

#[tokio::test(start_paused = true)]
async fn it_looks_more_often_near_the_limit() {
    let (world, _overload) = World::start(&[1]);
    let looks = async || {
        let before = world.looks.load(Relaxed);
        sleep(Duration::from_secs(1)).await;
        world.looks.load(Relaxed) - before
    };
    world.uses(100).await;
    assert_eq!(looks().await, 20);
    world.uses(800).await;
    assert_eq!(looks().await, 100);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_changes_nothing() {
    let (world, overload) = World::start(&[900, 10]);
    world.uses(900).await;
    world.broken.store(true, Relaxed);
    world.uses(100).await;
    assert_eq!((overload.level(), overload.used()), (Level::High, 900));
    world.broken.store(false, Relaxed);
    world.uses(100).await;
    assert_eq!(overload.level(), Level::None);
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_on_counts_before_it_comes() {
    let (world, overload) = World::start(&[900, 10]);
    world.promised.store(500, Relaxed);
    world.uses(400).await;
    assert_eq!((overload.level(), overload.used()), (Level::High, 400));
    assert!(overload.sheds(|| 900) && !overload.sheds(|| 10));
    world.promised.store(0, Relaxed);
    world.uses(400).await;
    assert_eq!(overload.level(), Level::None);
}
