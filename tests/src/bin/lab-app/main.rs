//! Servers and clients to run inside the pods of the lab. Servers print one line of JSON once they listen and run
//! until they are ended; clients print one object of JSON, or a sentence on standard error and exit 1.

mod authorizer;
mod frames;
mod grpc;
mod h2_attack;
mod http_client;
mod http_server;
mod listen;
mod load;
mod raw;
mod tcp;
mod tunnel;
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
    /// TCP server that answers HTTP/1.1 requests with exactly these bytes
    Http1Raw(raw::Server),
    /// TCP server that echoes until end of file
    TcpEcho(TcpOptions),
    /// TCP server that greets first, then echoes
    ServerFirst(TcpOptions),
    /// TCP server that swallows everything, then reports
    Sink(TcpOptions),
    /// UDP server that echoes datagrams
    UdpEcho(ServerOptions),
    /// gRPC server with the health service, and calls of all kinds
    Grpc(ServerOptions),
    /// External authorizer, over gRPC and HTTP
    Authorizer(ServerOptions),
    /// HTTP client: one request
    Get(http_client::Get),
    /// HTTP client: many requests, counted
    Many(http_client::Many),
    /// HTTP/2 client: many requests on one connection
    Streams(http_client::Streams),
    /// HTTP client: sends a large body and asks what arrived
    Upload(http_client::Upload),
    /// HTTP client: reads a large body and checks it
    Download(http_client::Download),
    /// Client that sends exactly the bytes it is told
    Raw(raw::Client),
    /// WebSocket client
    Ws(tunnel::WebSocket),
    /// Client of CONNECT
    Connect(tunnel::Connect),
    /// Client of an HTTP/1.1 upgrade to an echo of bytes
    Upgrade(tunnel::Upgrade),
    /// Abuse of HTTP/2
    H2Attack(h2_attack::Options),
    /// Clients of one kind that ask again and again until they are told to stop
    Load(load::Options),
    /// TCP client
    Tcp(tcp::Client),
    /// UDP client
    Udp(udp::Client),
    /// gRPC client: Check and Watch
    GrpcClient(grpc::Client),
    /// gRPC client: a call of one of the four kinds
    GrpcCall(grpc::Call),
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
        Command::Http1Raw(server) => raw::serve(server).await,
        Command::TcpEcho(options) => tcp::serve(options.server, tcp::Manner::echo(options.report)).await,
        Command::ServerFirst(options) => {
            tcp::serve(options.server, tcp::Manner { greet: true, ..tcp::Manner::echo(options.report) }).await
        }
        Command::Sink(options) => {
            tcp::serve(options.server, tcp::Manner { greet: false, echo: false, report: true }).await
        }
        Command::UdpEcho(options) => udp::serve(options).await,
        Command::Grpc(options) => grpc::serve(options).await,
        Command::Authorizer(options) => authorizer::serve(options).await,
        Command::Get(client) => client.run().await,
        Command::Many(client) => client.run().await,
        Command::Streams(client) => client.run().await,
        Command::Upload(client) => client.run().await,
        Command::Download(client) => client.run().await,
        Command::Raw(client) => client.run().await,
        Command::Ws(client) => client.run().await,
        Command::Connect(client) => client.run().await,
        Command::Upgrade(client) => client.run().await,
        Command::H2Attack(attack) => attack.run().await,
        Command::Load(load) => load.run().await,
        Command::Tcp(client) => client.run().await,
        Command::Udp(client) => client.run().await,
        Command::GrpcClient(client) => client.run().await,
        Command::GrpcCall(call) => call.run().await,
    }
}

/// Prints a client's answer.
fn print(answer: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}
