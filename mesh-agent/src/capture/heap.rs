//! The agent's allocator, and what the process keeps though nobody uses it: freed memory, and pages of the program that were used
//! once, as to load the kernel programs.
//!
//! Promises to take nothing away that anybody has written: what is used again is there as before. Tested below, and in the lab
//! (`tests/tests/memory_of_idle_connections.rs`).

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What the agent allocates by. jemalloc keeps what a request takes at hand in each thread, pieces of some KiB as well, which
/// glibc's looks for anew each time.
pub use tikv_jemallocator::Jemalloc as Allocator;

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
            let _ = tokio::task::spawn_blocking(give_back_unused).await;
            // Who has asked meanwhile is owed another.
            if ASKED.compare_exchange(asked, 0, Relaxed, Relaxed).is_ok() {
                return;
            }
        }
    });
}

/// Gives back what nobody uses. Takes milliseconds.
fn give_back_unused() {
    give_back_free_memory();
    give_back_code();
}

/// Gives freed memory back to the system, whichever thread freed it: the allocator's, and that of libraries in C. Takes
/// milliseconds for each hundred MiB, and whoever allocates meanwhile may wait for them.
pub fn give_back_free_memory() {
    let (nothing, none) = (std::ptr::null_mut(), std::ptr::null_mut());
    // jemalloc(3): `arena.<i>.purge`, where 4096 stands for all of them (`MALLCTL_ARENAS_ALL`).
    let all = c"arena.4096.purge";
    #[expect(unsafe_code, reason = "no library in use offers it")]
    // SAFETY: the name ends in NUL, nothing is read from or written to the other pointers where they are null, and only memory
    // that nobody has allocated is touched, behind the allocator's own locks.
    let refused = unsafe { tikv_jemalloc_sys::mallctl(all.as_ptr(), none, std::ptr::null_mut(), nothing, 0) };
    if refused != 0 {
        tracing::debug!(refused, "the allocator keeps what was freed");
    }
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "no library in use offers it")]
    // SAFETY: it takes a number, touches only memory that nobody has allocated, and locks what it looks at.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Unmaps pages of the program and its libraries. The kernel maps sixteen around each that is used, and all of them count as
/// memory in use until then; they stay in the page cache, and what runs next is mapped again without being read. Where the kernel
/// does not say which those are, nothing happens.
fn give_back_code() {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for pages in unwritten(&smaps) {
        #[expect(unsafe_code, reason = "no library in use offers it")]
        // SAFETY: private pages of a file, which are not writable and of which none has been written: they are the file's, and
        // whoever reads one gets the same again. A range that is not mapped any more is an error, which changes nothing. Files
        // of a program that runs are not written to, but replaced.
        unsafe {
            nix::libc::madvise(pages.start as *mut _, pages.len(), nix::libc::MADV_DONTNEED);
        }
    }
}

/// Where files are mapped privately, not to be written, and no page differs from its file, neither in memory nor swapped out: by
/// relocation, or a debugger.
fn unwritten(smaps: &str) -> Vec<Range<usize>> {
    let (mut found, mut mapping) = (Vec::new(), None);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Anonymous:" | "Swap:"), Some("0")) => {}
            (Some("Anonymous:" | "Swap:"), _) => mapping = None,
            // The last line of each.
            (Some("VmFlags:"), _) => found.extend(mapping.take()),
            (Some(range), Some(may)) if !range.ends_with(':') => {
                let is_file = words.nth(2).is_some_and(|inode| inode != "0");
                let unwritable = may.starts_with("r-") && may.ends_with('p');
                mapping = addresses(range).filter(|_| is_file && unwritable);
            }
            _ => {}
        }
    }
    found
}

fn addresses(range: &str) -> Option<Range<usize>> {
    let (start, end) = range.split_once('-')?;
    let [start, end] = [start, end].map(|text| usize::from_str_radix(text, 16));
    Some(start.ok()?..end.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(range: &str, may: &str, inode: u32, anonymous: u32, swapped: u32) -> String {
        format!(
            "{range} {may} 00000000 fe:00 {inode} /bin/a program\nSize: 8 kB\nAnonymous:      {anonymous} kB\n\
             Swap:    {swapped} kB\nVmFlags: rd ex mr mw me\n"
        )
    }

    #[test]
    fn only_what_nobody_has_written_is_unmapped() {
        let smaps = [
            mapping("1000-3000", "r-xp", 7, 0, 0),
            mapping("3000-4000", "r--p", 7, 4, 0),
            mapping("4000-5000", "r--p", 7, 0, 4),
            mapping("5000-6000", "rw-p", 7, 0, 0),
            mapping("6000-7000", "r--s", 7, 0, 0),
            mapping("7000-8000", "r-xp", 0, 0, 0),
            mapping("8000-9000", "---p", 7, 0, 0),
            mapping("7f0000000000-7f0000001000", "r--p", 8, 0, 0),
        ];
        let found = unwritten(&smaps.concat());
        assert_eq!(found, [0x1000..0x3000, 0x7f00_0000_0000..0x7f00_0000_1000]);
        // What the kernel says of a mapping ends with its flags: without them something is not known.
        assert!(unwritten("1000-3000 r-xp 00000000 fe:00 7 /bin/a\nAnonymous: 0 kB\n").is_empty());
        assert!(unwritten("garbage\n\n:\n").is_empty());
    }

    #[test]
    fn what_was_freed_goes_back() {
        const PIECE: usize = 64 << 10;
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
            statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or_default()
        };
        let layout = std::alloc::Layout::new::<[u8; PIECE]>();
        let pieces: Vec<_> = (0..1000)
            .map(|_| {
                #[expect(unsafe_code, reason = "the tests' own allocator is another")]
                // SAFETY: the layout is of more than nothing, and each piece is as long as what is written.
                unsafe {
                    let piece = std::alloc::GlobalAlloc::alloc(&Allocator, layout);
                    assert!(!piece.is_null());
                    piece.write_bytes(1, PIECE);
                    piece
                }
            })
            .collect();
        for piece in pieces {
            #[expect(unsafe_code, reason = "the tests' own allocator is another")]
            // SAFETY: allocated there with this layout, and used by nobody.
            unsafe {
                std::alloc::GlobalAlloc::dealloc(&Allocator, piece, layout);
            }
        }
        let before = resident();
        give_back_free_memory();
        // Of what had become free, so many pages of 4 KiB: other tests allocate meanwhile.
        let (held, gone) = (1000 * PIECE / 4096, before.saturating_sub(resident()));
        assert!(gone > held / 2, "{gone} of {held} pages have gone");
    }

    #[test]
    fn what_is_unmapped_is_there_again_when_it_is_used() {
        let own = || std::fs::read_to_string("/proc/self/smaps").map(|smaps| unwritten(&smaps));
        assert!(own().is_ok_and(|found| !found.is_empty()));
        give_back_unused();
        // This very code was unmapped.
        assert!(own().is_ok_and(|found| !found.is_empty()));
    }
}
