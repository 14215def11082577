//! System calls of a process, counted by the kernel.
//!
//! Promises: every system call of every thread that the process has when counting begins, and of those that they start, from
//! then on; the process is not slowed down enough to behave otherwise, as it would be under `strace`. Never: a kernel
//! probe; the tracepoint `raw_syscalls:sys_enter` is part of the kernel's interface. Tested in
//! `tests/cost_of_a_request.rs`.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::Pid,
};
use perf_event::{Builder, Counter, events::Tracepoint};

/// Where a machine has it mounted, as a rule.
const TRACEFS: &str = "/sys/kernel/tracing";
const EVENT: &str = "events/raw_syscalls/sys_enter/id";

/// Counts until it is dropped.
#[derive(Debug)]
pub struct SystemCalls(Vec<Counter>);

impl SystemCalls {
    /// Begins to count.
    pub fn of(process: i32) -> Result<Self> {
        let tracepoint = Tracepoint::with_id(event()?);
        let tasks = format!("/proc/{process}/task");
        let mut counters = Vec::new();
        for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
            let task: i32 = task?.file_name().to_string_lossy().parse()?;
            let mut builder = Builder::new(tracepoint);
            builder.observe_pid(Pid::from_raw(task).as_raw()).any_cpu().inherit(true).include_kernel();
            let counter =
                builder.build().with_context(|| format!("counting system calls of thread {task}"))?;
            counters.push(counter);
        }
        ensure!(!counters.is_empty(), "process {process} has no thread");
        for counter in &mut counters {
            counter.enable()?;
        }
        Ok(Self(counters))
    }

    /// How many there have been.
    pub fn count(&mut self) -> Result<u64> {
        self.0.iter_mut().map(|counter| Ok(counter.read()?)).sum()
    }
}

/// The kernel's number of the tracepoint.
fn event() -> Result<u64> {
    let read = |root: &Path| fs::read_to_string(root.join(EVENT));
    let text = if let Ok(text) = read(Path::new(TRACEFS)) {
        text
    } else {
        // Not mounted: for a moment, at a place of our own.
        let dir = tempfile::tempdir()?;
        mount(Some("tracefs"), dir.path(), Some("tracefs"), MsFlags::empty(), None::<&str>)
            .context("mounting tracefs")?;
        let text = read(dir.path());
        umount2(dir.path(), MntFlags::MNT_DETACH).context("unmounting tracefs")?;
        text.context("the kernel has no tracepoint raw_syscalls:sys_enter")?
    };
    text.trim().parse().with_context(|| format!("{text:?} is no number of a tracepoint"))
}
