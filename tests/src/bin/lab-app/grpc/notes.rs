//! The service `lab.Notes`: a method of each kind of gRPC, and its client. All four are the same on the wire, a
//! stream of notes each way; the kind decides what is answered.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use futures_util::{Stream, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::{
    Request as HttpRequest, Response as HttpResponse, Uri,
    body::Incoming,
    client::conn::http2,
    header::{HeaderName, HeaderValue},
    http::uri::PathAndQuery,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lab::apps::{CallKind, Called, Note};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tonic::{
    Code, Extensions, Request, Response, Status, Streaming,
    body::Body,
    client::Grpc as Client,
    codegen::{BoxFuture, BoxStream, Service},
    metadata::MetadataMap,
    server::{Grpc as Server, StreamingService},
};
use tonic_prost::ProstCodec;

use crate::{http_client, http_server::plain, print};

const TIMEOUT: &str = "grpc-timeout";

/// A method of the service, for one call.
#[derive(Debug, Clone)]
pub struct Notes {
    pub pod: String,
    pub kind: CallKind,
}

impl Notes {
    /// Answers a call.
    pub async fn serve(self, request: HttpRequest<Incoming>) -> HttpResponse<Body> {
        let codec = ProstCodec::<Note, Note>::default();
        Server::new(codec).max_decoding_message_size(usize::MAX).streaming(self, request).await
    }

    /// The kind of call that a path is.
    pub fn kind(path: &str) -> Option<CallKind> {
        use CallKind::{Bidi, ClientStream, ServerStream, Unary};
        [Unary, ServerStream, ClientStream, Bidi].into_iter().find(|kind| kind.path() == path)
    }

    async fn answers(self, request: Request<Streaming<Note>>) -> Result<BoxStream<Note>, Status> {
        let timeout = request.metadata().get(TIMEOUT).and_then(|timeout| timeout.to_str().ok());
        let (timeout, pod) = (timeout.unwrap_or_default().to_owned(), self.pod);
        let mut notes = request.into_inner();
        let answer =
            move |note: Note, count| Note { count, pod: pod.clone(), timeout: timeout.clone(), ..note };
        Ok(match self.kind {
            CallKind::Bidi => ending(
                notes.enumerate().map(move |(number, note)| note.map(|note| answer(note, number as u64 + 1))),
            ),
            CallKind::ClientStream => {
                let (mut last, mut count) = (Note::default(), 0);
                while let Some(note) = notes.message().await? {
                    (last, count) = (note, count + 1);
                }
                ending(stream::iter([Ok(answer(last, count))]))
            }
            CallKind::Unary | CallKind::ServerStream => {
                let note = notes.message().await?.ok_or_else(|| Status::invalid_argument("no note came"))?;
                if let Some(code) = note.text.strip_prefix("refuse/").and_then(|code| code.parse().ok()) {
                    return Err(Status::new(Code::from_i32(code), "refused on demand"));
                }
                let count = if self.kind == CallKind::Unary { 1 } else { note.count };
                ending(stream::iter((1..=count).map(move |number| Ok(answer(note.clone(), number)))))
            }
        })
    }
}

/// The answers, each after the time that it asks for, and the status that the last one asks for in the end.
fn ending(answers: impl Stream<Item = Result<Note, Status>> + Send + 'static) -> BoxStream<Note> {
    let start = (Box::pin(answers), None);
    Box::pin(stream::unfold(start, |(mut answers, mut status)| async move {
        let next = match answers.next().await {
            Some(Ok(note)) => {
                let (verb, number) = note.text.split_once('/').unwrap_or_default();
                match (verb, number.parse::<u32>()) {
                    ("sleep", Ok(millis)) => sleep(Duration::from_millis(millis.into())).await,
                    ("status", Ok(code)) => status = i32::try_from(code).ok(),
                    _ => {}
                }
                Ok(note)
            }
            Some(Err(error)) => Err(error),
            None => Err(Status::new(Code::from_i32(status.take()?), "ended on demand")),
        };
        Some((next, (answers, status)))
    }))
}

impl StreamingService<Note> for Notes {
    type Response = Note;
    type ResponseStream = BoxStream<Note>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<Note>>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move { this.answers(request).await.map(Response::new) })
    }
}

#[derive(Debug, Args)]
pub struct Call {
    /// The server, as `http://ADDRESS:PORT`
    url: Uri,
    /// The method
    kind: CallKind,
    /// How many notes to send, or to ask for
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// The text of each
    #[arg(long, default_value = "")]
    text: String,
    /// Bytes of filling in each
    #[arg(long, default_value_t = 0)]
    filling: usize,
    /// Send this `grpc-timeout`, in milliseconds, and leave it to others to keep it
    #[arg(long)]
    deadline_ms: Option<u64>,
    /// A header, as `name: value`; may be given several times
    #[arg(long, value_parser = http_client::header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
}

impl Call {
    pub async fn run(self) -> Result<()> {
        let limit = Duration::from_millis(self.timeout_ms);
        let called = tokio::time::timeout(limit, self.call()).await;
        print(&called.with_context(|| format!("{} did not come to an end within {limit:?}", self.url))??)
    }

    async fn call(&self) -> Result<Called> {
        let began = Instant::now();
        let io = TokioIo::new(http_client::connect(&self.url).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        let mut client = Client::with_origin(Direct(sender), self.url.clone());
        client = client.max_decoding_message_size(usize::MAX);
        client.ready().await?;
        let sent = if matches!(self.kind, CallKind::Unary | CallKind::ServerStream) { 1 } else { self.count };
        let note = Note {
            text: self.text.clone(),
            count: self.count,
            filling: vec![7; self.filling],
            ..Note::default()
        };
        let notes = stream::iter((0..sent).map(move |_| note.clone()));
        let path = PathAndQuery::from_static(self.kind.path());
        let request = Request::from_parts(self.metadata()?, Extensions::default(), notes);
        let answered = client.streaming(request, path, ProstCodec::<Note, Note>::default()).await;
        let mut notes = Vec::new();
        let (status, metadata) = match answered {
            Ok(response) => hear(response.into_inner(), &mut notes).await,
            Err(status) => (status.clone(), status.metadata().clone()),
        };
        Ok(Called {
            code: format!("{:?}", status.code()),
            message: status.message().to_owned(),
            notes,
            metadata: plain(&metadata.into_headers()),
            millis: began.elapsed().as_millis() as u64,
        })
    }

    fn metadata(&self) -> Result<MetadataMap> {
        let mut headers = hyper::HeaderMap::new();
        for (name, value) in &self.header {
            headers.append(name, value.clone());
        }
        if let Some(millis) = self.deadline_ms {
            headers.insert(TIMEOUT, HeaderValue::try_from(format!("{millis}m"))?);
        }
        Ok(MetadataMap::from_headers(headers))
    }
}

/// A call of `Bidi` on a connection of its own, open until what sends is dropped.
pub async fn converse(url: &Uri) -> Result<(mpsc::UnboundedSender<Note>, Streaming<Note>)> {
    let io = TokioIo::new(http_client::connect(url).await?);
    let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
    tokio::spawn(connection);
    let mut client = Client::with_origin(Direct(sender), url.clone());
    client.ready().await?;
    let (asking, asked) = mpsc::unbounded_channel();
    let notes = stream::unfold(asked, |mut asked: mpsc::UnboundedReceiver<Note>| async {
        Some((asked.recv().await?, asked))
    });
    let path = PathAndQuery::from_static(CallKind::Bidi.path());
    let codec = ProstCodec::<Note, Note>::default();
    let answered = client.streaming(Request::new(notes), path, codec).await?;
    Ok((asking, answered.into_inner()))
}

/// The notes, and what the call ended with.
async fn hear(mut answers: Streaming<Note>, notes: &mut Vec<Note>) -> (Status, MetadataMap) {
    loop {
        match answers.message().await {
            Ok(Some(note)) => notes.push(Note { filling: Vec::new(), ..note }),
            Ok(None) => {
                let trailers = answers.trailers().await.ok().flatten().unwrap_or_default();
                return (Status::ok(""), trailers);
            }
            Err(status) => return (status.clone(), status.metadata().clone()),
        }
    }
}

/// One connection, with nothing of a channel that would act on a deadline by itself.
struct Direct(http2::SendRequest<Body>);

impl Service<HttpRequest<Body>> for Direct {
    type Response = HttpResponse<Body>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Self::Future {
        let sent = self.0.send_request(request);
        Box::pin(async move {
            Ok(sent.await?.map(|body| Body::new(body.map_err(|error| Status::from_error(error.into())))))
        })
    }
}
