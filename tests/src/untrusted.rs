//! What root inside a pod can try: a process with the capabilities a container can be given, and no others.
//!
//! Promises: the process is in the pod's network namespace and cgroup, has a process table and file systems of its own
//! (no bpffs, no cgroups, nothing of the lab), and of the capabilities those that containers have by default and
//! `NET_ADMIN`. What it does is in `tests/clients/untrusted.py`. Tested by `tests/untrusted_pods.rs`.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Pod, clients::PYTHON};

/// What container runtimes give by default, and `net_admin`.
const CAPABILITIES: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,\
                            +net_raw,+sys_chroot,+mknod,+audit_write,+setfcap,+net_admin";

/// Hides what a container would not see, and gives up what it would not have. `$1` is the lab's directory.
const ENTER: &str = "mount -t tmpfs none /run && mount -t tmpfs none /sys && mount -t tmpfs none \"$1\" && shift && \
                     exec setpriv --inh-caps=-all --bounding-set=\"$0\" \"$@\"";

/// A flood takes its time on a busy machine.
const LIMIT: Duration = Duration::from_mins(2);

impl Pod {
    /// Has root inside the pod try something, and returns what it says of it.
    pub async fn untrusted(&self, verb: &str, args: &[&str]) -> Result<Value> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/untrusted.py");
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            ENTER,
            CAPABILITIES,
        ]);
        command.arg(&self.node().world.dir).args([PYTHON, "-I", "-B"]).arg(script).arg(verb).args(args);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let output = self.run_within(LIMIT, command).await?;
        ensure!(output.status.success(), "{verb} {args:?}: {}{}", output.stdout, output.stderr);
        serde_json::from_str(&output.stdout).with_context(|| format!("{verb} says {}", output.stdout))
    }
}
