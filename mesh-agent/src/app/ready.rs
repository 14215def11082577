//! `mesh-agent ready`: whether one agent is ready, asked at a socket that is its own.
//!
//! While an agent takes over from another on its node, both answer at the node's addresses, which one it is that does is the
//! kernel's choice or the hand-over's; an exec probe has to ask the process in its own container. Tested below, and by
//! `tests/tests/upgrade.rs`.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::config::ReadyConfig;

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest answer, bytes.
const LONGEST: u64 = 64 * 1024;

/// Asks, and says what the agent waits for. False: it is not ready.
///
/// # Errors
/// Nobody answers.
pub fn ready(config: &ReadyConfig, out: &mut impl io::Write) -> Result<bool> {
    let at = || format!("asking the agent at {}", config.ready_socket.display());
    let answer = ask(&config.ready_socket).with_context(at)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    writeln!(out, "{}", body.trim()).context("writing the answer")?;
    Ok(head.split(' ').nth(1) == Some("200"))
}

fn ask(socket: &std::path::Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::admin::{self, Address, Readiness};

    #[tokio::test]
    async fn the_answer_is_that_of_the_agent_behind_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let config = ReadyConfig { ready_socket: dir.path().join("own/ready.sock") };
        let asked = |config: ReadyConfig| {
            tokio::task::spawn_blocking(move || {
                let mut said = Vec::new();
                ready(&config, &mut said).map(|good| (good, String::from_utf8_lossy(&said).into_owned()))
            })
        };
        let error = asked(config.clone()).await.unwrap().err().map(|error| format!("{error:#}"));
        assert!(error.is_some_and(|error| error.contains("ready.sock")));
        let readiness = Readiness::default();
        let enrolling = readiness.block("the pods of this node");
        let listener =
            admin::Listener::bind_admin(&Address::Unix(config.ready_socket.clone())).await.unwrap();
        tokio::spawn(admin::serve_readiness(listener, readiness, CancellationToken::new()));
        let (good, said) = asked(config.clone()).await.unwrap().unwrap();
        assert!(!good && said.contains("the pods of this node"), "{said}");
        drop(enrolling);
        assert!(asked(config).await.unwrap().unwrap().0);
    }
}
