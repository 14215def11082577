//! Processes of pods and agents.
//!
//! Promises: a process starts inside the network namespace and the cgroup it belongs to (it never runs outside of
//! them), its output is kept in files, and it is ended by its own pid and reaped. It lives until it ends, is stopped,
//! or the lab goes. Never: signals a pid that has been reaped. Tested in `tests/lab.rs`.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, SysconfVar, sysconf},
};
use tokio::sync::watch;

/// How long after SIGKILL a process may take to be gone.
const AFTER_KILL: Duration = Duration::from_secs(5);
/// How much of a process's output a failure message quotes.
const TAIL_LINES: usize = 15;

/// Where a process runs and where its output goes.
#[derive(Debug)]
pub struct Place<'a> {
    /// The network namespace it enters.
    pub netns: &'a Path,
    /// The cgroup it enters.
    pub cgroup: &'a Path,
    /// Its output goes to `OUTPUT.out` and `OUTPUT.err`.
    pub output: PathBuf,
    /// How failure messages call it.
    pub label: String,
}

/// A process of a pod or an agent. Clones are the same process.
#[derive(Debug, Clone)]
pub struct Process(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    label: String,
    pid: Pid,
    output: PathBuf,
    /// `Some` once reaped. Signals are sent under this lock, so that none reaches a pid that has been reaped.
    status: Mutex<Option<ExitStatus>>,
    reaped: Condvar,
    ended: watch::Sender<Option<ExitStatus>>,
}

impl Process {
    /// Starts `command` at `place`. The caller's standard input is not handed on.
    pub fn spawn(mut command: Command, place: Place<'_>) -> Result<Self> {
        let netns = File::open(place.netns)
            .with_context(|| format!("opening the network namespace {}", place.netns.display()))?;
        let procs = place.cgroup.join("cgroup.procs");
        let cgroup = OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("opening {}", procs.display()))?;
        let log = |end: &str| {
            let path = with_end(&place.output, end);
            File::create(&path).with_context(|| format!("creating {}", path.display()))
        };
        // A group of its own: an interrupt at the terminal goes to the test, which ends its processes in order.
        command.process_group(0).stdin(Stdio::null()).stdout(log(".out")?).stderr(log(".err")?);
        enter_before_exec(&mut command, netns, cgroup);
        let program = command.get_program().to_owned();
        let child =
            command.spawn().with_context(|| format!("starting {} for {}", program.display(), place.label))?;
        Ok(Self::watch(child, place.label, place.output))
    }

    fn watch(child: Child, label: String, output: PathBuf) -> Self {
        let pid = Pid::from_raw(child.id().cast_signed());
        let (ended, _) = watch::channel(None);
        let inner =
            Arc::new(Inner { label, pid, output, status: Mutex::new(None), reaped: Condvar::new(), ended });
        let waiter = Arc::clone(&inner);
        std::thread::spawn(move || waiter.reap(child));
        Self(inner)
    }

    /// Its pid. Only ever that of this process while [`Process::status`] is `None`.
    pub fn pid(&self) -> i32 {
        self.0.pid.as_raw()
    }

    /// How failure messages call it.
    pub fn label(&self) -> &str {
        &self.0.label
    }

    /// How it ended, if it did.
    pub fn status(&self) -> Option<ExitStatus> {
        *self.0.lock()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        read_lossy(&with_end(&self.0.output, ".out"))
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&with_end(&self.0.output, ".err"))
    }

    /// The memory it holds now.
    pub fn rss_bytes(&self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// The most memory it ever held.
    pub fn peak_rss_bytes(&self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> Result<u64> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(1024 * kibibytes.with_context(|| format!("{} has no {field}", self.0.label))?)
    }

    /// The processor time of all its threads so far, its own and the kernel's on its behalf.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = self.proc("stat")?;
        // The name, in parentheses, may hold anything; the state follows it.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks = ticks.sum::<Result<u64, _>>().context("reading the times of a process")?;
        let a_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel's clock has no ticks")?;
        Ok(Duration::from_secs_f64(ticks as f64 / a_second as f64))
    }

    fn proc(&self, file: &str) -> Result<String> {
        // Under the lock nobody reaps it: the pid is this process's.
        let status = self.0.lock();
        ensure!(status.is_none(), "{} has ended", self.0.label);
        let path = format!("/proc/{}/{file}", self.0.pid);
        std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    }

    /// The last lines of both outputs, for failure messages.
    pub fn tail(&self) -> String {
        let mut text = String::new();
        for (name, content) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
            let lines: Vec<&str> = content.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text.extend(["  ", self.0.label.as_str(), " ", name, ": ", line, "\n"]);
            }
        }
        text
    }

    /// Sends a signal; nothing happens if the process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let status = self.0.lock();
        if status.is_none() {
            kill(self.0.pid, signal).with_context(|| format!("sending {signal} to {}", self.0.label))?;
        }
        Ok(())
    }

    /// Waits for it to end by itself.
    pub async fn wait(&self, limit: Duration) -> Result<ExitStatus> {
        let mut ended = self.0.ended.subscribe();
        let waited = tokio::time::timeout(limit, ended.wait_for(Option::is_some)).await;
        match waited {
            Ok(Ok(status)) => (*status).ok_or_else(|| anyhow!("{} has no status", self.0.label)),
            Ok(Err(_)) => bail!("nobody waits for {} any more", self.0.label),
            Err(_) => bail!("{} is still running after {limit:?}\n{}", self.0.label, self.tail()),
        }
    }

    /// Ends it: SIGTERM, after `grace` SIGKILL. Says how it ended.
    pub async fn stop(&self, grace: Duration) -> Result<ExitStatus> {
        let process = self.clone();
        tokio::task::spawn_blocking(move || process.stop_blocking(grace)).await?
    }

    /// As [`Process::stop`], for where nothing can be awaited.
    pub fn stop_blocking(&self, grace: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        if let Some(status) = self.0.wait_reaped(grace) {
            return Ok(status);
        }
        self.signal(Signal::SIGKILL)?;
        self.0
            .wait_reaped(AFTER_KILL)
            .ok_or_else(|| anyhow!("{} (pid {}) outlives SIGKILL", self.0.label, self.pid()))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self, mut child: Child) {
        // First only look: the pid must stay ours until the lock is held.
        while waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
        let mut status = self.lock();
        let ended = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0xff00));
        *status = Some(ended);
        self.reaped.notify_all();
        self.ended.send_replace(Some(ended));
    }

    fn wait_reaped(&self, limit: Duration) -> Option<ExitStatus> {
        let waited = self.reaped.wait_timeout_while(self.lock(), limit, |status| status.is_none());
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[expect(
    unsafe_code,
    reason = "a child enters its namespace and cgroup between fork and exec; std has no safe way"
)]
fn enter_before_exec(command: &mut Command, netns: File, mut cgroup: File) {
    let enter = move || {
        cgroup.write_all(b"0")?;
        setns(&netns, CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls on descriptors opened beforehand; it takes
    // no lock and allocates nothing.
    unsafe {
        command.pre_exec(enter);
    }
}

fn with_end(output: &Path, end: &str) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(end);
    name.into()
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
