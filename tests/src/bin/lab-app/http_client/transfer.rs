//! Large bodies, made and checked as they pass: nothing is kept, whatever the size.

use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Args;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{Method, StatusCode, body::Frame};
use hyper_util::rt::TokioIo;
use lab::apps::{Consumed, Pattern, Transfer};
use tokio::time::Instant;

use super::{Asked, Outgoing, connect, read, send};
use crate::{http_server::Pace, print};

#[derive(Debug, Args)]
pub struct Upload {
    #[command(flatten)]
    large: Large,
}

#[derive(Debug, Args)]
pub struct Download {
    #[command(flatten)]
    large: Large,
}

#[derive(Debug, Clone, Args)]
struct Large {
    #[command(flatten)]
    asked: Asked,
    /// How many bytes
    #[arg(long, default_value_t = 1024 * 1024)]
    bytes: u64,
    /// At most this many bytes a second; 0 as fast as it goes
    #[arg(long, default_value_t = 0)]
    rate: u64,
}

impl Upload {
    pub async fn run(self) -> Result<()> {
        let mut large = self.large;
        if large.asked.method == Method::GET {
            large.asked.method = Method::POST;
        }
        let mut transfer = NOTHING;
        large.measure(&mut transfer, async |transfer| large.up(transfer).await).await
    }
}

impl Download {
    pub async fn run(self) -> Result<()> {
        let mut transfer = NOTHING;
        self.large.measure(&mut transfer, async |transfer| self.large.down(transfer).await).await
    }
}

/// A transfer of which nothing is known yet.
const NOTHING: Transfer = Transfer { status: 0, bytes: 0, intact: false, millis: 0, broken: None };

impl Large {
    /// Says what came of a transfer, also where it was given up.
    async fn measure(
        &self,
        transfer: &mut Transfer,
        pass: impl AsyncFnOnce(&mut Transfer) -> Result<()>,
    ) -> Result<()> {
        let began = Instant::now();
        match self.asked.timeout_ms.map(Duration::from_millis) {
            None => pass(transfer).await?,
            Some(limit) => match tokio::time::timeout(limit, pass(transfer)).await {
                Ok(passed) => passed?,
                Err(_) => transfer.broken = Some(format!("given up after {limit:?}")),
            },
        }
        transfer.millis = began.elapsed().as_millis() as u64;
        print(transfer)
    }

    async fn up(&self, transfer: &mut Transfer) -> Result<()> {
        let io = TokioIo::new(connect(&self.asked.url).await?);
        let request = self.asked.request(body(self.bytes, self.rate))?;
        let response = send(io, request, self.asked.h2c).await.context("waiting for the answer")?;
        transfer.status = response.status().as_u16();
        let (text, ..) = read(response.into_body()).await.context("reading the answer")?;
        match serde_json::from_str::<Consumed>(&text) {
            Ok(consumed) => {
                transfer.bytes = consumed.bytes;
                transfer.intact = consumed.intact && consumed.bytes == self.bytes;
                transfer.broken = consumed.broken;
            }
            Err(_) => transfer.broken = Some(format!("no account of a body: {text}")),
        }
        Ok(())
    }

    async fn down(&self, transfer: &mut Transfer) -> Result<()> {
        let io = TokioIo::new(connect(&self.asked.url).await?);
        let request = self.asked.request(self.asked.body()?)?;
        let response = send(io, request, self.asked.h2c).await.context("waiting for the answer")?;
        transfer.status = response.status().as_u16();
        let (mut body, mut pattern, mut pace) =
            (response.into_body(), Pattern::default(), Pace::new(self.rate));
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => {
                    let data = frame.data_ref().map_or(&[][..], |data| data);
                    pattern.check(data);
                    transfer.bytes = pattern.at();
                    pace.after(data.len() as u64).await;
                }
                Err(error) => {
                    transfer.broken = Some(error.to_string());
                    break;
                }
            }
        }
        let is_ok = transfer.status == StatusCode::OK.as_u16();
        transfer.intact = is_ok && pattern.intact() && transfer.bytes == self.bytes;
        Ok(())
    }
}

/// A body of the lab's pattern, made as it is sent.
fn body(bytes: u64, rate: u64) -> Outgoing {
    let state = (Pattern::default(), Pace::new(rate));
    let chunks = stream::unfold(state, move |(mut pattern, mut pace)| async move {
        let left = bytes - pattern.at();
        if left == 0 {
            return None;
        }
        let chunk = Bytes::copy_from_slice(pattern.next(left));
        pace.after(chunk.len() as u64).await;
        Some((Ok(Frame::data(chunk)), (pattern, pace)))
    });
    StreamBody::new(chunks).boxed()
}
