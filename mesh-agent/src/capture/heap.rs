//! What the allocator keeps though nobody uses it: glibc's gives freed memory back only at the end of its heaps.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Longer than what has left may still be in use.
const SOON: Duration = Duration::from_secs(6);

/// Has what is freed within the next moments given back after them, once for all who ask until then: it holds up whoever
/// allocates meanwhile. To be called within a runtime.
pub fn give_back_soon() {
    /// How often it was asked for since nothing was left to do.
    static ASKED: AtomicU64 = AtomicU64::new(0);
    if ASKED.fetch_add(1, Relaxed) > 0 {
        return;
    }
    tokio::spawn(async {
        loop {
            let asked = ASKED.load(Relaxed);
            tokio::time::sleep(SOON).await;
            let _ = tokio::task::spawn_blocking(give_back_free_memory).await;
            // Who has asked meanwhile is owed another.
            if ASKED.compare_exchange(asked, 0, Relaxed, Relaxed).is_ok() {
                return;
            }
        }
    });
}

/// Gives freed memory back to the system, whichever thread freed it (`malloc_trim(3)`). Takes milliseconds for each
/// hundred MiB, and whoever allocates meanwhile may wait for them. Where the C library has nothing of the kind, nothing happens.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no library in use offers it")]
    // SAFETY: it takes a number, touches only memory that nobody has allocated, and locks what it looks at.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
