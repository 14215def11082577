//! Raw bytes: a client that sends exactly what it is told, and a server that answers with it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lab::apps::{Bytes, RawAnswer, RawEnd};
use tokio::{
    io::{self, AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout_at},
};

use crate::{ServerOptions, listen, print};

const BUFFER: usize = 64 * 1024;
/// What is read at once of a sip.
const SIP: usize = 16 * 1024;
/// What is received is kept up to this.
const KEPT: usize = 16 * 1024 * 1024;
/// A head is no longer than this.
const LONGEST_HEAD: usize = 1024 * 1024;

#[derive(Debug, Args)]
pub struct Client {
    /// Where to connect to
    to: SocketAddr,
    /// Say what came until then, after this many milliseconds
    #[arg(long, default_value_t = 10_000)]
    limit_ms: u64,
    /// `send:BYTES`, `repeat:N:BYTES`, `drip:MS:BYTES`, `expect:BYTES`, `pause:MS`, `deaf:MS` (reads nothing),
    /// `sip:MS:TIMES` (reads little, so often), `finish`, `leave`, `reset`; bytes with escapes as in a Rust string
    #[arg(value_parser = step)]
    steps: Vec<Step>,
}

/// One step of a script.
#[derive(Debug, Clone)]
enum Step {
    Send(Vec<u8>),
    Repeat(u64, Vec<u8>),
    Drip(Duration, Vec<u8>),
    Expect(Vec<u8>),
    Pause(Duration),
    Deaf(Duration),
    Sip(Duration, u64),
    Finish,
    Leave,
    Reset,
}

fn step(text: &str) -> Result<Step> {
    let (verb, rest) = text.split_once(':').unwrap_or((text, ""));
    let counted = || {
        let (number, bytes) = rest.split_once(':').context("a number, a colon, bytes")?;
        anyhow::Ok((number.parse::<u64>()?, Bytes::unescape(bytes)?.0))
    };
    Ok(match verb {
        "send" => Step::Send(Bytes::unescape(rest)?.0),
        "expect" => Step::Expect(Bytes::unescape(rest)?.0),
        "pause" => Step::Pause(Duration::from_millis(rest.parse()?)),
        "deaf" => Step::Deaf(Duration::from_millis(rest.parse()?)),
        "sip" => {
            let (millis, times) = rest.split_once(':').context("a number, a colon, a number")?;
            Step::Sip(Duration::from_millis(millis.parse()?), times.parse()?)
        }
        "repeat" => counted().map(|(times, bytes)| Step::Repeat(times, bytes))?,
        "drip" => counted().map(|(millis, bytes)| Step::Drip(Duration::from_millis(millis), bytes))?,
        "finish" => Step::Finish,
        "leave" => Step::Leave,
        "reset" => Step::Reset,
        _ => bail!("no such step: {verb}"),
    })
}

/// A connection in the course of its script.
struct Talk {
    stream: TcpStream,
    received: Vec<u8>,
    /// What steps have waited for already.
    expected: usize,
    sent: u64,
    write_error: Option<String>,
}

impl Client {
    pub async fn run(self) -> Result<()> {
        let began = Instant::now();
        let deadline = began + Duration::from_millis(self.limit_ms);
        let connected = timeout_at(deadline, TcpStream::connect(self.to)).await;
        let stream = connected.context("connecting took too long")?;
        let stream = stream.with_context(|| format!("connecting to {}", self.to))?;
        stream.set_nodelay(true)?;
        let mut talk = Talk { stream, received: Vec::new(), expected: 0, sent: 0, write_error: None };
        let end = timeout_at(deadline, talk.play(&self.steps)).await.unwrap_or(RawEnd::Open);
        let Talk { received, sent, write_error, .. } = talk;
        let millis = began.elapsed().as_millis() as u64;
        print(&RawAnswer { received: Bytes(received), end, write_error, sent, millis })
    }
}

impl Talk {
    async fn play(&mut self, steps: &[Step]) -> RawEnd {
        for step in steps {
            let ended = match step {
                Step::Send(bytes) => self.send(bytes).await,
                Step::Repeat(times, bytes) => {
                    let mut ended = None;
                    for _ in 0..*times {
                        ended = self.send(bytes).await;
                        if ended.is_some() || self.write_error.is_some() {
                            break;
                        }
                    }
                    ended
                }
                Step::Drip(every, bytes) => self.drip(*every, bytes).await,
                Step::Expect(bytes) => self.expect(bytes).await,
                Step::Pause(time) => self.pause(*time).await,
                Step::Deaf(time) => {
                    sleep(*time).await;
                    None
                }
                Step::Sip(every, times) => self.sip(*every, *times).await,
                Step::Finish => {
                    // An error says that the other side has ended it all, which reading says as well.
                    let _ = self.stream.shutdown().await;
                    None
                }
                Step::Leave => Some(RawEnd::Left),
                Step::Reset => {
                    // Closing with a zero linger is how a reset is asked for; it cannot fail on a live socket.
                    let _ = self.stream.set_zero_linger();
                    Some(RawEnd::Left)
                }
            };
            if let Some(end) = ended {
                return end;
            }
        }
        loop {
            if let Some(end) = self.read().await {
                return end;
            }
        }
    }

    /// Writes all of it, and reads what comes meanwhile, so that a server that answers early is not stuck.
    async fn send(&mut self, mut bytes: &[u8]) -> Option<RawEnd> {
        while !bytes.is_empty() && self.write_error.is_none() {
            let ready = self.stream.ready(io::Interest::READABLE | io::Interest::WRITABLE).await;
            match ready {
                Ok(ready) if ready.is_readable() => {
                    if let Some(end) = self.take() {
                        return Some(end);
                    }
                }
                Ok(_) => {}
                Err(error) => self.write_error = Some(error.to_string()),
            }
            match self.stream.try_write(bytes) {
                Ok(written) => {
                    self.sent += written as u64;
                    bytes = &bytes[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => self.write_error = Some(error.to_string()),
            }
        }
        None
    }

    async fn drip(&mut self, every: Duration, bytes: &[u8]) -> Option<RawEnd> {
        for byte in bytes {
            if let Some(end) = self.pause(every).await {
                return Some(end);
            }
            if let Some(end) = self.send(&[*byte]).await {
                return Some(end);
            }
            if self.write_error.is_some() {
                break;
            }
        }
        None
    }

    /// Reads a little, after this time, so many times.
    async fn sip(&mut self, every: Duration, times: u64) -> Option<RawEnd> {
        for _ in 0..times {
            sleep(every).await;
            let _ = self.stream.readable().await;
            if let Some(end) = self.take_at_most(SIP) {
                return Some(end);
            }
        }
        None
    }

    /// Reads for this time.
    async fn pause(&mut self, time: Duration) -> Option<RawEnd> {
        let until = Instant::now() + time;
        loop {
            match timeout_at(until, self.read()).await {
                Ok(None) => {}
                Ok(Some(end)) => return Some(end),
                Err(_) => return None,
            }
        }
    }

    async fn expect(&mut self, bytes: &[u8]) -> Option<RawEnd> {
        loop {
            let unseen = &self.received[self.expected..];
            if let Some(at) = unseen.windows(bytes.len().max(1)).position(|window| window == bytes) {
                self.expected += at + bytes.len();
                return None;
            }
            if let Some(end) = self.read().await {
                return Some(end);
            }
        }
    }

    async fn read(&mut self) -> Option<RawEnd> {
        // An error of the socket is told by the read that follows.
        let _ = self.stream.readable().await;
        self.take()
    }

    /// Takes what has come, if anything.
    fn take(&mut self) -> Option<RawEnd> {
        self.take_at_most(BUFFER)
    }

    fn take_at_most(&mut self, count: usize) -> Option<RawEnd> {
        let mut buffer = vec![0; count];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => Some(RawEnd::Closed),
            Ok(read) => {
                let kept = read.min(KEPT.saturating_sub(self.received.len()));
                self.received.extend(&buffer[..kept]);
                None
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) => Some(RawEnd::Reset),
        }
    }
}

#[derive(Debug, Args)]
pub struct Server {
    #[command(flatten)]
    options: ServerOptions,
    /// What a request is answered with, with escapes as in a Rust string; several answer one request each
    #[arg(long, value_parser = Bytes::unescape)]
    response: Vec<Bytes>,
    /// What follows the last of them
    #[arg(long, value_enum, default_value = "close")]
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Then {
    Close,
    Reset,
    Keep,
}

pub async fn serve(server: Server) -> Result<()> {
    let listener = listen::tcp(server.options.listen)?;
    let server = Arc::new(server);
    loop {
        let (stream, peer) = listener.accept().await?;
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            if let Err(error) = server.answer(stream).await {
                eprintln!("connection of {peer}: {error:#}");
            }
        });
    }
}

impl Server {
    async fn answer(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut read = Vec::new();
        for response in &self.response {
            if !head(&mut stream, &mut read).await? {
                return Ok(());
            }
            stream.write_all(&response.0).await?;
        }
        match self.then {
            Then::Reset => {
                // What was written is to arrive before the reset does.
                sleep(BEFORE_RESET).await;
                stream.set_zero_linger()?;
                return Ok(());
            }
            Then::Close => stream.shutdown().await?,
            Then::Keep => {}
        }
        let mut buffer = vec![0; BUFFER];
        while stream.read(&mut buffer).await? > 0 {}
        Ok(())
    }
}

/// How long a response has to arrive before a reset overtakes it.
const BEFORE_RESET: Duration = Duration::from_millis(50);

/// Reads until the end of a request's head, and takes it off what was read. Says whether one came.
async fn head(stream: &mut TcpStream, read: &mut Vec<u8>) -> Result<bool> {
    const END: &[u8] = b"\r\n\r\n";
    loop {
        if let Some(at) = read.windows(END.len()).position(|window| window == END) {
            read.drain(..at + END.len());
            return Ok(true);
        }
        if read.len() > LONGEST_HEAD {
            bail!("the request's head does not end");
        }
        let mut buffer = vec![0; BUFFER];
        match stream.read(&mut buffer).await? {
            0 => return Ok(false),
            more => read.extend(&buffer[..more]),
        }
    }
}
