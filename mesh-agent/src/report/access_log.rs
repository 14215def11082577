//! The access log: one line per request, opaque connection or refusal, as `key=value` text or JSON with the same
//! keys.
//!
//! Promises that writing never blocks the path (a line that finds the queue full is dropped and counted) and that
//! no byte a client sends can end a line or pass for another key. Never logs bodies or headers. Tested below.

use std::{
    fmt::{self, Write as _},
    io::{self, BufWriter, Write},
    net::SocketAddr,
    sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    time::{Duration, SystemTime},
};

use clap::ValueEnum;
use prometheus_client::metrics::counter::Counter;
use time::OffsetDateTime;

use super::Peer;

/// Lines waiting to be written; with [`MAX_VALUE`] this bounds the queue to some tens of MiB at worst.
const QUEUE: usize = 8192;

/// Characters kept of one value: a path may be 64 KiB long, a line should not be.
const MAX_VALUE: usize = 1024;

/// Form of the access log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum AccessLog {
    /// No line at all.
    #[default]
    Off,
    /// `key=value`, quoted where needed.
    Text,
    /// One JSON object a line.
    Json,
}

enum Message {
    Line(String),
    Flush(SyncSender<()>),
}

/// Hands lines to the thread that writes them.
#[derive(Debug)]
pub(super) struct Log {
    format: AccessLog,
    queue: Option<SyncSender<Message>>,
    dropped: Counter,
}

impl Log {
    /// A log that writes nothing.
    pub fn off() -> Self {
        Self { format: AccessLog::Off, queue: None, dropped: Counter::default() }
    }

    /// Starts the writer. An `Err` when the thread cannot be started.
    pub fn start(format: AccessLog, out: Box<dyn Write + Send>, dropped: Counter) -> io::Result<Self> {
        if format == AccessLog::Off {
            return Ok(Self::off());
        }
        let (queue, lines) = sync_channel(QUEUE);
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_lines(&lines, BufWriter::with_capacity(64 * 1024, out)))?;
        Ok(Self { format, queue: Some(queue), dropped })
    }

    /// Builds a line and queues it; nothing is built when the log is off.
    pub fn line(&self, fill: impl FnOnce(&mut Line)) {
        let Some(queue) = &self.queue else { return };
        let mut line = Line::new(self.format, SystemTime::now());
        fill(&mut line);
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            queue.try_send(Message::Line(line.finish()))
        {
            self.dropped.inc();
        }
    }

    /// Waits until what was queued before is written, at most `limit`. Whether it was. For the end of the process
    /// and for tests: it blocks its thread.
    pub fn flush(&self, limit: Duration) -> bool {
        let Some(queue) = &self.queue else { return true };
        let end = std::time::Instant::now() + limit;
        let (done, written) = sync_channel(1);
        let mut message = Message::Flush(done);
        // A stuck reader of our output keeps the queue full, and the standard channel has no send with a limit.
        while let Err(TrySendError::Full(back)) = queue.try_send(message) {
            if std::time::Instant::now() >= end {
                return false;
            }
            std::thread::yield_now();
            message = back;
        }
        written.recv_timeout(end.saturating_duration_since(std::time::Instant::now())).is_ok()
    }
}

/// Writes until every sender is gone. Flushes whenever the queue is empty, so a quiet log is never late and a busy
/// one is written in large pieces. A log that cannot be written (closed pipe) is not an error of the mesh.
fn write_lines(lines: &Receiver<Message>, mut out: BufWriter<Box<dyn Write + Send>>) {
    loop {
        let message = match lines.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                let _ = out.flush();
                match lines.recv() {
                    Ok(message) => message,
                    Err(_) => break,
                }
            }
        };
        match message {
            Message::Line(line) => {
                let _ = out.write_all(line.as_bytes());
            }
            Message::Flush(done) => {
                let _ = out.flush();
                let _ = done.send(());
            }
        }
    }
    let _ = out.flush();
}

/// A line being built.
#[derive(Debug)]
pub(super) struct Line {
    json: bool,
    out: String,
}

impl Line {
    fn new(format: AccessLog, at: SystemTime) -> Self {
        let mut line = Self { json: format == AccessLog::Json, out: String::with_capacity(768) };
        line.text("time", Some(&rfc3339(at)));
        line
    }

    fn finish(mut self) -> String {
        self.out.push_str(if self.json { "}\n" } else { "\n" });
        self.out
    }

    fn key(&mut self, key: &'static str) {
        if self.json {
            self.out.push(if self.out.is_empty() { '{' } else { ',' });
            let _ = write!(self.out, "\"{key}\":");
        } else {
            if !self.out.is_empty() {
                self.out.push(' ');
            }
            let _ = write!(self.out, "{key}=");
        }
    }

    /// A value that may hold anything, among it what a client sent.
    pub fn text(&mut self, key: &'static str, value: Option<&str>) {
        self.key(key);
        match value {
            None => self.out.push_str(if self.json { "null" } else { "-" }),
            Some(value) if self.json || !is_plain(value) => quoted(&mut self.out, value),
            Some(value) => self.out.push_str(value),
        }
    }

    /// The same, of something that is unknown where it is empty.
    pub fn known(&mut self, key: &'static str, value: &str) {
        self.text(key, Some(value).filter(|value| !value.is_empty()));
    }

    /// A value with a text form.
    pub fn display(&mut self, key: &'static str, value: Option<impl fmt::Display>) {
        self.text(key, value.map(|value| value.to_string()).as_deref());
    }

    /// A number.
    pub fn number(&mut self, key: &'static str, value: Option<u64>) {
        self.key(key);
        match value {
            Some(value) => {
                let _ = write!(self.out, "{value}");
            }
            None => self.out.push_str(if self.json { "null" } else { "-" }),
        }
    }

    /// Milliseconds with three decimals.
    pub fn milliseconds(&mut self, key: &'static str, value: Duration) {
        self.key(key);
        let micros = value.as_micros();
        let _ = write!(self.out, "{}.{:03}", micros / 1000, micros % 1000);
    }

    /// `PREFIX.addr`, `.workload`, `.namespace`, `.identity` of one end.
    pub fn end(&mut self, keys: [&'static str; 4], address: Option<SocketAddr>, peer: &Peer) {
        let [addr, workload, namespace, identity] = keys;
        self.display(addr, address);
        self.text(workload, peer.workload.as_deref().map(|w| &*w.name));
        self.text(namespace, peer.workload.as_deref().map(|w| &*w.namespace));
        self.display(identity, peer.identity.as_ref());
    }
}

/// Whether the text form needs no quotes.
fn is_plain(value: &str) -> bool {
    value.len() <= MAX_VALUE
        && value != "-"
        && !value.is_empty()
        && value.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b'='))
}

/// The value in quotes, escaped as in JSON. Characters that end a line for some reader or turn the direction of
/// writing are escaped too.
fn quoted(out: &mut String, value: &str) {
    out.push('"');
    for (n, c) in value.chars().enumerate() {
        if n == MAX_VALUE {
            out.push('…');
            break;
        }
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{2028}'
            | '\u{2029}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// RFC 3339 in UTC with milliseconds.
pub(super) fn rfc3339(at: SystemTime) -> String {
    let t = OffsetDateTime::from(at);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        t.year(),
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second(),
        t.millisecond()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: AccessLog, value: &str) -> String {
        let mut line = Line::new(format, SystemTime::UNIX_EPOCH);
        line.text("path", Some(value));
        line.number("status", Some(200));
        line.text("route", None);
        line.milliseconds("duration_ms", Duration::from_micros(12_345));
        line.finish()
    }

    #[test]
    fn text_quotes_only_where_needed() {
        let rest = "status=200 route=- duration_ms=12.345\n";
        assert_eq!(line(AccessLog::Text, "/a"), format!("time=1970-01-01T00:00:00.000Z path=/a {rest}"));
        assert_eq!(
            line(AccessLog::Text, "/a?b=1 status=500"),
            format!("time=1970-01-01T00:00:00.000Z path=\"/a?b=1 status=500\" {rest}")
        );
        assert_eq!(line(AccessLog::Text, "-"), format!("time=1970-01-01T00:00:00.000Z path=\"-\" {rest}"));
    }

    #[test]
    fn nothing_a_client_sends_splits_a_line_or_leaves_its_quotes() -> Result<(), serde_json::Error> {
        let nasty = "/\r\ntime=forged\"\\ \u{0}\u{1b}[31m\u{7f}\u{85}\u{2028}\u{2029}\u{202e}é";
        for format in [AccessLog::Text, AccessLog::Json] {
            let line = line(format, nasty);
            assert!(line.ends_with('\n'));
            assert_eq!(
                line.matches(|c: char| c.is_control() || "\u{2028}\u{2029}\u{202e}".contains(c)).count(),
                1
            );
        }
        let parsed: serde_json::Value = serde_json::from_str(&line(AccessLog::Json, nasty))?;
        assert_eq!(parsed["path"], nasty);
        assert_eq!(parsed["status"], 200);
        assert!(parsed["route"].is_null());
        assert_eq!(parsed["duration_ms"], 12.345);
        Ok(())
    }

    #[test]
    fn long_values_are_cut() {
        let line = line(AccessLog::Text, &"x".repeat(100_000));
        assert!(line.len() < MAX_VALUE + 200);
        assert!(line.contains("x…\" status=200"));
    }

    #[test]
    fn a_full_queue_drops_and_counts_instead_of_blocking() {
        let (queue, lines) = sync_channel(1);
        let log = Log { format: AccessLog::Text, queue: Some(queue), dropped: Counter::default() };
        for _ in 0..3 {
            log.line(|line| line.text("event", Some("request")));
        }
        assert_eq!(log.dropped.get(), 2);
        drop(lines);
        log.line(|_| ());
        assert_eq!(log.dropped.get(), 3);
    }
}
