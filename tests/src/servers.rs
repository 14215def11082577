//! Servers of the real world, run inside pods: `MariaDB`, Redis, `PostgreSQL` and an SMTP server, each with its own client.
//!
//! Promises: a server is a process of the pod that keeps what it has in a directory of its own, as a user without
//! rights, and listens when [`Pod::run_server`] returns; [`Pod::ask`] has its client say something and gives back what
//! the server saw of the connection. They are installed by `cargo xtask test`, which starts none of them. Tested in
//! `tests/server_first.rs`.

use std::{
    ffi::OsStr,
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::symlink,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::{User, chown};
use tempfile::TempDir;

use crate::{Pod, Process, eventually, skip};

/// Who the servers run as: `PostgreSQL` and `MariaDB` refuse to be root.
const NOBODY: &str = "nobody";
/// Where Debian keeps one directory for each version of `PostgreSQL`.
const POSTGRES: &str = "/usr/lib/postgresql";
/// What `MariaDB` executes as it starts.
const INIT_FILE: &str = "init.sql";
/// `MariaDB` for few rows.
const SMALL: [&str; 2] = ["--innodb-buffer-pool-size=8M", "--innodb-log-file-size=4M"];
const PYTHON: &str = "/usr/bin/python3";

/// A server that lab tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// The server speaks first.
    MariaDb,
    /// The client speaks first, in words of its own.
    Redis,
    /// The client speaks first, and asks for TLS before anything else.
    Postgres,
    /// The server speaks first.
    Smtp,
}

/// A server that runs until the lab goes.
#[derive(Debug)]
pub struct Running {
    server: Server,
    process: Process,
    /// Gone with this.
    data: TempDir,
}

/// Whether all servers, and their clients, are installed; as [`crate::clients::require`].
pub fn require() -> Result<bool> {
    if !crate::require_root()? {
        return Ok(false);
    }
    match Server::ALL.into_iter().find(|server| !server.is_installed()) {
        Some(server) => skip(&format!("{server:?} is not installed: `cargo xtask test` does that")),
        None => Ok(true),
    }
}

impl Server {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::MariaDb, Self::Redis, Self::Postgres, Self::Smtp];

    /// A name for a pod and a Service.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MariaDb => "mariadb",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
            Self::Smtp => "smtp",
        }
    }

    /// The port by which it is known.
    pub const fn usual_port(self) -> u16 {
        match self {
            Self::MariaDb => 3306,
            Self::Redis => 6379,
            Self::Postgres => 5432,
            Self::Smtp => 25,
        }
    }

    fn is_installed(self) -> bool {
        let files: &[&str] = match self {
            Self::MariaDb => &["/usr/sbin/mariadbd", "/usr/bin/mariadb-install-db", "/usr/bin/mariadb"],
            Self::Redis => &["/usr/bin/redis-check-rdb", "/usr/bin/redis-cli"],
            Self::Postgres => return postgres("initdb").is_ok(),
            Self::Smtp => &[PYTHON, "/usr/lib/python3/dist-packages/aiosmtpd", "/usr/bin/curl"],
        };
        files.iter().all(|file| Path::new(file).exists())
    }

    /// What starts it in the foreground, with all it keeps in `data`.
    fn start(self, port: u16, data: &str) -> Result<Command> {
        Ok(match self {
            Self::MariaDb => {
                let mut command = as_nobody("/usr/sbin/mariadbd");
                command.args(["--no-defaults", "--skip-name-resolve", "--bind-address=*"]).args(SMALL);
                command.args([format!("--port={port}"), format!("--datadir={data}")]);
                command.arg(format!("--init-file={data}/{INIT_FILE}"));
                command.args([format!("--socket={data}/s"), format!("--pid-file={data}/p")]);
                command
            }
            Self::Redis => {
                // One program is the server and its tools, by the name it is called. The package with the server's
                // own name would start one on the machine.
                let program = format!("{data}/redis-server");
                symlink("/usr/bin/redis-check-rdb", &program)?;
                let mut command = as_nobody(program);
                command.args(["--port", &port.to_string(), "--dir", data]);
                command.args(["--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", ""]);
                command
            }
            Self::Postgres => {
                let mut command = as_nobody(postgres("postgres")?);
                command.args(["-D", data, "-k", data, "-h", "*", "-p", &port.to_string(), "-F"]);
                command
            }
            Self::Smtp => {
                let mut command = as_nobody(PYTHON);
                command.args(["-u", "-m", "aiosmtpd", "-n", "-l", &format!("0.0.0.0:{port}")]);
                command.args(["-c", "aiosmtpd.handlers.Debugging", "stdout"]);
                command
            }
        })
    }
}

impl Pod {
    /// Starts a server in the pod and waits until it listens on this port.
    pub async fn run_server(&self, server: Server, port: u16) -> Result<Running> {
        let data = TempDir::new().context("making a directory for a server")?;
        let user = nobody()?;
        chown(data.path(), Some(user.uid), Some(user.gid))?;
        let path = data.path().to_str().context("a path of UTF-8")?;
        self.prepare(server, data.path(), path).await?;
        let process = self.spawn(server.start(port, path)?)?;
        eventually("a server that listens", async || {
            ensure!(self.listens(port) || process.status().is_some(), "{server:?} does not listen yet");
            Ok(())
        })
        .await?;
        ensure!(process.status().is_none(), "{server:?} has ended\n{}", process.tail());
        Ok(Running { server, process, data })
    }

    /// What has to be there before a server starts.
    async fn prepare(&self, server: Server, data: &Path, path: &str) -> Result<()> {
        let mut command;
        match server {
            Server::MariaDb => {
                command = as_nobody("/usr/bin/mariadb-install-db");
                command.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
                command.arg(format!("--datadir={path}")).args(SMALL);
            }
            Server::Postgres => {
                command = as_nobody(postgres("initdb")?);
                command.args(["-D", path, "-U", "postgres", "--auth=trust", "--no-sync"]);
                command.args(["--locale=C", "-E", "UTF8"]);
            }
            Server::Redis | Server::Smtp => return Ok(()),
        }
        let made = self.run(command).await?;
        ensure!(made.status.success(), "preparing {server:?}: {} {}", made.stdout, made.stderr);
        let (file, everybody) = match server {
            Server::MariaDb => (INIT_FILE, "CREATE USER lab@'%';\n"),
            _ => ("pg_hba.conf", "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"),
        };
        fs::write(data.join(file), everybody).with_context(|| format!("letting clients into {server:?}"))
    }

    /// Has the server's own client ask it something at this address. What comes back is the address that the server
    /// has for its client.
    pub async fn ask(&self, running: &Running, to: SocketAddr) -> Result<IpAddr> {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        let mut command;
        match running.server {
            Server::MariaDb => {
                command = Command::new("/usr/bin/mariadb");
                command.args(["--no-defaults", "--protocol=tcp", "-h", &ip, "-P", &port, "-N", "-B"]);
                command.args(["-u", "lab", "-e", "select substring_index(user(), '@', -1)"]);
            }
            Server::Redis => {
                command = Command::new("/usr/bin/redis-cli");
                command.args(["-h", &ip, "-p", &port, "client", "info"]);
            }
            Server::Postgres => {
                command = Command::new(postgres("psql")?);
                command.args(["-h", &ip, "-p", &port, "-U", "postgres", "-X", "-A", "-t"]);
                command.args(["-c", "select inet_client_addr()"]);
            }
            Server::Smtp => return self.mail(running, to).await,
        }
        let output = self.run(command).await?;
        let said = output.stdout.trim();
        ensure!(output.status.success(), "{:?} at {to}: {said} {}", running.server, output.stderr);
        let address = if running.server == Server::Redis { redis_client(said)? } else { said };
        address.parse().with_context(|| format!("no address: {said}"))
    }

    /// curl mails a letter; the server prints what it gets, with the address of who brought it.
    async fn mail(&self, running: &Running, to: SocketAddr) -> Result<IpAddr> {
        let letter = running.data.path().join("letter");
        let subject = format!("Subject: to {to} from {}", self.name());
        fs::write(&letter, format!("{subject}\r\n\r\nA letter.\r\n"))?;
        let mut command = Command::new("/usr/bin/curl");
        command.args(["--disable", "--silent", "--show-error", "--noproxy", "*", "--max-time", "20"]);
        command.args(["--mail-from", "a@example.org", "--mail-rcpt", "b@example.org", "--upload-file"]);
        command.arg(&letter).arg(format!("smtp://{to}"));
        let output = self.run(command).await?;
        ensure!(output.status.success(), "smtp at {to}: {}", output.stderr);
        let printed = running.process.stdout();
        let letter = printed.split("MESSAGE FOLLOWS").find(|letter| letter.contains(&subject));
        let letter = letter.with_context(|| format!("no letter with {subject}: {printed}"))?;
        let peer = letter.split("X-Peer: ('").nth(1).and_then(|rest| rest.split('\'').next());
        let peer = peer.with_context(|| format!("a letter from nobody: {letter}"))?;
        peer.parse().with_context(|| format!("no address: {peer}"))
    }
}

/// The address in the answer to `CLIENT INFO`.
fn redis_client(said: &str) -> Result<&str> {
    let addr = said.split(' ').find_map(|field| field.strip_prefix("addr="));
    let ip = addr.and_then(|addr| addr.rsplit_once(':')).map(|(ip, _)| ip.trim_matches(['[', ']']));
    ip.with_context(|| format!("no addr= in {said}"))
}

/// The user without rights that servers run as.
pub fn nobody() -> Result<User> {
    User::from_name(NOBODY)?.context("this system has no user nobody")
}

/// Runs a program as that user. It gives up being root once it is where it shall run: who is not root enters no namespace.
pub fn as_nobody(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", NOBODY, "--regid", "nogroup", "--clear-groups", "--"]).arg(program);
    command
}

/// A program of the newest `PostgreSQL` there is.
fn postgres(program: &str) -> Result<std::path::PathBuf> {
    let versions = fs::read_dir(POSTGRES).with_context(|| format!("cannot read {POSTGRES}"))?;
    let programs = versions.flatten().map(|version| version.path().join("bin").join(program));
    programs.filter(|path| path.is_file()).max().with_context(|| format!("no {program} in {POSTGRES}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_says_who_its_client_is() -> Result<()> {
        assert_eq!(redis_client("id=3 addr=10.1.0.2:41234 laddr=10.2.0.2:7000")?, "10.1.0.2");
        assert_eq!(redis_client("id=3 addr=[fd00::2]:41234 x=y")?, "fd00::2");
        assert!(redis_client("ERR").is_err());
        Ok(())
    }
}
