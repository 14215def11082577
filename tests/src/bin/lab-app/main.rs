//! Servers and clients to run inside the pods of the lab. Servers print one line of JSON once they listen and run
//! until they are ended; clients print one object of JSON, or a sentence on standard error and exit 1.

mod grpc;
mod http_client;
mod http_server;
mod listen;
mod tcp;
mod udp;

use std::net::SocketAddr;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "lab-app", about = "Servers and clients for the pods of the lab")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// HTTP/1.1 and HTTP/2 server that answers with what it was asked
    Http(http_server::Options),
    /// TCP server that echoes until end of file
    TcpEcho(TcpOptions),
    /// TCP server that greets first, then echoes
    ServerFirst(TcpOptions),
    /// TCP server that swallows everything, then reports
    Sink(TcpOptions),
    /// UDP server that echoes datagrams
    UdpEcho(ServerOptions),
    /// gRPC server with the health service
    Grpc(ServerOptions),
    /// HTTP client: one request
    Get(http_client::Get),
    /// HTTP client: many requests, counted
    Many(http_client::Many),
    /// TCP client
    Tcp(tcp::Client),
    /// UDP client
    Udp(udp::Client),
    /// gRPC client: Check and Watch
    GrpcClient(grpc::Client),
}

/// What all servers take.
#[derive(Debug, Args)]
struct ServerOptions {
    /// Where to listen; `[::]` takes IPv4 too
    #[arg(long)]
    listen: SocketAddr,
    /// The pod's name, for answers
    #[arg(long, default_value = "")]
    name: String,
}

#[derive(Debug, Args)]
struct TcpOptions {
    #[command(flatten)]
    server: ServerOptions,
    /// After the client's end of file, say in a line of JSON what was seen of the connection
    #[arg(long)]
    report: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Http(options) => http_server::serve(options).await,
        Command::TcpEcho(options) => tcp::serve(options.server, tcp::Manner::echo(options.report)).await,
        Command::ServerFirst(options) => {
            tcp::serve(options.server, tcp::Manner { greet: true, ..tcp::Manner::echo(options.report) }).await
        }
        Command::Sink(options) => {
            tcp::serve(options.server, tcp::Manner { greet: false, echo: false, report: true }).await
        }
        Command::UdpEcho(options) => udp::serve(options).await,
        Command::Grpc(options) => grpc::serve(options).await,
        Command::Get(client) => client.run().await,
        Command::Many(client) => client.run().await,
        Command::Tcp(client) => client.run().await,
        Command::Udp(client) => client.run().await,
        Command::GrpcClient(client) => client.run().await,
    }
}

/// Prints a client's answer.
fn print(answer: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}
