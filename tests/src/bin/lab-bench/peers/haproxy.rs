//! haproxy as a pair of proxies: HTTP/1.1 throughout with kept connections, or bytes; mutual TLS between the two.

use std::{net::SocketAddr, process::Command};

use anyhow::Result;
use lab::servers::as_nobody;

use super::{
    Traffic, nginx,
    room::{NAME, Room},
};

pub const PROGRAM: &str = "/usr/sbin/haproxy";

/// Sends on over mutual TLS.
pub fn outbound(room: &Room, traffic: Traffic, listen: SocketAddr, peer: SocketAddr) -> Result<Command> {
    let tls = format!("{} verifyhost {NAME} sni str({NAME})", tls(room));
    start(room, traffic, &format!("{listen}"), &format!("{peer} {tls}"))
}

/// Takes mutual TLS and sends it on to the app.
pub fn inbound(room: &Room, traffic: Traffic, listen: SocketAddr, app: SocketAddr) -> Result<Command> {
    start(room, traffic, &format!("{listen} {}", tls(room)), &app.to_string())
}

fn tls(room: &Room) -> String {
    let (dir, suite) = (room.path().display(), nginx::SUITE);
    format!(
        "ssl crt {dir}/both.pem ca-file {dir}/ca.pem verify required ssl-min-ver TLSv1.3 ciphersuites {suite}"
    )
}

fn start(room: &Room, traffic: Traffic, bind: &str, server: &str) -> Result<Command> {
    let threads = std::thread::available_parallelism()?;
    let mode = if traffic == Traffic::Bytes { "mode tcp" } else { "mode http\n    http-reuse always" };
    let text = format!(
        "global
    nbthread {threads}
    maxconn 4000
defaults
    {mode}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen all
    bind {bind}
    server next {server}
"
    );
    room.write("haproxy.cfg", &text)?;
    let mut command = as_nobody(PROGRAM);
    command.args(["-db", "-f"]).arg(room.path().join("haproxy.cfg"));
    Ok(command)
}
