//! Bookinfo: four small services that call one another, for trying out what a mesh does between them.
//!
//! `productpage` asks `details` and `reviews`; `reviews` comes in three versions, of which v2 and v3 ask `ratings`
//! and show its stars in black and in red. Each service passes the caller's identity and trace headers on, and goes
//! on without what it cannot get. None of them knows of the mesh.

mod http;
mod page;
mod productpage;
mod ratings;
mod reviews;

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use serde_json::json;

use crate::http::{Answer, Asked, Upstream};

#[derive(Debug, Parser)]
#[command(name = "bookinfo", version, about = "The services of the Bookinfo sample")]
struct Cli {
    #[command(subcommand)]
    service: Service,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Where to listen; `[::]` takes IPv4 too
    #[arg(long, global = true, env = "BOOKINFO_LISTEN", default_value = "[::]:9080")]
    listen: SocketAddr,
    /// The pod's name, for answers
    #[arg(long, global = true, env = "HOSTNAME", default_value = "")]
    name: String,
}

#[derive(Debug, Subcommand)]
enum Service {
    /// The page people see
    Productpage {
        /// Where details is
        #[arg(long, env = "BOOKINFO_DETAILS", default_value = "http://details:9080")]
        details: String,
        /// Where reviews is
        #[arg(long, env = "BOOKINFO_REVIEWS", default_value = "http://reviews:9080")]
        reviews: String,
        /// Where ratings is
        #[arg(long, env = "BOOKINFO_RATINGS", default_value = "http://ratings:9080")]
        ratings: String,
    },
    /// What is printed on the book
    Details,
    /// What readers think
    Reviews {
        /// v1 without stars, v2 with black ones, v3 with red ones
        #[arg(long, env = "SERVICE_VERSION")]
        version: reviews::Version,
        /// Where ratings is
        #[arg(long, env = "BOOKINFO_RATINGS", default_value = "http://ratings:9080")]
        ratings: String,
    },
    /// How many stars readers give
    Ratings {
        /// Answer everything with this status, as a broken replica would
        #[arg(long)]
        broken: Option<u16>,
    },
}

/// One of the four services, ready to answer.
#[derive(Debug)]
enum App {
    Productpage(productpage::Productpage),
    Details,
    Reviews(reviews::Reviews),
    Ratings(ratings::Ratings),
}

impl App {
    fn new(service: Service, pod: &str) -> Result<Self> {
        Ok(match service {
            Service::Productpage { details, reviews, ratings } => {
                Self::Productpage(productpage::Productpage {
                    details: Upstream::new("details", &details)?,
                    reviews: Upstream::new("reviews", &reviews)?,
                    ratings: Upstream::new("ratings", &ratings)?,
                })
            }
            Service::Details => Self::Details,
            Service::Reviews { version, ratings } => Self::Reviews(reviews::Reviews {
                version,
                ratings: Upstream::new("ratings", &ratings)?,
                pod: pod.to_owned(),
            }),
            Service::Ratings { broken } => Self::Ratings(ratings::Ratings { broken }),
        })
    }

    async fn answer(&self, asked: &Asked) -> Answer {
        match self {
            Self::Productpage(page) => page.answer(asked).await,
            Self::Details => details(&asked.path),
            Self::Reviews(reviews) => reviews.answer(asked).await,
            Self::Ratings(ratings) => ratings.answer(&asked.path),
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let Cli { service, common } = Cli::parse();
    let app = App::new(service, &common.name)?;
    http::serve(common.listen, &common.name, Arc::new(app)).await
}

fn details(path: &str) -> Answer {
    match http::id_after(path, "/details/") {
        Some(id) => Answer::json(&json!({
            "id": id,
            "title": "The Comedy of Errors",
            "author": "William Shakespeare",
            "year": 1595,
            "type": "paperback",
            "pages": 200,
            "language": "English",
        })),
        None => Answer::elsewhere(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_given_by_number() {
        assert_eq!(details("/details/0").status, 200);
        assert!(details("/details/0").body.contains("\"author\":\"William Shakespeare\""));
        assert_eq!((details("/details/").status, details("/details/x").status), (404, 404));
        assert_eq!((details("/health").status, details("/").status), (200, 404));
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
