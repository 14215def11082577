//! The external authorizer: says yes and no on demand, over gRPC and HTTP. See `lab::apps::authorizer`.

use std::convert::Infallible;

use anyhow::{Context as _, Result, bail};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use lab::apps::{Question, WANT};
use mesh_agent::policy::external::messages::{
    BoolValue, CheckRequest, CheckResponse, DeniedHttpResponse, HeaderValue as Value, HeaderValueOption,
    HttpResponse, HttpStatus, OkHttpResponse, Peer, Status,
};
use prost::Message as _;

use crate::{ServerOptions, http_server::plain, listen, print};

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

type Body = BoxBody<Bytes, Infallible>;

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Say {
    Yes,
    Change,
    No,
    BareNo,
    Fail,
}

pub async fn serve(options: ServerOptions) -> Result<()> {
    let listener = listen::tcp(options.listen)?;
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            let from = listen::canonical(peer).ip().to_string();
            let service = service_fn(move |request| answer(request, from.clone()));
            if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
                eprintln!("connection of {peer}: {error}");
            }
        });
    }
}

async fn answer(request: Request<Incoming>, peer: String) -> Result<Response<Body>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let header =
        |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let caller = header("x-forwarded-client-cert").to_owned();
    if head.uri.path() == CHECK {
        let question = Question { peer, ..read(body, caller)? };
        print(&question)?;
        return grpc(say(&question).await);
    }
    let host = head.uri.authority().map_or(header("host"), |authority| authority.as_str()).to_owned();
    let question = Question {
        over: "http".to_owned(),
        peer,
        caller,
        method: head.method.to_string(),
        path: head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        host,
        headers: plain(&head.headers),
        body: String::from_utf8_lossy(&body).into_owned(),
        ..Question::default()
    };
    print(&question)?;
    http(say(&question).await)
}

/// The question in the message of a call.
fn read(mut body: Bytes, caller: String) -> Result<Question> {
    if body.len() < 5 || body.get_u8() != 0 || body.get_u32() as usize != body.len() {
        bail!("this is not one message of gRPC");
    }
    let message = CheckRequest::decode(body)?.attributes.context("nothing is asked about")?;
    let (source, destination) = (message.source.unwrap_or_default(), message.destination.unwrap_or_default());
    let at = |peer: &Peer| peer.address.as_ref()?.socket_address.as_ref().map(|at| at.address.clone());
    let question = Question {
        over: "grpc".to_owned(),
        caller,
        client_ip: at(&source).unwrap_or_default(),
        client: source.principal,
        server: destination.principal,
        ..Question::default()
    };
    let Some(http) = message.request.and_then(|request| request.http) else { return Ok(question) };
    Ok(Question {
        method: http.method,
        path: http.path,
        host: http.host,
        headers: http.headers.into_iter().collect(),
        body: if http.raw_body.is_empty() {
            http.body
        } else {
            String::from_utf8_lossy(&http.raw_body).into_owned()
        },
        ..question
    })
}

async fn say(question: &Question) -> Say {
    match question.headers.get(WANT).map(String::as_str) {
        Some("deny") => Say::No,
        Some("bare-deny") => Say::BareNo,
        Some("change") => Say::Change,
        Some("fail") => Say::Fail,
        Some("hang") => std::future::pending().await,
        _ if question.method.is_empty() && !question.client.ends_with("/sa/client") => Say::BareNo,
        _ => Say::Yes,
    }
}

fn option(key: &str, value: &str) -> HeaderValueOption {
    let header = Value { key: key.to_owned(), value: value.to_owned(), raw_value: Vec::new() };
    let append = Some(BoolValue { value: false });
    HeaderValueOption { header: Some(header), append, append_action: 0 }
}

fn grpc(say: Say) -> Result<Response<Body>> {
    let (code, http_response) = match say {
        Say::Yes | Say::Fail => (0, None),
        Say::BareNo => (7, None),
        Say::Change => {
            let ok = OkHttpResponse {
                headers: vec![option("x-user", "joe")],
                headers_to_remove: vec!["x-secret".to_owned()],
                response_headers_to_add: vec![option("x-told", "yes")],
                ..OkHttpResponse::default()
            };
            (0, Some(HttpResponse::Ok(ok)))
        }
        Say::No => {
            let denied = DeniedHttpResponse {
                status: Some(HttpStatus { code: 401 }),
                headers: vec![option("x-reason", "because"), option("www-authenticate", "Lab")],
                body: "not you".to_owned(),
            };
            (16, Some(HttpResponse::Denied(denied)))
        }
    };
    let message = CheckResponse { status: Some(Status { code, message: String::new() }), http_response };
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.encoded_len())?);
    message.encode(&mut framed)?;
    let status = if say == Say::Fail { "13" } else { "0" };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let body = Full::new(framed.freeze()).with_trailers(async { Some(Ok(trailers)) }).boxed();
    Ok(Response::builder().header(CONTENT_TYPE, "application/grpc").body(body)?)
}

fn http(say: Say) -> Result<Response<Body>> {
    let (status, headers, body) = match say {
        Say::Yes => (200, &[][..], ""),
        Say::Change => {
            let headers =
                &[("x-user", "joe"), ("x-told", "yes"), ("x-envoy-auth-headers-to-remove", "x-secret")];
            (200, &headers[..], "")
        }
        Say::No => (401, &[("x-reason", "because"), ("www-authenticate", "Lab")][..], "not you"),
        Say::BareNo => (403, &[][..], ""),
        Say::Fail => (500, &[][..], ""),
    };
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())).boxed());
    *response.status_mut() = StatusCode::from_u16(status)?;
    for (name, value) in headers {
        response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    Ok(response)
}
