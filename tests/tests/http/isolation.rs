//! One request's bytes never get into another: whoever shares a connection with whom, whoever leaves in the middle.
//!
//! Every body is made of the name of its request, so that a byte that has gone astray says whose it is.

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pod, Service,
    apps::{Echo, Raw, RawAnswer},
    eventually, fields, metric,
};
use tokio::task::JoinSet;

use crate::world::{APP, HTTP, HTTP2, Side, World};

/// Requests of one connection.
const REQUESTS: usize = 16;

/// A request of which every part says whose it is.
#[derive(Debug, Clone)]
struct Asked {
    id: String,
    size: usize,
    /// Whether it is answered with what the app saw, instead of with its own body.
    echo: bool,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Every request is whole. Over HTTP/2 every third is taken back in its middle, while the others go on.
    Stays,
    /// The client ends the connection in the middle of a body.
    Leaves,
    /// It resets it there.
    Resets,
}

impl Asked {
    /// The requests of one connection, of sizes that have nothing to do with each other; none is longer than `longest`.
    fn all(connection: &str, salt: usize, longest: usize) -> Vec<Self> {
        (0..REQUESTS)
            .map(|n| Self {
                id: format!("{connection}-{n}"),
                size: 1 + (n * 7919 + salt * 104_729) % longest,
                echo: n % 4 == 1,
            })
            .collect()
    }

    fn path(&self) -> String {
        format!("/{}/{}", if self.echo { "echo" } else { "mirror" }, self.id)
    }

    fn body(&self) -> Vec<u8> {
        format!("<{}>", self.id).into_bytes().into_iter().cycle().take(self.size).collect()
    }

    /// Whether this is the answer to it, from its first byte to its last.
    fn is_answered_by(&self, body: &[u8]) -> Result<()> {
        if !self.echo {
            let same = body == self.body();
            ensure!(same, "{}: {} bytes, not its own: {}", self.id, body.len(), body.escape_ascii());
            return Ok(());
        }
        let echo: Echo = serde_json::from_slice(body).with_context(|| self.id.clone())?;
        ensure!(echo.target == self.path() && echo.body_bytes == self.size as u64, "{self:?}: {echo:?}");
        for name in ["x-lab-id", "x-request-id"] {
            ensure!(echo.headers.get(name) == Some(&self.id), "{self:?}: {echo:?}");
        }
        Ok(())
    }

    fn http1(&self, is_last: bool) -> Vec<u8> {
        let Self { id, size, .. } = self;
        let close = if is_last { "Connection: close\r\n" } else { "" };
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: lab\r\nx-lab-id: {id}\r\nx-request-id: {id}\r\nContent-Length: {size}\r\n{close}\r\n",
            self.path()
        );
        [head.into_bytes(), self.body()].concat()
    }
}

/// The bodies of the HTTP/1.1 answers on a connection, in their order.
fn http1_bodies(mut bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut bodies = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = split(bytes, b"\r\n\r\n")?;
        let head = String::from_utf8(head.to_vec())?.to_lowercase();
        ensure!(head.starts_with("http/1.1 200 "), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let (body, rest) = match length {
            Some(length) => {
                let (body, rest) =
                    rest.split_at_checked(length.parse()?).context("a body that is cut off")?;
                (body.to_vec(), rest)
            }
            None => unchunked(rest)?,
        };
        bodies.push(body);
        bytes = rest;
    }
    Ok(bodies)
}

fn unchunked(mut bytes: &[u8]) -> Result<(Vec<u8>, &[u8])> {
    let mut body = Vec::new();
    loop {
        let (size, rest) = split(bytes, b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(size)?, 16)?;
        let (chunk, rest) = rest.split_at_checked(size).context("a chunk that is cut off")?;
        body.extend_from_slice(chunk);
        bytes = rest.strip_prefix(b"\r\n").context("a chunk ends with its line")?;
        if size == 0 {
            return Ok((body, bytes));
        }
    }
}

fn split<'a>(bytes: &'a [u8], at: &[u8]) -> Result<(&'a [u8], &'a [u8])> {
    let found = bytes.windows(at.len()).position(|window| window == at);
    let found = found.with_context(|| format!("not answers: {}", bytes.escape_ascii()))?;
    Ok((&bytes[..found], &bytes[found + at.len()..]))
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
/// A preface, streams with windows of a mebibyte, and a connection with one that holds them all.
const OPENING: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x00\x10\x00\x00\
                         \x00\x00\x04\x08\x00\x00\x00\x00\x00\x3f\x00\x00\x00";
/// How a `GOAWAY` without debug data begins.
const GOODBYE: &[u8] = b"\x00\x00\x08\x07\x00\x00\x00\x00\x00";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block without any compression (RFC 7541 §6.2.2).
fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    headers.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

fn stream_of(n: usize) -> u32 {
    2 * n as u32 + 1
}

/// Whether a request is taken back in its middle though its connection stays.
fn is_taken_back(n: usize) -> bool {
    n % 3 == 2
}

/// All requests at once, a piece of each in turn.
fn http2(asked: &[Asked], fate: Fate) -> Vec<u8> {
    let mut bytes = OPENING.to_vec();
    for (n, asked) in asked.iter().enumerate() {
        let (path, id) = (asked.path(), asked.id.as_str());
        let head = [(":method", "POST"), (":scheme", "http"), (":authority", "lab"), (":path", &path)];
        let head = [&head[..], &[("x-lab-id", id), ("x-request-id", id)]].concat();
        bytes.extend(frame(HEADERS, 4, stream_of(n), &block(&head)));
    }
    let mut bodies: Vec<_> = asked.iter().map(Asked::body).collect();
    let (mut sent, mut open) = (vec![0; asked.len()], asked.len());
    while open > 0 {
        for (n, body) in bodies.iter_mut().enumerate().filter(|(_, body)| !body.is_empty()) {
            let piece = body.len().min(200 + 37 * n);
            let is_cut = fate != Fate::Stays || is_taken_back(n);
            if is_cut && 2 * (sent[n] + piece) > asked[n].size {
                body.clear();
                if fate == Fate::Stays {
                    bytes.extend(frame(RST_STREAM, 0, stream_of(n), &8_u32.to_be_bytes()));
                }
            } else {
                let rest = body.split_off(piece);
                bytes.extend(frame(DATA, u8::from(rest.is_empty()), stream_of(n), body));
                (*body, sent[n]) = (rest, sent[n] + piece);
            }
            open -= usize::from(body.is_empty());
        }
    }
    bytes
}

/// The bodies of the streams that ended, by their number.
fn http2_bodies(mut bytes: &[u8], streams: usize) -> Result<Vec<Option<Vec<u8>>>> {
    let mut bodies = vec![(Vec::new(), false); streams];
    while let Some(([a, b, c, kind, flags, stream @ ..], rest)) = bytes.split_first_chunk::<9>() {
        let size = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some((payload, rest)) = rest.split_at_checked(size) else { break };
        bytes = rest;
        let stream = u32::from_be_bytes([stream[0], stream[1], stream[2], stream[3]]);
        let (DATA | HEADERS) = *kind else { continue };
        let at = bodies.get_mut(stream as usize / 2).context("a stream that nobody has opened")?;
        if *kind == DATA {
            at.0.extend_from_slice(payload);
        }
        at.1 |= flags & 1 == 1;
    }
    Ok(bodies.into_iter().map(|(body, ended)| ended.then_some(body)).collect())
}

/// Sends the requests of one connection, and says what came back.
async fn over_http1(from: Pod, to: Service, asked: Vec<Asked>, fate: Fate) -> Result<RawAnswer> {
    let mut script = from.raw(to.at(HTTP));
    for (n, one) in asked.iter().enumerate() {
        let (bytes, is_last) = (one.http1(n + 1 == asked.len()), n + 1 == asked.len());
        let whole = if is_last && fate != Fate::Stays { bytes.len() - one.size / 2 - 1 } else { bytes.len() };
        script = script.send(&bytes[..whole]);
    }
    ended(script, fate).run().await
}

async fn over_http2(from: Pod, to: Service, asked: Vec<Asked>, fate: Fate) -> Result<RawAnswer> {
    let script = from.raw(to.at(HTTP2));
    let script = http2(&asked, fate).chunks(20_000).fold(script, Raw::send);
    // A connection on which nothing is under way any more is said goodbye to.
    let script = if fate == Fate::Stays { script.expect(GOODBYE).leave() } else { script };
    ended(script, fate).run().await
}

fn ended(script: Raw<'_>, fate: Fate) -> Raw<'_> {
    match fate {
        Fate::Stays => script,
        Fate::Leaves => script.leave(),
        Fate::Resets => script.reset(),
    }
}

/// What must come back on a connection that stays. Says whose answers came.
fn judge(asked: &[Asked], h2: bool, answer: &RawAnswer) -> Result<Vec<Asked>> {
    let bodies = if h2 {
        http2_bodies(&answer.received.0, asked.len())?
    } else {
        http1_bodies(&answer.received.0)?.into_iter().map(Some).collect()
    };
    ensure!(bodies.len() == asked.len(), "{} answers to {} requests", bodies.len(), asked.len());
    let mut whole = Vec::new();
    for (n, (asked, body)) in asked.iter().zip(bodies).enumerate() {
        if h2 && is_taken_back(n) {
            ensure!(body.is_none(), "{asked:?} was taken back and answered");
            continue;
        }
        asked.is_answered_by(&body.with_context(|| format!("{asked:?} was not answered"))?)?;
        whole.push(asked.clone());
    }
    Ok(whole)
}

/// The client's own requests.
const SOURCE: [(&str, &str); 2] = [("reporter", "source"), ("source_workload", "client")];

/// Each line of the log is of one request: its path, its id and its sizes belong together.
async fn log_tells_of(world: &World, whole: &[Asked]) -> Result<()> {
    eventually("each request is in the log as it was", async || {
        let lines = world.pair.agent_a.access_log();
        let lines = lines.iter().map(|line| fields(line)).filter(|line| line["reporter"] == "source");
        let lines: Vec<_> = lines.filter(|line| line["event"] == "request").collect();
        for line in &lines {
            let (path, id) = (&line["path"], &line["request_id"]);
            ensure!(path.ends_with(&format!("/{id}")), "two requests in one line: {line:?}");
        }
        for asked in whole {
            let mut told = lines.iter().filter(|line| line["request_id"] == asked.id);
            let line = told.next().with_context(|| format!("{asked:?} is not in the log"))?;
            ensure!(told.next().is_none(), "{asked:?} is in the log twice");
            ensure!(line["status"] == "200" && line["flags"] == "-", "{line:?}");
            ensure!(line["bytes_received"] == asked.size.to_string(), "{asked:?}: {line:?}");
            ensure!(asked.echo || line["bytes_sent"] == line["bytes_received"], "{asked:?}: {line:?}");
        }
        // What was cut off is told of too, and nothing is counted that is not told of.
        let counted = metric(&world.pair.agent_a.metrics().await?, "istio_requests_total", &SOURCE);
        ensure!((counted - lines.len() as f64).abs() < f64::EPSILON, "{counted}, {} lines", lines.len());
        Ok(())
    })
    .await
}

/// Every kind of connection to this app at once. The requests that were to be whole, and all of them.
async fn storm(world: &World, side: &Side) -> Result<(Vec<Asked>, Vec<Asked>)> {
    let mut under_way = JoinSet::new();
    let fates = [Fate::Stays, Fate::Leaves, Fate::Stays, Fate::Resets, Fate::Stays];
    for (salt, fate) in fates.into_iter().enumerate() {
        for h2 in [false, true] {
            let connection = format!("{}-{}-{salt}", side.name(), if h2 { "h2" } else { "h1" });
            // All bodies of an HTTP/2 connection fit into the window that it begins with.
            let asked = Asked::all(&connection, salt, if h2 { 65_535 / REQUESTS } else { 20_000 });
            let (from, to) = (world.client().clone(), side.service.clone());
            under_way.spawn(async move {
                let answer = if h2 {
                    over_http2(from, to, asked.clone(), fate).await?
                } else {
                    over_http1(from, to, asked.clone(), fate).await?
                };
                anyhow::Ok((asked, h2, fate, answer))
            });
        }
    }
    let (mut whole, mut all) = (Vec::new(), Vec::new());
    while let Some(ended) = under_way.join_next().await {
        let (asked, h2, fate, answer) = ended??;
        if fate == Fate::Stays {
            whole.extend(judge(&asked, h2, &answer)?);
        }
        all.extend(asked);
    }
    Ok((whole, all))
}

#[tokio::test]
async fn one_request_s_bytes_never_get_into_another() -> Result<()> {
    let Some(world) = World::with("isolation", &["--idle-timeout=2"]).await? else { return Ok(()) };
    for side in world.both() {
        let (whole, all) = storm(&world, side).await?;
        // Three connections of each kind stay, and of theirs every third stream was taken back.
        ensure!(whole.len() == 3 * (REQUESTS + REQUESTS - REQUESTS / 3), "{} are whole", whole.len());
        let stats = side.pod.stats(APP).await?;
        for path in stats.paths.keys() {
            ensure!(all.iter().any(|asked| asked.path() == *path), "nobody has asked for {path}: {stats:?}");
        }
        for asked in &whole {
            ensure!(stats.paths.get(&asked.path()) == Some(&1), "{asked:?}: {stats:?}");
            ensure!(stats.ids.get(&asked.id) == Some(&1), "{asked:?}: {stats:?}");
        }
        log_tells_of(&world, &whole).await?;
        // And the connections that they went over still serve.
        ensure!(
            world.client().http_get(&side.url("/echo/after"), &[("x-request-id", "after")]).await?.status
                == 200
        );
    }
    world.finish().await
}
