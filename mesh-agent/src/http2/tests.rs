//! Streams as both ends see them, over in-memory pipes and with a paused clock.

mod breaking;
mod turns;
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use super::*;
use crate::{
    body::{Body, BodyError, Inform, Stall},
    drain::Drain,
    error::{Error, Kind, Result},
};
use ::bytes::Bytes;
use h2::{Reason, client::SendRequest};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::oneshot,
    task::JoinHandle,
};

pub(super) type TestResult = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

const STALL: Stall = Stall { idle: None, flush: Duration::from_mins(5) };
pub(super) const OPTIONS: Options = Options {
    handshake: Duration::from_secs(10),
    ping: None,
    idle: Some(Duration::from_hours(1)),
    flush: Duration::from_mins(5),
};

/// A body made of what a test wants to come next.
struct Made<F>(F);

impl<F> http_body::Body for Made<F>
where
    F: FnMut(&mut Context<'_>) -> Poll<Option<std::result::Result<Frame<Bytes>, BodyError>>> + Unpin,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, BodyError>>> {
        (self.0)(cx)
    }
}

struct Served {
    sender: SendRequest<Bytes>,
    drain: Drain,
    serving: JoinHandle<Result<Ended>>,
    client: JoinHandle<std::result::Result<(), h2::Error>>,
}

/// A connection whose streams are handled by this.
async fn served<H, F>(client: h2::client::Builder, handle: H) -> std::result::Result<Served, h2::Error>
where
    H: Fn(Request<Body>, ServerStream) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (near, far) = tokio::io::duplex(1 << 16);
    let drain = Drain::default();
    let token = drain.clone();
    let serving = tokio::spawn(async move {
        serve(far, &h2::server::Builder::new(), OPTIONS, &token, Watch::none(), handle).await
    });
    let (sender, connection) = client.handshake(near).await?;
    Ok(Served { sender, drain, serving, client: tokio::spawn(connection) })
}

pub(super) async fn echo(request: Request<Body>, stream: ServerStream) {
    let reply = async { Reply::Response(Response::new(request.into_body())) };
    stream.run(reply, STALL).await;
}

fn get() -> std::result::Result<Box<Request<Body>>, http::Error> {
    Request::get("http://a/").body(Body::Empty).map(Box::new)
}

/// Remembers what it is told.
#[derive(Default)]
struct Told(Mutex<Vec<(StatusCode, HeaderMap)>>);

impl Inform for Told {
    fn inform(&self, status: StatusCode, headers: &HeaderMap) {
        if let Ok(mut told) = self.0.lock() {
            told.push((status, headers.clone()));
        }
    }
}

#[tokio::test]
async fn bodies_and_trailers_pass_both_ways() -> TestResult {
    let served = served(h2::client::Builder::new(), echo).await?;
    let request = Request::post("http://a/").body(Body::from(Bytes::from_static(b"a body")))?;
    let response =
        send(served.sender.clone(), Box::new(request), None).await.map_err(|failed| failed.error)?;
    // What came back has no trailers; sent on, it has the length it was given.
    assert_eq!(response.into_body().collect().await?.to_bytes(), "a body");
    Ok(())
}

#[tokio::test]
async fn interim_responses_come_before_the_final_one() -> TestResult {
    let served = served(h2::client::Builder::new(), |_, stream: ServerStream| async move {
        let inform = stream.informer();
        let making = async move {
            let link = HeaderMap::from_iter([(
                HeaderName::from_static("link"),
                HeaderValue::from_static("</style.css>"),
            )]);
            inform.inform(StatusCode::EARLY_HINTS, &link);
            tokio::task::yield_now().await;
            inform.inform(StatusCode::PROCESSING, &HeaderMap::new());
            Reply::Response(Response::new(Body::Empty))
        };
        stream.run(making, STALL).await;
    })
    .await?;
    let told = Told::default();
    let response = send(served.sender, get()?, Some(&told)).await.map_err(|failed| failed.error)?;
    assert_eq!(response.status(), StatusCode::OK);
    let told = told.0.into_inner()?;
    let statuses: Vec<_> = told.iter().map(|(status, _)| status.as_u16()).collect();
    assert_eq!(statuses, [103, 102]);
    assert_eq!(told[0].1["link"], "</style.css>");
    Ok(())
}

#[tokio::test]
async fn a_client_that_gives_up_ends_the_making_of_its_answer() -> TestResult {
    let (gone, ended) = oneshot::channel::<()>();
    let gone = Mutex::new(Some(gone));
    let (began, begun) = oneshot::channel::<()>();
    let began = Mutex::new(Some(began));
    let served = served(h2::client::Builder::new(), move |_, stream: ServerStream| {
        let gone = gone.lock().ok().and_then(|mut gone| gone.take());
        let began = began.lock().ok().and_then(|mut began| began.take());
        async move {
            let making = async move {
                // Dropped with this future, and with nothing else.
                let _gone = gone;
                let _ = began.map(|began| began.send(()));
                std::future::pending::<Reply<Body>>().await
            };
            stream.run(making, STALL).await;
        }
    })
    .await?;
    let asking = tokio::spawn(send_owned(served.sender.clone(), get()?));
    begun.await?;
    asking.abort();
    assert!(ended.await.is_err(), "dropped without a word");
    Ok(())
}

async fn send_owned(
    sender: SendRequest<Bytes>,
    request: Box<Request<Body>>,
) -> std::result::Result<Response<Body>, Failed> {
    send(sender, request, None).await
}

#[tokio::test]
async fn a_body_that_breaks_off_resets_with_the_code_it_was_given() -> TestResult {
    for reason in [Reason::CANCEL, Reason::REFUSED_STREAM, Reason::INTERNAL_ERROR] {
        let served = served(h2::client::Builder::new(), move |_, stream: ServerStream| async move {
            let mut sent = false;
            let body = Made(move |cx: &mut Context<'_>| {
                if !sent {
                    sent = true;
                    cx.waker().wake_by_ref();
                    return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"half")))));
                }
                let error = Error { reset: Some(reason), ..Error::new(Kind::UpstreamReset, "broke off") };
                Poll::Ready(Some(Err(BodyError::Mesh(error))))
            });
            stream.run(async { Reply::Response(Response::new(body)) }, STALL).await;
        })
        .await?;
        let outcome = match send(served.sender, get()?, None).await {
            Ok(response) => response.into_body().collect().await.map(drop).map_err(|error| error.reason()),
            Err(failed) => Err(failed.error.reason().ok_or("no code")?),
        };
        assert_eq!(outcome, Err(reason));
    }
    Ok(())
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_back_the_writer() -> TestResult {
    const CHUNK: usize = 16 << 10;
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let served = served(h2::client::Builder::new(), move |_, stream: ServerStream| {
        let made = Arc::clone(&counted);
        async move {
            let body = Made(move |_: &mut Context<'_>| {
                made.fetch_add(CHUNK, Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[0; CHUNK])))))
            });
            stream.run(async { Reply::Response(Response::new(body)) }, STALL).await;
        }
    })
    .await?;
    let response = send(served.sender, get()?, None).await.map_err(|failed| failed.error)?;
    // Nothing left to do: all that can move has moved.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let window = 65_535;
    assert!(
        made.load(Ordering::Relaxed) <= window + 2 * CHUNK,
        "{made:?} bytes were made for a window of {window}"
    );
    drop(response);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_client_takes_nothing_is_given_up_alone() -> TestResult {
    let mut no_window = h2::client::Builder::new();
    no_window.initial_window_size(0);
    let served = served(no_window, |request: Request<Body>, stream: ServerStream| async move {
        let activity = stream.activity();
        let empty = request.uri().path() == "/empty";
        let body = Made(move |_: &mut Context<'_>| {
            activity.handed_over();
            Poll::Ready((!empty).then(|| Ok(Frame::data(Bytes::from_static(b"more")))))
        });
        stream.run(async { Reply::Response(Response::new(body)) }, STALL).await;
    })
    .await?;
    let begun = tokio::time::Instant::now();
    let stuck = send(served.sender.clone(), get()?, None).await.map_err(|failed| failed.error)?;
    let ended = stuck.into_body().collect().await.map(drop).map_err(|error| error.reason());
    assert_eq!(ended, Err(Reason::CANCEL));
    assert_eq!(begun.elapsed().as_secs(), 300);
    // The connection goes on.
    let empty = Request::get("http://a/empty").body(Body::Empty)?;
    let response = send(served.sender, Box::new(empty), None).await.map_err(|failed| failed.error)?;
    assert!(response.into_body().collect().await?.to_bytes().is_empty());
    Ok(())
}

#[tokio::test]
async fn streams_opened_only_to_be_reset_end_the_connection() -> TestResult {
    let served = served(h2::client::Builder::new(), |_, stream: ServerStream| async move {
        stream.run(std::future::pending::<Reply<Body>>(), STALL).await;
    })
    .await?;
    let mut opened = 0;
    let ended = loop {
        let mut sender = match served.sender.clone().ready().await {
            Ok(sender) => sender,
            Err(error) => break error,
        };
        match sender.send_request(Request::get("http://a/").body(())?, true) {
            Ok((_response, mut stream)) => stream.send_reset(Reason::CANCEL),
            Err(error) => break error,
        }
        opened += 1;
        assert!(opened < 10_000, "it goes on for ever");
        tokio::task::yield_now().await;
    };
    assert!(ended.is_go_away() && ended.reason() == Some(Reason::ENHANCE_YOUR_CALM), "{ended}");
    assert_eq!(served.serving.await?.map_err(|error| error.kind), Err(Kind::BadRequest));
    Ok(())
}

#[tokio::test]
async fn draining_finishes_what_is_under_way_and_takes_nothing_new() -> TestResult {
    let (go_on, may) = tokio::sync::watch::channel(false);
    let served = served(h2::client::Builder::new(), move |_, stream: ServerStream| {
        let mut may = may.clone();
        async move {
            let making = async move {
                let _ = may.wait_for(|may| *may).await;
                Reply::Response(Response::new(Body::Empty))
            };
            stream.run(making, STALL).await;
        }
    })
    .await?;
    let asking = tokio::spawn(send_owned(served.sender.clone(), get()?));
    // Until the stream is open.
    while go_on.receiver_count() < 2 {
        tokio::task::yield_now().await;
    }
    served.drain.start();
    while !is_closed(&served.sender) {
        tokio::task::yield_now().await;
    }
    let refused =
        send(served.sender.clone(), get()?, None).await.map(drop).map_err(|failed| failed.untouched);
    assert_eq!(refused, Err(true), "a new one may be sent elsewhere");
    go_on.send(true)?;
    assert_eq!(asking.await?.map_err(|failed| failed.error)?.status(), StatusCode::OK);
    served.serving.await??;
    Ok(())
}

#[tokio::test]
async fn a_connection_that_is_given_up_has_its_streams_stalled_and_waits_for_their_end() -> TestResult {
    /// Says whether its stream has stalled by its end.
    struct Tell(Arc<crate::body::Activity>, tokio::sync::mpsc::UnboundedSender<bool>);
    impl Drop for Tell {
        fn drop(&mut self) {
            let _ = self.1.send(self.0.has_stalled());
        }
    }
    let (near, far) = tokio::io::duplex(1 << 16);
    let (telling, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let (give_up, given_up) = oneshot::channel::<()>();
    let handle = move |request: Request<Body>, stream: ServerStream| {
        let (tell, begun) = (Tell(stream.activity(), telling.clone()), begun.clone());
        async move {
            // One has no answer when it ends, one half of one, and one is bytes.
            let making = async move {
                let _ = begun.send(());
                if request.method() == Method::CONNECT {
                    let take = move |mut stream: ByteStream| -> Taken {
                        Box::pin(async move {
                            let _ = stream.read_to_end(&mut Vec::new()).await;
                            drop(tell);
                        })
                    };
                    return Reply::Switch(Response::new(()), Box::new(take));
                }
                if request.uri().path() == "/" {
                    let _tell = tell;
                    return std::future::pending().await;
                }
                let body = Made(move |_: &mut Context<'_>| {
                    let _tell = &tell;
                    Poll::Pending
                });
                Reply::Response(Response::new(body))
            };
            stream.run(making, STALL).await;
        }
    };
    let serving = tokio::spawn(async move {
        let given_up = async {
            let _ = given_up.await;
            Error::new(Kind::StreamIdle, "it takes nothing")
        };
        let watch = Watch { along: None, connection: Arc::default(), given_up };
        serve(far, &h2::server::Builder::new(), OPTIONS, &Drain::default(), watch, handle).await
    });
    let (sender, connection) = h2::client::handshake(near).await?;
    let _client = tokio::spawn(connection);
    let half = Request::get("http://a/half").body(Body::Empty)?;
    let half = send(sender.clone(), Box::new(half), None).await.map_err(|failed| failed.error)?;
    let (switched, _open) =
        sender.clone().ready().await?.send_request(Request::connect("a:1").body(())?, false)?;
    switched.await?;
    let _none = tokio::spawn(send_owned(sender, get()?));
    for _ in 0..3 {
        begins.recv().await;
    }
    let _ = give_up.send(());
    assert_eq!(serving.await?.map_err(|error| error.kind), Err(Kind::StreamIdle));
    // All had ended by then.
    assert_eq!([told.try_recv()?, told.try_recv()?, told.try_recv()?], [true; 3]);
    assert!(half.into_body().collect().await.is_err());
    Ok(())
}

/// Bytes of DATA among the frames that come until the end, read at 1 KiB a second.
async fn data_read_slowly(mut near: DuplexStream) -> std::result::Result<usize, std::io::Error> {
    let (mut frames, mut piece, mut data) = (Vec::new(), [0; 1 << 10], 0);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let read = near.read(&mut piece).await?;
        if read == 0 {
            break;
        }
        frames.extend_from_slice(&piece[..read]);
    }
    let mut rest = &frames[..];
    while let [a, b, c, kind, _, _, _, _, _, ..] = *rest {
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        data += if kind == 0 { length } else { 0 };
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    Ok(data)
}

#[tokio::test(start_paused = true)]
async fn what_is_ready_for_a_slow_client_is_sent_before_a_goodbye_ends() -> TestResult {
    const BODY: usize = 30_000;
    for leaves in [true, false] {
        let (mut near, far) = tokio::io::duplex(1 << 10);
        let drain = Drain::default();
        let (token, leaving) = (drain.clone(), drain.clone());
        let handle = move |_: Request<Body>, stream: ServerStream| {
            if leaves {
                leaving.leave();
            }
            let body = Body::from(Bytes::from(vec![0; BODY]));
            stream.run(async { Reply::Response(Response::new(body)) }, STALL)
        };
        let options = Options { idle: Some(Duration::from_secs(5)), ..OPTIONS };
        let serving = tokio::spawn(async move {
            serve(far, &h2::server::Builder::new(), options, &token, Watch::none(), handle).await
        });
        // A GET, and not another word: no PING is answered.
        let get = [0, 0, 3, 1, 5, 0, 0, 0, 1, 0x82, 0x86, 0x84];
        near.write_all(&[PREFACE, &get].concat()).await?;
        assert_eq!(data_read_slowly(near).await?, BODY, "leaves: {leaves}");
        assert_eq!(serving.await??, if leaves { Ended::Done } else { Ended::Idle });
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_nobody_uses_is_closed() -> TestResult {
    let served = served(h2::client::Builder::new(), echo).await?;
    send(served.sender.clone(), get()?, None).await.map_err(|failed| failed.error)?;
    let begun = tokio::time::Instant::now();
    served.serving.await??;
    assert!((3600..=7200).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    drop(served.sender);
    served.client.await??;
    Ok(())
}

#[tokio::test]
async fn a_connect_that_is_granted_is_bytes_and_nothing_else_can_be() -> TestResult {
    let mut builder = h2::server::Builder::new();
    builder.enable_connect_protocol();
    let served = served(h2::client::Builder::new(), |_, stream: ServerStream| async move {
        let take = Box::new(|mut stream: ByteStream| -> Taken {
            Box::pin(async move {
                let mut all = Vec::new();
                if stream.read_to_end(&mut all).await.is_ok() {
                    let _ = stream.write_all(&all).await;
                    let _ = stream.shutdown().await;
                }
            })
        });
        stream.run(async { Reply::<Body>::Switch(Response::new(()), take) }, STALL).await;
    })
    .await?;
    let mut sender = served.sender.clone().ready().await?;
    let (response, send_stream) = sender.send_request(Request::connect("a:1").body(())?, false)?;
    let mut bytes = ByteStream::new(send_stream, response.await?.into_body(), None);
    bytes.write_all(b"to and fro").await?;
    bytes.shutdown().await?;
    let mut back = String::new();
    bytes.read_to_string(&mut back).await?;
    assert_eq!(back, "to and fro");
    let wrong = send(served.sender, get()?, None).await.map(drop).map_err(|failed| failed.error.reason());
    assert_eq!(wrong, Err(Some(Reason::INTERNAL_ERROR)));
    Ok(())
}

/// What a client says first: the preface and its settings, none.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// A peer that speaks in raw frames.
async fn raw(bytes: &[u8]) -> std::result::Result<(DuplexStream, JoinHandle<Result<Ended>>), std::io::Error> {
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let serving = tokio::spawn(async move {
        serve(far, &h2::server::Builder::new(), OPTIONS, &Drain::default(), Watch::none(), echo).await
    });
    near.write_all(PREFACE).await?;
    // The peer may be refused in the middle of it.
    let _ = near.write_all(bytes).await;
    Ok((near, serving))
}
