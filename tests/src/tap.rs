//! A tap on the wire between nodes.
//!
//! Promises: what crosses the fabric between [`Lab::tap`] and [`Tap::stop`] is in the recording, on its way into the
//! bridge and on its way out. Traffic that stays on a node is not. Never: more than the kernel buffers while the
//! reader is not scheduled (64 MiB), so a test taps a few requests, not a load. Tested in `tests/lab.rs`.

use std::{
    io::{self, Read as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Lab, net::Netns};

/// All protocols, in network byte order as packet sockets want it.
const ETH_P_ALL: u16 = 3_u16.to_be();
/// veth hands over frames that nobody has cut up yet.
const LARGEST_FRAME: usize = 128 * 1024;
/// What the kernel may hold before the tap has read it.
const BUFFER: usize = 64 * 1024 * 1024;
/// How often the tap looks whether it is to stop, where nothing comes.
const IDLE: Duration = Duration::from_millis(50);

/// A running tap.
#[derive(Debug)]
pub struct Tap {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<io::Result<Recording>>,
}

/// What crossed the wire.
#[derive(Debug, Default)]
pub struct Recording {
    /// The frames as they were, Ethernet header first.
    pub frames: Vec<Vec<u8>>,
}

impl Lab {
    /// Listens to the wire between the nodes from now on.
    pub fn tap(&self) -> Result<Tap> {
        Tap::open(self.fabric())
    }
}

impl Tap {
    /// Listens to all interfaces of a network namespace from now on.
    pub fn open(netns: &Netns) -> Result<Self> {
        let open = || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ETH_P_ALL))))?;
            setsockopt(&socket, RcvBufForce, &BUFFER)?;
            socket.set_read_timeout(Some(IDLE))?;
            Ok(socket)
        };
        let socket = netns.inside(open).context("opening a packet socket (this needs root)")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let reader = std::thread::spawn(move || record(socket, &stopping));
        Ok(Self { stop, reader })
    }

    /// Stops listening, once everything that has crossed by now is read.
    pub fn stop(self) -> Result<Recording> {
        self.stop.store(true, Ordering::Relaxed);
        let recorded = self.reader.join().map_err(|_| anyhow!("the tap's thread panicked"))?;
        recorded.context("reading from the wire")
    }
}

fn record(mut socket: Socket, stop: &AtomicBool) -> io::Result<Recording> {
    let mut recording = Recording::default();
    let mut buffer = vec![0; LARGEST_FRAME];
    loop {
        // Asked before reading: what was there when the stop came is read after it.
        let stopping = stop.load(Ordering::Relaxed);
        match socket.read(&mut buffer) {
            Ok(n) => recording.frames.push(buffer[..n].to_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && stopping => return Ok(recording),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

impl Recording {
    /// Whether any frame holds these bytes.
    pub fn contains(&self, bytes: &[u8]) -> bool {
        self.frames.iter().any(|frame| frame.windows(bytes.len()).any(|window| window == bytes))
    }
}
