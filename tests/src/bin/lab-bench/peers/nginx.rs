//! nginx: the server of every variant, and a pair of proxies.

use std::{net::SocketAddr, process::Command};

use anyhow::Result;
use lab::servers::as_nobody;

use super::room::{NAME, Room};

pub const PROGRAM: &str = "/usr/sbin/nginx";
/// Bytes of the answer.
pub const BODY: u64 = 1024;
/// A suite of TLS 1.3, as the mesh and the bare pair choose it.
pub const SUITE: &str = "TLS_AES_256_GCM_SHA384";
/// Connections that are kept to the next hop; more than the load has.
const KEPT: usize = 128;

/// What the proxy at the server answers itself, with nothing: for those who only want to know that they are believed.
pub const NOTHING: &str = "/nothing";

/// Answers everything with 200 and the same body.
pub fn server(room: &Room, port: u16) -> Result<Command> {
    let body = "x".repeat(BODY as usize);
    start(
        room,
        &format!(
            "server {{ listen {port} reuseport backlog=4096; default_type text/plain; location / {{ return 200 '{body}'; }} }}"
        ),
    )
}

/// Takes HTTP/1.1 and sends it on over mutual TLS.
pub fn outbound(room: &Room, listen: SocketAddr, peer: SocketAddr) -> Result<Command> {
    let dir = room.path().display();
    start(
        room,
        &format!(
            "{upstream}
            server {{
                listen {listen} reuseport backlog=4096;
                location / {{
                    proxy_pass https://next;
                    {proxying}
                    proxy_ssl_certificate {dir}/cert.pem;
                    proxy_ssl_certificate_key {dir}/key.pem;
                    proxy_ssl_trusted_certificate {dir}/ca.pem;
                    proxy_ssl_verify on;
                    proxy_ssl_name {NAME};
                    proxy_ssl_server_name on;
                    proxy_ssl_protocols TLSv1.3;
                    proxy_ssl_conf_command Ciphersuites {SUITE};
                }}
            }}",
            upstream = upstream(peer),
            proxying = PROXYING,
        ),
    )
}

/// Takes mutual TLS and sends it on to the app.
pub fn inbound(room: &Room, listen: SocketAddr, app: SocketAddr) -> Result<Command> {
    let dir = room.path().display();
    start(
        room,
        &format!(
            "{upstream}
            server {{
                listen {listen} ssl reuseport backlog=4096;
                ssl_certificate {dir}/cert.pem;
                ssl_certificate_key {dir}/key.pem;
                ssl_client_certificate {dir}/ca.pem;
                ssl_verify_client on;
                ssl_protocols TLSv1.3;
                ssl_conf_command Ciphersuites {SUITE};
                location = {NOTHING} {{ return 204; }}
                location / {{
                    proxy_pass http://next;
                    {proxying}
                }}
            }}",
            upstream = upstream(app),
            proxying = PROXYING,
        ),
    )
}

/// Takes HTTP/1.1 and sends it on as it came, in the clear.
pub fn hop(room: &Room, listen: SocketAddr, app: SocketAddr) -> Result<Command> {
    let upstream = upstream(app);
    start(
        room,
        &format!(
            "{upstream} server {{ listen {listen} reuseport backlog=4096; location / {{ proxy_pass http://next; {PROXYING} }} }}"
        ),
    )
}

/// nginx speaks HTTP/1.1 to the next hop, and keeps the connection only if it is told to.
const PROXYING: &str = "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $host;";

fn upstream(next: SocketAddr) -> String {
    format!(
        "upstream next {{ server {next}; keepalive {KEPT}; keepalive_requests 1000000000; keepalive_time 1d; }}"
    )
}

fn start(room: &Room, http: &str) -> Result<Command> {
    let dir = room.path().display();
    let workers = std::thread::available_parallelism()?;
    let text = format!(
        "daemon off; worker_processes {workers}; pid {dir}/pid; error_log stderr error;
        worker_rlimit_nofile 20000; events {{ worker_connections 16384; }}
        http {{
            access_log off; keepalive_requests 1000000000; keepalive_time 1d; keepalive_timeout 1d; tcp_nodelay on;
            client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
            uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
            {http}
        }}\n"
    );
    room.write("nginx.conf", &text)?;
    let mut command = as_nobody(PROGRAM);
    command.arg("-p").arg(room.path()).args(["-e", "stderr", "-c", "nginx.conf"]);
    Ok(command)
}
