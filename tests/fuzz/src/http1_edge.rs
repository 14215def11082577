//! The strict edge of HTTP/1: nothing that passes can be read in another way by who reads behind it.
//!
//! The input's first bytes say how the rest is cut into reads, and how the service answers a request that may switch
//! protocols. Checked: cutting does not matter; what passes passes again, unchanged; a reader of our own finds the same
//! requests in it as hyper does; hyper never refuses what has passed; refusals meet the request they stand for.

mod by_hyper;
mod by_rule;
mod pieces;

use std::task::{Context, Poll, Waker};

use mesh_agent::http1::{Edge, Gate, Limits};
use tokio::io::{AsyncRead, ReadBuf};

use self::pieces::Pieces;

/// Bytes of the input that steer.
const STEERING: usize = 4;

/// How one input is run.
#[derive(Debug, Clone, Copy)]
struct Way<'a> {
    /// Sizes of reads, again and again; 0 is all there is.
    sizes: &'a [u8],
    /// The reader's buffer.
    room: usize,
    limits: Limits,
    switch: bool,
}

/// What passed, and what the gate said.
#[derive(Debug)]
struct Passed {
    bytes: Vec<u8>,
    /// How many bytes had passed when the protocol was switched.
    switched_at: Option<usize>,
    body_refused: bool,
}

/// Runs everything over one input.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    let Some((steering, bytes)) = input.split_at_checked(STEERING) else { return };
    let small = Limits { head_bytes: 200, headers: 5, target_bytes: 40 };
    let limits = if steering[0] & 1 == 0 { Limits::default() } else { small };
    let room = if steering[0] & 2 == 0 { 8 << 10 } else { 1 + usize::from(steering[0] >> 3) };
    let whole = Way { sizes: &[0], room: 8 << 10, limits, switch: steering[0] & 4 != 0 };
    let cut = Way { sizes: &steering[1..], room, ..whole };

    let passed = through(bytes, whole);
    let in_pieces = through(bytes, cut);
    assert_eq!(passed.body_refused, in_pieces.body_refused, "cutting changes whether a body is refused");
    if !passed.body_refused {
        // Of a refused body, the last bytes before the refusal may have passed or not.
        assert_eq!(passed.bytes, in_pieces.bytes, "cutting changes what passes");
    }
    if let Some(at) = in_pieces.switched_at {
        assert!(bytes.ends_with(&in_pieces.bytes[at..]), "bytes of another protocol are changed");
        return;
    }
    let again = through(&passed.bytes, Way { switch: false, ..whole });
    assert_eq!(again.bytes, passed.bytes, "what has passed does not pass again");

    let by_rule = by_rule::messages(&passed.bytes);
    let by_hyper = by_hyper::behind_the_edge(bytes, cut);
    assert_eq!(by_rule, by_hyper, "the requests that the rules and hyper read differ");
    assert_eq!(by_rule, by_hyper::without_the_edge(&passed.bytes), "hyper reads others without the edge");
}

/// Reads everything that passes the edge.
fn through(bytes: &[u8], way: Way<'_>) -> Passed {
    let (mut edge, gate) = Edge::new(Pieces::new(bytes, way.sizes), way.limits);
    let mut passed = Passed { bytes: Vec::new(), switched_at: None, body_refused: false };
    let mut space = vec![0; way.room];
    loop {
        let mut buffer = ReadBuf::new(&mut space);
        match poll(&mut edge, &mut buffer) {
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => break,
            Poll::Ready(Ok(())) => passed.bytes.extend_from_slice(buffer.filled()),
            Poll::Ready(Err(error)) => panic!("the pieces never fail: {error}"),
            // The pieces are always ready: what is waited for is the service's word.
            Poll::Pending => switch(&gate, way.switch, &mut passed),
        }
    }
    passed.body_refused = gate.body_refusal().is_some();
    passed
}

fn poll(edge: &mut Edge<Pieces>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
    std::pin::Pin::new(edge).poll_read(&mut Context::from_waker(Waker::noop()), buffer)
}

fn switch(gate: &Gate, yes: bool, passed: &mut Passed) {
    assert!(passed.switched_at.is_none(), "waits after the switch");
    gate.switched(yes);
    if yes {
        passed.switched_at = Some(passed.bytes.len());
    }
}
