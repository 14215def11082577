//! What the allocator keeps though nobody uses it: glibc's gives freed memory back only at the end of its heaps.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

/// What leaves together gives back together.
const SOON: Duration = Duration::from_secs(1);

/// Has what was freed by now given back a moment later, once for all who ask until then: it holds up whoever allocates
/// meanwhile. To be called within a runtime.
pub fn give_back_soon() {
    static ASKED: AtomicBool = AtomicBool::new(false);
    if ASKED.swap(true, Relaxed) {
        return;
    }
    tokio::spawn(async {
        tokio::time::sleep(SOON).await;
        ASKED.store(false, Relaxed);
        let _ = tokio::task::spawn_blocking(give_back_free_memory).await;
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
