//! Many requests on one HTTP/2 connection.

use std::sync::Arc;

use anyhow::{Result, ensure};
use clap::Args;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::TokioIo;
use lab::apps::{POD_HEADER, Streams};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{Asked, Outgoing, connect, http2, read};
use crate::print;

#[derive(Debug, Args)]
pub struct Many {
    #[command(flatten)]
    asked: Asked,
    /// How many requests
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// How many streams at a time
    #[arg(long, default_value_t = 10)]
    at_once: usize,
}

impl Many {
    pub async fn run(mut self) -> Result<()> {
        ensure!(self.at_once > 0, "--at-once is at least 1");
        self.asked.h2c = true;
        let io = TokioIo::new(connect(&self.asked.url).await?);
        let (sender, connection) = http2().handshake(io).await?;
        let connection = tokio::spawn(connection);
        let (room, this) = (Arc::new(Semaphore::new(self.at_once)), Arc::new(self));
        let mut streams = JoinSet::new();
        for _ in 0..this.count {
            let permit = Arc::clone(&room).acquire_owned().await?;
            let (this, sender) = (Arc::clone(&this), sender.clone());
            streams.spawn(async move {
                let answer = this.stream(sender).await;
                drop(permit);
                answer
            });
        }
        drop(sender);
        let mut seen = Streams::default();
        while let Some(answer) = streams.join_next().await {
            match answer? {
                Ok((status, pod)) => {
                    *seen.statuses.entry(status).or_default() += 1;
                    *seen.pods.entry(pod).or_default() += 1;
                }
                Err(error) => *seen.errors.entry(format!("{error:#}")).or_default() += 1,
            }
        }
        seen.connection = connection.await?.err().map(|error| error.to_string());
        print(&seen)
    }

    async fn stream(&self, mut sender: SendRequest<Outgoing>) -> Result<(u16, String)> {
        let limit = self.asked.patience();
        let answered = async {
            sender.ready().await?;
            let response = sender.send_request(self.asked.request(self.asked.body()?)?).await?;
            let (head, body) = response.into_parts();
            read(body).await?;
            let pod = head.headers.get(POD_HEADER).and_then(|pod| pod.to_str().ok()).unwrap_or_default();
            anyhow::Ok((head.status.as_u16(), pod.to_owned()))
        };
        tokio::time::timeout(limit, answered).await?
    }
}
