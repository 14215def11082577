//! The images that a cluster's own pods and its tests need, and how a node gets one.
//!
//! `pause` and CoreDNS are on every node from the start. Tests add Bookinfo and a client with busybox and curl. All are
//! made from programs of this machine; no node can reach a registry, and none has to. Tested by
//! `cargo xtask test cluster`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow};

use super::state::{self, Shape};
use super::{node, state::images as dir};
use crate::command::{answer, kept};
use crate::oci::Image;
use crate::workspace;

/// The image that holds a pod's namespaces.
pub const PAUSE: &str = "localhost/pause:1";
/// The cluster's DNS.
pub const COREDNS: &str = "localhost/coredns:1";
/// What tests send requests with.
pub const CLIENT: &str = "localhost/client:1";
/// The sample, under the name that its manifests give it.
const BOOKINFO: &str = concat!("bookinfo:", env!("CARGO_PKG_VERSION"));

/// Makes the images of every node, where their programs are newer.
pub fn prepare() -> Result<()> {
    fs::create_dir_all(dir()).with_context(|| format!("cannot create {}", dir().display()))?;
    pause()?;
    let archive = dir().join("coredns.tar");
    let program = state::program("coredns");
    if is_newer(&archive, &program) {
        return Ok(());
    }
    let mut image = Image::minimal();
    image.program("coredns", &program)?;
    image.entrypoint = vec!["/coredns".into()];
    image.write(COREDNS, &archive).map(|_| ())
}

/// The archives that every node imports before its kubelet starts.
pub fn of_every_node() -> [PathBuf; 2] {
    ["pause.tar", "coredns.tar"].map(|name| dir().join(name))
}

fn pause() -> Result<()> {
    let archive = dir().join("pause.tar");
    let source = workspace::root().join("tests/cluster/pause.c");
    if is_newer(&archive, &source) {
        return Ok(());
    }
    let program = dir().join("pause");
    let mut cc = Command::new("cc");
    cc.args(["-Os", "-static", "-s", "-Wall", "-o"]).arg(&program).arg(&source);
    kept(cc)?;
    let mut image = Image::minimal();
    image.program("pause", &program)?;
    image.entrypoint = vec!["/pause".into()];
    image.write(PAUSE, &archive).map(|_| ())
}

/// Bookinfo as the debug build left it, and the client. Returns their archives.
pub fn of_tests() -> Result<[PathBuf; 2]> {
    let bookinfo = dir().join("bookinfo.tar");
    let mut image = Image::minimal();
    image.program("usr/local/bin/bookinfo", &workspace::debug_program("bookinfo"))?;
    image.entrypoint = vec!["/usr/local/bin/bookinfo".into()];
    image.write(BOOKINFO, &bookinfo)?;
    Ok([bookinfo, client()?])
}

fn client() -> Result<PathBuf> {
    let archive = dir().join("client.tar");
    let mut image = Image::minimal();
    image.program("bin/busybox", Path::new("/bin/busybox"))?;
    let applets =
        answer(Command::new("/bin/busybox").arg("--list")).context("busybox has no list of applets")?;
    for applet in applets.lines().filter(|&applet| applet != "busybox") {
        image.link(&format!("bin/{applet}"), "busybox");
    }
    image.program("usr/bin/curl", Path::new("/usr/bin/curl"))?;
    image.authorities();
    image.entrypoint = vec!["/bin/sh".into()];
    image.write(CLIENT, &archive)?;
    Ok(archive)
}

/// Gives an archive to all nodes at the same time.
pub fn load(shape: Shape, archive: &Path) -> Result<()> {
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> =
            shape.all_nodes().map(|node| scope.spawn(move || node::import(node, archive))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("it panicked"))))
            .collect()
    });
    results.into_iter().collect()
}

fn is_newer(archive: &Path, source: &Path) -> bool {
    let changed = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    changed(archive) > changed(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_asks_for_the_image_that_is_made() -> Result<()> {
        let manifests = fs::read_to_string(workspace::root().join("deploy/samples/bookinfo/bookinfo.yaml"))?;
        let images: Vec<_> =
            manifests.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
        assert!(!images.is_empty() && images.iter().all(|&image| image == BOOKINFO), "{images:?}");
        Ok(())
    }

    #[test]
    fn what_is_not_there_is_not_newer() {
        let own = workspace::root().join("Cargo.toml");
        assert!(!is_newer(Path::new("/nonexistent"), &own));
        assert!(is_newer(&own, Path::new("/nonexistent")));
    }
}
