//! Which Go builds what is written in Go: the one in PATH, or the one that was unpacked where <https://go.dev/doc/install> has it,
//! which need not be in PATH. The newer of the two.
//!
//! Never fetches one, and never changes which one a person has. Tested below, and by what is built.

use std::env;
use std::path::PathBuf;

use crate::command::answer;
use crate::workspace;

/// Where those who unpack Go as they are told put it.
const UNPACKED: &str = "/usr/local/go/bin/go";

/// A Go that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Go {
    /// The program.
    pub path: PathBuf,
    /// As it says, `go1.26.8`.
    pub version: String,
}

impl Go {
    /// Of `go1.26.8`, 26.
    pub fn minor(&self) -> Option<u32> {
        let minor = self.version.strip_prefix("go1.")?;
        minor.split(|other: char| !other.is_ascii_digit()).next()?.parse().ok()
    }
}

/// The newest there is.
pub fn find() -> Option<Go> {
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|dir| dir.join("go")).find(|go| go.is_file());
    let unpacked = Some(PathBuf::from(UNPACKED)).filter(|go| go.is_file());
    newest(in_path.into_iter().chain(unpacked).map(|path| {
        // The version that it is, not one that it would fetch.
        let mut asked = workspace::command(&path);
        let version =
            answer(asked.args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local")).unwrap_or_default();
        Go { path, version }
    }))
}

/// Of those that are as new, the first.
fn newest(all: impl Iterator<Item = Go>) -> Option<Go> {
    all.reduce(|best, other| if other.minor() > best.minor() { other } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go(path: &str, version: &str) -> Go {
        Go { path: path.into(), version: version.to_owned() }
    }

    #[test]
    fn the_version_of_go_is_read() {
        assert_eq!(go("", "go1.26.8").minor(), Some(26));
        assert_eq!(go("", "go1.27rc1").minor(), Some(27));
        assert_eq!(go("", "").minor(), None);
    }

    #[test]
    fn the_newer_is_taken_and_else_the_first() {
        let of = |versions: [&str; 2]| {
            let all = [go("in PATH", versions[0]), go("unpacked", versions[1])];
            newest(all.into_iter()).map(|go| go.path)
        };
        assert_eq!(of(["go1.19.8", "go1.26.8"]), Some("unpacked".into()));
        assert_eq!(of(["go1.27.0", "go1.26.8"]), Some("in PATH".into()));
        assert_eq!(of(["go1.26.1", "go1.26.8"]), Some("in PATH".into()));
        assert_eq!(of(["", "go1.26.8"]), Some("unpacked".into()), "one that does not run");
        assert_eq!(newest(std::iter::empty()), None);
    }
}
