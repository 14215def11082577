//! Images of containers as OCI archives, made from files of this machine: no daemon, no registry, no base image.
//!
//! An archive is a tar with one manifest, one configuration and one layer (OCI image specification 1.1, image layout).
//! The same files give the same digest: entries are in order, and carry neither time nor owner. A program brings the
//! libraries it is linked with. Never runs what it packs, but for asking the loader what that needs. Tested below, and by
//! `cargo xtask test cluster`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// The owner of everything in an image that runs without root, as distroless images number it.
pub const NONROOT: u32 = 65532;

/// Authorities that programs of an image trust, where the image has them.
const AUTHORITIES: &str = "etc/ssl/certs/ca-certificates.crt";

#[derive(Debug, Clone)]
enum Entry {
    File(PathBuf),
    Text(String),
    Link(String),
}

/// An image: its files, and how its program is started.
#[derive(Debug, Clone, Default)]
pub struct Image {
    entries: BTreeMap<String, Entry>,
    /// What is started; the arguments of a container come after it.
    pub entrypoint: Vec<String>,
    /// `org.opencontainers.image.*` and others.
    pub labels: BTreeMap<String, String>,
}

impl Image {
    /// An image with users, groups, and how names are looked up; nothing to run yet.
    pub fn minimal() -> Self {
        let mut image = Self::default();
        let passwd = format!(
            "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:{NONROOT}:{NONROOT}:nonroot:/home/nonroot:/sbin/nologin\n\
             nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n"
        );
        image.text("etc/passwd", &passwd);
        image.text("etc/group", &format!("root:x:0:\nnonroot:x:{NONROOT}:\nnogroup:x:65534:\n"));
        image.text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n");
        image
    }

    /// A file with this text.
    pub fn text(&mut self, place: &str, text: &str) {
        self.entries.insert(place.to_owned(), Entry::Text(text.to_owned()));
    }

    /// A file of this machine.
    pub fn file(&mut self, place: &str, source: &Path) {
        self.entries.insert(place.to_owned(), Entry::File(source.to_owned()));
    }

    /// A symbolic link.
    pub fn link(&mut self, place: &str, target: &str) {
        self.entries.insert(place.to_owned(), Entry::Link(target.to_owned()));
    }

    /// A program, its loader and its libraries.
    pub fn program(&mut self, place: &str, source: &Path) -> Result<()> {
        if !source.is_file() {
            bail!("there is no program {}", source.display());
        }
        self.file(place, source);
        // Of a static program ldd says that it is none of its kind, and fails.
        let output = Command::new("ldd").arg(source).output().context("cannot start ldd")?;
        for library in libraries(&String::from_utf8_lossy(&output.stdout))
            .with_context(|| format!("{} cannot run here", source.display()))?
        {
            self.file(library.trim_start_matches('/'), Path::new(&library));
        }
        Ok(())
    }

    /// The authorities that this machine trusts.
    pub fn authorities(&mut self) {
        self.file(AUTHORITIES, &Path::new("/").join(AUTHORITIES));
    }

    /// Writes the archive, under the name that containerd knows the image by. Returns the digest of its manifest.
    pub fn write(&self, name: &str, archive: &Path) -> Result<String> {
        let cannot = || format!("cannot write {}", archive.display());
        if let Some(dir) = archive.parent() {
            fs::create_dir_all(dir).with_context(cannot)?;
        }
        // Beside the archive, which appears when it is whole.
        let layer_file = archive.with_extension("layer");
        let layer = self.write_layer(&layer_file)?;
        let config = Blob::of(&self.configuration(&layer.digest)?)?;
        let manifest = Blob::of(&manifest(&config, &layer))?;
        let partial = archive.with_extension("partial");
        let mut tar = Builder::new(File::create(&partial).with_context(cannot)?);
        append(&mut tar, "oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}")?;
        append(&mut tar, "index.json", &serde_json::to_vec(&index(&manifest, name)?)?)?;
        for blob in [&config, &manifest] {
            append(&mut tar, &blob.place(), &blob.bytes)?;
        }
        let mut header = header(EntryType::Regular, 0o644, layer.size);
        let layer_content = File::open(&layer_file).with_context(cannot)?;
        tar.append_data(&mut header, layer.place(), layer_content).with_context(cannot)?;
        tar.into_inner().and_then(|mut file| file.flush()).with_context(cannot)?;
        fs::remove_file(&layer_file).with_context(cannot)?;
        fs::rename(&partial, archive).with_context(cannot)?;
        Ok(manifest.digest)
    }

    /// Puts the files of the image into a new directory.
    pub fn unpack(&self, directory: &Path) -> Result<()> {
        fs::create_dir(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let layer = directory.join(".layer");
        self.write_layer(&layer)?;
        let mut archive = tar::Archive::new(File::open(&layer)?);
        archive.set_preserve_permissions(true);
        archive.unpack(directory).with_context(|| format!("cannot fill {}", directory.display()))?;
        fs::remove_file(&layer).with_context(|| format!("cannot remove {}", layer.display()))
    }

    fn write_layer(&self, file: &Path) -> Result<Blob> {
        let output = File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
        let mut tar = Builder::new(Hashing { output, hash: Sha256::new(), size: 0 });
        for directory in self.directories() {
            let mode = if directory == "tmp" { 0o1777 } else { 0o755 };
            tar.append_data(&mut header(EntryType::Directory, mode, 0), directory, io::empty())?;
        }
        for (place, entry) in &self.entries {
            match entry {
                Entry::Text(text) => append(&mut tar, place, text.as_bytes())?,
                Entry::Link(target) => {
                    tar.append_link(&mut header(EntryType::Symlink, 0o777, 0), place, target)?;
                }
                Entry::File(source) => append_file(&mut tar, place, source)?,
            }
        }
        let Hashing { hash, size, .. } = tar.into_inner()?;
        Ok(Blob { digest: digest(hash), size, bytes: Vec::new() })
    }

    /// All above any entry, and those that containers are given things in.
    fn directories(&self) -> BTreeSet<String> {
        let mut all: BTreeSet<String> =
            ["dev", "etc", "proc", "run", "sys", "tmp", "var"].map(str::to_owned).into();
        for place in self.entries.keys() {
            let parents = Path::new(place).ancestors().skip(1).filter_map(Path::to_str);
            all.extend(parents.filter(|parent| !parent.is_empty()).map(str::to_owned));
        }
        all
    }

    fn configuration(&self, layer: &str) -> Result<Value> {
        Ok(json!({
            "architecture": architecture()?,
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Labels": self.labels,
            },
            "rootfs": { "type": "layers", "diff_ids": [layer] },
        }))
    }
}

/// The name with the domain and the path that it has by default, as containerd and Kubernetes complete names.
pub fn full_name(name: &str) -> String {
    match name.split_once('/') {
        Some((domain, _)) if domain == "localhost" || domain.contains(['.', ':']) => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    }
}

/// The libraries and the loader in what ldd says.
fn libraries(said: &str) -> Result<Vec<String>> {
    if let Some(missing) = said.lines().find(|line| line.contains("not found")) {
        bail!("a library is missing: {}", missing.trim());
    }
    let paths = said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(str::to_owned).collect())
}

fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("images for {other} have no name here"),
    }
}

fn manifest(config: &Blob, layer: &Blob) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar")],
    })
}

fn index(manifest: &Blob, name: &str) -> Result<Value> {
    let mut descriptor = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    descriptor["platform"] = json!({ "architecture": architecture()?, "os": "linux" });
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    descriptor["annotations"] = json!({
        "io.containerd.image.name": full_name(name),
        "org.opencontainers.image.ref.name": tag,
    });
    Ok(json!({ "schemaVersion": 2, "manifests": [descriptor] }))
}

struct Blob {
    digest: String,
    size: u64,
    bytes: Vec<u8>,
}

impl Blob {
    fn of(value: &Value) -> Result<Self> {
        let bytes = serde_json::to_vec(value)?;
        Ok(Self { digest: digest(Sha256::new_with_prefix(&bytes)), size: bytes.len() as u64, bytes })
    }

    fn descriptor(&self, kind: &str) -> Value {
        json!({ "mediaType": kind, "digest": self.digest, "size": self.size })
    }

    fn place(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

pub fn digest(hash: Sha256) -> String {
    use std::fmt::Write as _;
    hash.finalize().iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

struct Hashing {
    output: File,
    hash: Sha256,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.output.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(tar: &mut Builder<impl Write>, place: &str, bytes: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, 0o644, bytes.len() as u64);
    tar.append_data(&mut header, place, bytes).with_context(|| format!("cannot pack {place}"))
}

fn append_file(tar: &mut Builder<impl Write>, place: &str, source: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let cannot = || format!("cannot pack {}", source.display());
    let file = File::open(source).with_context(cannot)?;
    let metadata = file.metadata().with_context(cannot)?;
    let executable = metadata.permissions().mode() & 0o111 != 0;
    let mut header = header(EntryType::Regular, if executable { 0o755 } else { 0o644 }, metadata.len());
    tar.append_data(&mut header, place, file).with_context(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(archive: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut found = BTreeMap::new();
        for entry in tar::Archive::new(File::open(archive)?).entries()? {
            let mut entry = entry?;
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut entry, &mut bytes)?;
            found.insert(entry.path()?.display().to_string(), bytes);
        }
        Ok(found)
    }

    #[test]
    fn an_archive_holds_what_its_digests_say() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("xtask-oci-{}", std::process::id()));
        let mut image = Image::minimal();
        image.program("usr/bin/sh", Path::new("/bin/sh"))?;
        image.link("bin/sh", "/usr/bin/sh");
        image.entrypoint = vec!["sh".into()];
        let digest = image.write("sample:1", &dir.join("one.tar"))?;
        assert_eq!(digest, image.write("sample:1", &dir.join("two.tar"))?, "the same files, the same digest");
        let found = read(&dir.join("one.tar"))?;
        for (place, bytes) in found.iter().filter(|(place, _)| place.starts_with("blobs/sha256/")) {
            let sum = super::digest(Sha256::new_with_prefix(bytes));
            assert_eq!(format!("blobs/{}", sum.replace(':', "/")), *place);
        }
        let index: Value = serde_json::from_slice(&found["index.json"])?;
        assert_eq!(index["manifests"][0]["digest"], digest);
        let name = &index["manifests"][0]["annotations"]["io.containerd.image.name"];
        assert_eq!(*name, "docker.io/library/sample:1");
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap_or_default();
            found[&format!("blobs/{}", digest.replace(':', "/"))].clone()
        };
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0]))?;
        let layer = blob(&manifest["layers"][0]);
        let config: Value = serde_json::from_slice(&blob(&manifest["config"]))?;
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"], "it is not compressed");
        fs::write(dir.join("layer.tar"), layer)?;
        let files = read(&dir.join("layer.tar"))?;
        for place in ["usr/bin/sh", "bin/sh", "etc/passwd"] {
            assert!(files.contains_key(place), "{place} in {:?}", files.keys());
        }
        assert!(files.keys().any(|place| place.contains("libc.so")), "{:?}", files.keys());
        let root = dir.join("root");
        image.unpack(&root)?;
        assert_eq!(fs::read(root.join("usr/bin/sh"))?, fs::read("/bin/sh")?);
        assert!(!root.join(".layer").exists());
        assert!(image.unpack(&root).is_err(), "what is there is not mixed with");
        fs::remove_dir_all(&dir)?;
        Ok(())
    }

    #[test]
    fn names_are_completed_as_kubernetes_does() {
        assert_eq!(full_name("bookinfo:0.1.0"), "docker.io/library/bookinfo:0.1.0");
        assert_eq!(full_name("team/app:1"), "docker.io/team/app:1");
        assert_eq!(full_name("localhost/pause:1"), "localhost/pause:1");
        assert_eq!(full_name("registry.example:5000/app"), "registry.example:5000/app");
    }

    #[test]
    fn libraries_are_read_from_ldd() -> Result<()> {
        let said = "\tlinux-vdso.so.1 (0x7ff)\n\tlibelf.so.1 => /lib/libelf.so.1 (0x7f)\n\t/lib64/ld-linux.so.2 (0x7e)\n";
        assert_eq!(libraries(said)?, ["/lib/libelf.so.1", "/lib64/ld-linux.so.2"]);
        assert!(libraries("\tstatically linked\n")?.is_empty());
        assert!(libraries("\tlibelf.so.1 => not found\n").is_err());
        Ok(())
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error =
            Image::minimal().program("x", Path::new("/nonexistent")).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("there is no program /nonexistent"));
    }
}
