//! Running other programs: their output shown, kept until it is wanted, or read.
//!
//! A child that fails is an error with its command line; nothing runs in the background once a function returns.
//! Tested below.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a long step whose output is kept says that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Runs the command with its output shown as it comes.
pub fn shown(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| not_started(command))?;
    check(command, status)
}

/// Runs the command and keeps its output, which is shown only when it fails. Says every ten seconds how far it is.
pub fn kept(mut command: Command) -> Result<()> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| not_started(&command))?;
    let line = command_line(&command);
    // The command holds the pipe's write ends: dropped, so that the reader sees the end when the child is done.
    drop(command);

    let (sender, lines) = mpsc::channel();
    let reading = thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let output = collect(&lines);
    let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    let _ = reading.join();
    if !status.success() {
        println!("{}", output.join("\n"));
        bail!("`{line}` failed ({status}); its output is above");
    }
    Ok(())
}

/// Runs the command and hands every line of its standard output to `seen` as it comes; its errors are shown.
pub fn watched(command: &mut Command, mut seen: impl FnMut(&str)) -> Result<()> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| not_started(command))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            seen(&String::from_utf8_lossy(&line));
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{}`", command_line(command)))?;
    check(command, status)
}

/// What the command prints, or `None` where it is not installed or fails.
pub fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn collect(lines: &mpsc::Receiver<String>) -> Vec<String> {
    let started = Instant::now();
    let mut output: Vec<String> = Vec::new();
    let mut next = started + HEARTBEAT;
    loop {
        match lines.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(line) => output.push(line),
            Err(RecvTimeoutError::Disconnected) => return output,
            Err(RecvTimeoutError::Timeout) => {
                let last = output.iter().rev().map(|line| line.trim()).find(|line| !line.is_empty());
                println!("    {:>4} s  {}", started.elapsed().as_secs(), last.unwrap_or("working"));
                next = Instant::now() + HEARTBEAT;
            }
        }
    }
}

fn check(command: &Command, status: ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    bail!("`{}` failed ({status})", command_line(command))
}

fn not_started(command: &Command) -> String {
    format!("cannot start `{}`", command_line(command))
}

fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failure_names_the_command_and_its_status() {
        let error = kept(shell("echo kept; exit 3")).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("sh -c") && error.contains("exit status: 3"), "{error}");
        let error = shown(&mut Command::new("/nonexistent/program")).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("cannot start `/nonexistent/program`"));
    }

    #[test]
    fn every_line_is_seen() -> Result<()> {
        let mut seen = Vec::new();
        watched(&mut shell("echo one; echo two"), |line| seen.push(line.to_owned()))?;
        assert_eq!(seen, ["one", "two"]);
        Ok(())
    }

    #[test]
    fn an_answer_is_trimmed_and_absent_on_failure() {
        assert_eq!(answer(&mut shell("echo ' yes '")).as_deref(), Some("yes"));
        assert_eq!(answer(&mut shell("echo no; exit 1")), None);
        assert_eq!(answer(&mut Command::new("/nonexistent/program")), None);
    }
}
