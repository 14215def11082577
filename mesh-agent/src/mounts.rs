//! The mounts that this process sees, as `/proc/PID/mountinfo` tells of them (proc(5)).
//!
//! Never reads the file: what it says is given. Lines that are none are passed over. Tested where it is used.

use std::path::Path;

/// One line.
#[derive(Debug, Clone, Copy)]
pub struct Mount<'a> {
    /// Which directory of the file system is mounted.
    pub root: &'a Path,
    /// Where.
    pub point: &'a Path,
    /// The kind of file system.
    pub kind: &'a str,
    /// The options of the file system itself, between commas.
    pub options: &'a str,
}

/// All of them, in the order of the text.
pub fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount<'_>> {
    mountinfo.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut places = mount.split(' ').skip(3).map(Path::new);
        let mut file_system = file_system.split(' ');
        let (root, point) = (places.next()?, places.next()?);
        Some(Mount { root, point, kind: file_system.next()?, options: file_system.nth(1)? })
    })
}
