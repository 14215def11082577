//! The least that a relay behind `iptables -j REDIRECT` has to do: ask the kernel where a connection was going
//! (`SO_ORIGINAL_DST`), dial that, and copy both ways.

use anyhow::{Context as _, Result};
use clap::Args;
use socket2::SockRef;
use tokio::{io::copy_bidirectional, net::TcpStream};

use crate::answer::listen;

#[derive(Debug, Args)]
pub struct Options {
    /// The port that connections are redirected to
    #[arg(long)]
    port: u16,
}

pub fn run(options: &Options) -> Result<()> {
    crate::runtime()?.block_on(async {
        let listener = listen(options.port)?;
        crate::announce();
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(async move {
                if let Err(error) = relay(stream).await {
                    eprintln!("{error:#}");
                }
            });
        }
    })
}

async fn relay(mut client: TcpStream) -> Result<()> {
    let asked = SockRef::from(&client).original_dst_v4();
    let to = asked.context("the kernel does not know where the connection was going")?;
    let to = to.as_socket().context("no address of IPv4")?;
    let mut server = TcpStream::connect(to).await.with_context(|| format!("dialling {to}"))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    copy_bidirectional(&mut client, &mut server).await.context("copying")?;
    Ok(())
}
