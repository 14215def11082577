//! UDP: echo server and client.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use lab::apps::UdpAnswer;
use tokio::{net::UdpSocket, time::timeout};

use crate::{ServerOptions, listen, print};

/// The largest datagram.
const LARGEST: usize = 65_535;
/// When a datagram counts as lost.
const LOST: Duration = Duration::from_secs(2);

pub async fn serve(options: ServerOptions) -> Result<()> {
    let socket = listen::udp(options.listen)?;
    let mut buffer = vec![0; LARGEST];
    loop {
        let (n, peer) = socket.recv_from(&mut buffer).await?;
        socket.send_to(&buffer[..n], peer).await?;
    }
}

#[derive(Debug, Args)]
pub struct Client {
    /// Where to send to
    to: SocketAddr,
    /// How many datagrams
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// How large
    #[arg(long, default_value_t = 64)]
    size: usize,
}

impl Client {
    pub async fn run(self) -> Result<()> {
        let any = if self.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(self.to).await.with_context(|| format!("connecting to {}", self.to))?;
        let mut answer = UdpAnswer { sent: 0, received: 0 };
        let mut buffer = vec![0; LARGEST];
        for number in 0..self.count {
            let datagram = vec![number as u8; self.size];
            socket.send(&datagram).await?;
            answer.sent += 1;
            if let Ok(received) = timeout(LOST, socket.recv(&mut buffer)).await {
                answer.received += u64::from(buffer[..received?] == datagram[..]);
            }
        }
        print(&answer)
    }
}
