//! Load: clients that ask again and again, each answer checked, until SIGTERM. What was seen is printed ten times a
//! second, and once more at the end.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Uri,
    client::conn::http1,
    header::{CONNECTION, HOST},
};
use hyper_util::rt::TokioIo;
use lab::apps::{Echo, LoadKind, Loaded, Note};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{interval, sleep, timeout},
};
use tokio_tungstenite::tungstenite::Message;
use tonic::Streaming;

use crate::{grpc, http_client, print, tunnel};

/// When an answer counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often what was seen is printed.
const TELL_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Args)]
pub struct Options {
    /// What each client does
    kind: LoadKind,
    /// The server, as `http://ADDRESS:PORT/PATH`
    url: Uri,
    /// How many clients
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// Pause after each answer, in milliseconds
    #[arg(long, default_value_t = 100)]
    pause_ms: u64,
}

/// What all clients have seen.
#[derive(Debug, Default)]
struct Seen {
    loaded: Mutex<(Loaded, Vec<u64>)>,
}

impl Seen {
    fn note(&self, change: impl FnOnce(&mut Loaded, &mut Vec<u64>)) {
        let mut seen = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let (loaded, answers) = &mut *seen;
        change(loaded, answers);
    }

    fn tell(&self) -> Result<()> {
        let seen = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let (loaded, answers) = &*seen;
        let least = answers.iter().min().copied().unwrap_or_default();
        print(&Loaded { answers: answers.iter().sum(), least, ..loaded.clone() })
    }
}

impl Options {
    pub async fn run(self) -> Result<()> {
        let mut told = signal(SignalKind::terminate())?;
        let (stop, stopping) = watch::channel(false);
        let seen = Arc::new(Seen::default());
        seen.note(|_, answers| answers.resize(self.clients, 0));
        let mut clients = JoinSet::new();
        for number in 0..self.clients {
            clients.spawn(client(self.clone(), number, Arc::clone(&seen), stopping.clone()));
        }
        let mut tick = interval(TELL_EVERY);
        loop {
            tokio::select! {
                _ = tick.tick() => seen.tell()?,
                _ = told.recv() => drop(stop.send(true)),
                ended = clients.join_next() => match ended {
                    Some(ended) => ended?,
                    None => return seen.tell(),
                },
            }
        }
    }
}

async fn client(options: Options, number: usize, seen: Arc<Seen>, mut stopping: watch::Receiver<bool>) {
    let ended = async {
        let mut session = within(open(&options)).await.context("opening")?;
        let opened = u64::from(!matches!(session, Session::Requests | Session::KeptAlive(_)));
        seen.note(|loaded, _| loaded.opened += opened);
        for step in 0_u64.. {
            if *stopping.borrow() {
                break;
            }
            let opened = within(session.step(&options.url, number, step)).await?;
            seen.note(|loaded, answers| {
                loaded.opened += opened;
                answers[number] += 1;
            });
            tokio::select! {
                () = sleep(Duration::from_millis(options.pause_ms)) => {}
                _ = stopping.changed() => {}
            }
        }
        within(session.end()).await.context("ending")
    };
    if let Err(error) = ended.await {
        seen.note(|loaded, _| *loaded.errors.entry(format!("{error:#}")).or_default() += 1);
    }
}

async fn within<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(PATIENCE, answer).await.with_context(|| format!("nothing within {PATIENCE:?}"))?
}

/// What one client has open.
enum Session {
    /// Nothing between two requests.
    Requests,
    KeptAlive(Option<http1::SendRequest<Empty<Bytes>>>),
    Tcp(TcpStream),
    Grpc(mpsc::UnboundedSender<Note>, Box<Streaming<Note>>),
    WebSocket(Box<tunnel::Socket>),
}

async fn open(options: &Options) -> Result<Session> {
    Ok(match options.kind {
        LoadKind::Requests => Session::Requests,
        LoadKind::KeptAlive => Session::KeptAlive(None),
        LoadKind::Tcp => Session::Tcp(http_client::connect(&options.url).await?),
        LoadKind::Grpc => {
            let (asking, answers) = grpc::converse(&options.url).await?;
            Session::Grpc(asking, Box::new(answers))
        }
        LoadKind::WebSocket => {
            Session::WebSocket(Box::new(tunnel::WebSocket::to(options.url.clone()).await?))
        }
    })
}

impl Session {
    /// Asks once and checks the answer. How many connections it took.
    async fn step(&mut self, url: &Uri, number: usize, step: u64) -> Result<u64> {
        let text = format!("client {number} step {step}");
        match self {
            Self::Requests => {
                let path = format!("/load?client={number}&step={step}");
                let h2c = step % 2 == 1;
                let request = request(url, &path, h2c)?;
                let io = TokioIo::new(http_client::connect(url).await?);
                let response = http_client::send(io, request, h2c).await.context("waiting for the answer")?;
                check(response, &path).await?;
                return Ok(1);
            }
            Self::KeptAlive(kept) => {
                let path = format!("/kept?client={number}&step={step}");
                let (mut sender, opened) = match kept.take() {
                    Some(sender) => (sender, 0),
                    None => (keep(url).await?, 1),
                };
                let response = sender
                    .send_request(request(url, &path, false)?)
                    .await
                    .context("waiting for the answer")?;
                let closing = response.headers().get(CONNECTION).is_some_and(|value| value == "close");
                check(response, &path).await?;
                *kept = (!closing).then_some(sender);
                return Ok(opened);
            }
            Self::Tcp(stream) => {
                stream.write_all(text.as_bytes()).await?;
                let mut back = vec![0; text.len()];
                stream.read_exact(&mut back).await?;
                ensure!(back == text.as_bytes(), "something else came back");
            }
            Self::Grpc(asking, answers) => {
                asking.send(Note { text: text.clone(), ..Note::default() })?;
                let note = answers.message().await?.context("the call ended")?;
                ensure!(
                    (&*note.text, note.count) == (&*text, step + 1),
                    "something else came back: {note:?}"
                );
            }
            Self::WebSocket(socket) => {
                socket.send(Message::text(&text)).await?;
                let back = socket.next().await.context("the socket ended")??;
                ensure!(back == Message::text(&text), "something else came back: {back}");
            }
        }
        Ok(0)
    }

    /// Ends what is open, and sees the other side do the same.
    async fn end(self) -> Result<()> {
        match self {
            Self::Requests | Self::KeptAlive(_) => {}
            Self::Tcp(mut stream) => {
                stream.shutdown().await?;
                ensure!(stream.read(&mut [0]).await? == 0, "more came back than was sent");
            }
            Self::Grpc(asking, mut answers) => {
                drop(asking);
                ensure!(answers.message().await?.is_none(), "more notes came back than were sent");
            }
            Self::WebSocket(mut socket) => {
                socket.send(Message::Close(None)).await?;
                match socket.next().await {
                    None | Some(Ok(Message::Close(_))) => {}
                    other => bail!("no close but {other:?}"),
                }
            }
        }
        Ok(())
    }
}

async fn keep(url: &Uri) -> Result<http1::SendRequest<Empty<Bytes>>> {
    let io = TokioIo::new(http_client::connect(url).await?);
    let (sender, connection) = http1::handshake(io).await?;
    tokio::spawn(connection);
    Ok(sender)
}

fn request(url: &Uri, path: &str, h2c: bool) -> Result<Request<Empty<Bytes>>> {
    let authority = url.authority().context("the URL has no host")?.as_str();
    let request = if h2c {
        Request::builder().uri(format!("http://{authority}{path}"))
    } else {
        Request::builder().uri(path).header(HOST, authority)
    };
    Ok(request.body(Empty::new())?)
}

async fn check(response: hyper::Response<hyper::body::Incoming>, path: &str) -> Result<()> {
    let status = response.status();
    let body = response.into_body().collect().await.context("reading the answer")?.to_bytes();
    let text = String::from_utf8_lossy(&body);
    ensure!(status.is_success(), "{status}: {text}");
    let echo: Echo = serde_json::from_slice(&body).with_context(|| format!("no echo: {text}"))?;
    ensure!(echo.target == path, "the answer to {} came", echo.target);
    Ok(())
}
