//! HTTP/1.1 clients: each asks on its kept connection as soon as it was answered, or at a rate; for a time, or so often.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use lab::bench::Asked;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval_at},
};

use crate::http::Connection;

#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The server
    server: SocketAddr,
    /// The value of Host
    #[arg(long, default_value = "server")]
    host: String,
    /// Connections
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// For how long
    #[arg(long, default_value_t = 1.0, conflicts_with = "requests")]
    seconds: f64,
    /// How often on each connection, in place of a time
    #[arg(long)]
    requests: Option<u64>,
    /// Requests a second of all connections together; as fast as it goes unless given
    #[arg(long)]
    rate: Option<f64>,
}

pub fn run(options: &Options) -> Result<Asked> {
    crate::allow_many_descriptors()?;
    crate::runtime()?.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..options.connections {
            connections.push(Connection::open(options.server, &options.host).await?);
        }
        let (started, mut clients, mut took) = (Instant::now(), JoinSet::new(), Vec::new());
        for (number, connection) in connections.into_iter().enumerate() {
            clients.spawn(client(options.clone(), number, connection, started));
        }
        while let Some(client) = clients.join_next().await {
            took.extend(client??);
        }
        ensure!(!took.is_empty(), "nothing was asked");
        Ok(Asked::new(&took, started.elapsed().as_secs_f64()))
    })
}

async fn client(
    options: Options,
    number: usize,
    mut connection: Connection,
    started: Instant,
) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    let every = options.rate.map(|rate| Duration::from_secs_f64(f64::from(options.connections) / rate));
    // Spread over the time between two requests of one connection, so that they do not come all at once.
    let mut ticks = every.map(|every| {
        let share = every.mul_f64(number as f64 / f64::from(options.connections));
        let mut ticks = interval_at(tokio::time::Instant::from_std(started) + share, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        ticks
    });
    loop {
        let done = match options.requests {
            Some(requests) => took.len() as u64 >= requests,
            None => started.elapsed().as_secs_f64() >= options.seconds,
        };
        if done {
            return Ok(took);
        }
        // At a rate, an answer is late from when it was due: nobody is let off for having waited.
        let due = match &mut ticks {
            Some(ticks) => ticks.tick().await.into_std(),
            None => Instant::now(),
        };
        connection.ask().await?;
        took.push(due.elapsed().as_secs_f64() * 1e6);
    }
}
