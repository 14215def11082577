//! TCP: echo, server-first, sink, and the client for all three.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lab::apps::{TcpAnswer, TcpReport};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::{ServerOptions, listen, print};

const BUFFER: usize = 64 * 1024;
/// A greeting or a report is no longer than this.
const LONGEST_LINE: usize = 4096;

/// How a server behaves.
#[derive(Debug, Clone, Copy)]
pub struct Manner {
    /// Speaks first.
    pub greet: bool,
    /// Sends back what it gets.
    pub echo: bool,
    /// Says in the end what it saw.
    pub report: bool,
}

impl Manner {
    pub fn echo(report: bool) -> Self {
        Self { greet: false, echo: true, report }
    }
}

pub async fn serve(options: ServerOptions, manner: Manner) -> Result<()> {
    let listener = listen::tcp(options.listen)?;
    let name = Arc::new(options.name);
    loop {
        let (stream, peer) = listener.accept().await?;
        let name = Arc::clone(&name);
        tokio::spawn(async move {
            if let Err(error) = answer(stream, peer, &name, manner).await {
                eprintln!("connection of {peer}: {error:#}");
            }
        });
    }
}

async fn answer(mut stream: TcpStream, peer: SocketAddr, name: &str, manner: Manner) -> Result<()> {
    stream.set_nodelay(true)?;
    if manner.greet {
        stream.write_all(format!("220 {name} ready\r\n").as_bytes()).await?;
    }
    let mut buffer = vec![0; BUFFER];
    let mut received = 0;
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        received += n as u64;
        if manner.echo {
            stream.write_all(&buffer[..n]).await?;
        }
    }
    if manner.report {
        let report = TcpReport {
            pod: name.to_owned(),
            peer: listen::canonical(peer),
            peername: listen::canonical(stream.peer_addr()?),
            local: listen::canonical(stream.local_addr()?),
            received,
        };
        stream.write_all(serde_json::to_string(&report)?.as_bytes()).await?;
    }
    stream.shutdown().await?;
    Ok(())
}

#[derive(Debug, Args)]
pub struct Client {
    /// Where to connect to
    to: SocketAddr,
    /// How many bytes to send
    #[arg(long, default_value_t = 1024)]
    bytes: u64,
    /// The server speaks first: wait for its line before sending
    #[arg(long)]
    greeting: bool,
    /// The server ends with a report
    #[arg(long)]
    report: bool,
    /// The server sends nothing back but its report
    #[arg(long)]
    sink: bool,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
}

impl Client {
    pub async fn run(self) -> Result<()> {
        let limit = Duration::from_millis(self.timeout_ms);
        let answer = tokio::time::timeout(limit, self.talk()).await;
        print(&answer.with_context(|| format!("{} did not come to an end within {limit:?}", self.to))??)
    }

    async fn talk(&self) -> Result<TcpAnswer> {
        let stream =
            TcpStream::connect(self.to).await.with_context(|| format!("connecting to {}", self.to))?;
        stream.set_nodelay(true)?;
        let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
        let (mut reader, writer) = stream.into_split();
        let greeting = if self.greeting { Some(read_line(&mut reader).await?) } else { None };
        let sending = tokio::spawn(send(writer, self.bytes));
        let echoed = if self.sink { 0 } else { self.bytes };
        let (received, intact, rest) = read_back(&mut reader, echoed).await?;
        let _writer = sending.await?.context("sending")?;
        let report = match (self.report || self.sink, rest.is_empty()) {
            (true, _) => Some(serde_json::from_slice(&rest).context("reading the server's report")?),
            (false, true) => None,
            (false, false) => bail!("{} bytes more came back than were sent", rest.len()),
        };
        Ok(TcpAnswer { sent: self.bytes, received, intact, greeting, report, peer, local })
    }
}

async fn read_line(reader: &mut OwnedReadHalf) -> Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        if line.len() > LONGEST_LINE {
            bail!("the greeting does not end");
        }
        line.push(reader.read_u8().await.context("waiting for the server's greeting")?);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// Sends the pattern and shuts the write side down. The half is handed back, so that the socket stays half open.
async fn send(mut writer: OwnedWriteHalf, bytes: u64) -> Result<OwnedWriteHalf> {
    let mut sent = 0;
    while sent < bytes {
        let n = (bytes - sent).min(BUFFER as u64);
        let chunk: Vec<u8> = (sent..sent + n).map(pattern).collect();
        writer.write_all(&chunk).await?;
        sent += n;
    }
    writer.shutdown().await?;
    Ok(writer)
}

/// Reads to the end: how many of the first `echoed` bytes came, whether they are the pattern, and what followed.
async fn read_back(reader: &mut OwnedReadHalf, echoed: u64) -> Result<(u64, bool, Vec<u8>)> {
    let mut buffer = vec![0; BUFFER];
    let (mut received, mut intact, mut rest) = (0_u64, true, Vec::new());
    loop {
        let n = reader.read(&mut buffer).await.with_context(|| format!("reading, after {received} bytes"))?;
        if n == 0 {
            return Ok((received, intact && received == echoed, rest));
        }
        let (echo, more) = buffer[..n].split_at(n.min((echoed - received) as usize));
        intact &= echo.iter().zip(received..).all(|(byte, at)| *byte == pattern(at));
        received += echo.len() as u64;
        rest.extend_from_slice(more);
        if rest.len() > BUFFER {
            bail!("the server goes on and on after {received} bytes");
        }
    }
}

/// A byte that depends on all of its position, so that nothing can be swapped unnoticed.
fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
