//! Puts the kernel object into the agent.
//!
//! The object is built by `cargo xtask build-ebpf`; `MESH_EBPF_OBJECT` names another. Without one the build goes on
//! with a warning and the agent refuses to capture: see `docs/decisions/001-embedding-the-object.md`. What debuggers read
//! stays out, which is five sixths of the object: the agent reads it for each pod that it enrols.

use std::{env, fs, io, path::PathBuf};

use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

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
    match fs::read(&object) {
        Ok(whole) => fs::write(embedded, stripped(&whole).map_err(io::Error::other)?)?,
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

/// Without DWARF. BTF, which the kernel reads, stays.
fn stripped(object: &[u8]) -> object::build::Result<Vec<u8>> {
    let (mut elf, mut stripped) = (Builder::read(object)?, Vec::new());
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    elf.delete_orphans();
    // The linker has one table of names for symbols and sections: what is written has two.
    if !elf.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = elf.sections.add();
        (names.name, names.sh_type, names.sh_addralign) = (b".shstrtab"[..].into(), SHT_STRTAB, 1);
        names.data = SectionData::SectionString;
    }
    elf.write(&mut stripped)?;
    Ok(stripped)
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
