//! Puts the kernel object into the agent.
//!
//! The object is built by `cargo xtask build-ebpf`; `MESH_EBPF_OBJECT` names another. Without one the build goes on
//! with a warning and the agent refuses to capture: see `docs/decisions/001-embedding-the-object.md`.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    println!("cargo::rustc-check-cfg=cfg(mesh_ebpf_missing)");
    println!("cargo::rerun-if-env-changed=MESH_EBPF_OBJECT");
    println!("cargo::rerun-if-changed=build.rs");
    let object = match env::var_os("MESH_EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => target_dir()?.join("ebpf/bpfel-unknown-none/release/mesh-ebpf"),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let embedded = out_dir()?.join("mesh-ebpf");
    match fs::copy(&object, embedded) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("cargo::rustc-cfg=mesh_ebpf_missing");
            println!("cargo::warning=no kernel object at {}: run `cargo xtask build-ebpf`", object.display());
        }
        Err(error) => {
            return Err(io::Error::new(error.kind(), format!("{}: {error}", object.display())));
        }
    }
    Ok(())
}

fn out_dir() -> io::Result<PathBuf> {
    env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other("OUT_DIR is not set: run by cargo only"))
}

/// The workspace's target directory.
fn target_dir() -> io::Result<PathBuf> {
    if let Some(dir) = env::var_os("CARGO_TARGET_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let package =
        package.ok_or_else(|| io::Error::other("CARGO_MANIFEST_DIR is not set: run by cargo only"))?;
    Ok(package.join("../target"))
}
