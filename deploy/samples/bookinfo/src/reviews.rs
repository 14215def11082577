//! Reviews: what two readers think; v2 and v3 show their stars, for which they ask ratings.

use anyhow::Result;
use hyper::StatusCode;
use serde_json::{Value, json};

use crate::http::{Answer, Asked, Upstream, id_after};

/// Who wrote what.
const REVIEWS: [(&str, &str); 2] = [
    ("Reviewer1", "Two pairs of twins, one day, and not a dull line. I laughed until the lights went on."),
    ("Reviewer2", "Less famous than its sisters, and better built than most of them."),
];

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Version {
    /// Without stars; never asks ratings.
    V1,
    /// Black stars.
    V2,
    /// Red stars.
    V3,
}

impl Version {
    fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::V3 => "v3",
        }
    }

    fn color(self) -> Option<&'static str> {
        match self {
            Self::V1 => None,
            Self::V2 => Some("black"),
            Self::V3 => Some("red"),
        }
    }
}

/// The service.
#[derive(Debug)]
pub struct Reviews {
    /// Which version this is.
    pub version: Version,
    /// Where stars come from.
    pub ratings: Upstream,
    /// The name of this pod.
    pub pod: String,
}

impl Reviews {
    /// Answers a request.
    pub async fn answer(&self, asked: &Asked) -> Answer {
        let Some(id) = id_after(&asked.path, "/reviews/") else { return Answer::elsewhere(&asked.path) };
        let stars = match self.version.color() {
            Some(color) => {
                Some((color, self.ratings.get(&format!("/ratings/{id}"), &asked.travelling).await))
            }
            None => None,
        };
        Answer::json(&body(id, self.version, &self.pod, stars.as_ref()))
    }
}

/// What ratings said.
type Rated = Result<(StatusCode, Value)>;

/// The answer, given what ratings said, where it was asked.
fn body(id: u32, version: Version, pod: &str, stars: Option<&(&str, Rated)>) -> Value {
    let rating = |reviewer: &str| match stars {
        None => None,
        Some((color, Ok((StatusCode::OK, ratings)))) => {
            Some(json!({ "stars": ratings["ratings"][reviewer], "color": color }))
        }
        Some((_, Ok((status, _)))) => Some(unavailable(&format!("it answered {}", status.as_u16()))),
        Some((_, Err(error))) => Some(unavailable(&format!("{error:#}"))),
    };
    let reviews: Vec<Value> = REVIEWS
        .iter()
        .map(|(reviewer, text)| match rating(reviewer) {
            Some(rating) => json!({ "reviewer": reviewer, "text": text, "rating": rating }),
            None => json!({ "reviewer": reviewer, "text": text }),
        })
        .collect();
    json!({ "id": id, "podname": pod, "version": version.name(), "reviews": reviews })
}

fn unavailable(reason: &str) -> Value {
    json!({ "error": "Ratings are not available", "reason": reason })
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn v1_has_no_stars() {
        let body = body(0, Version::V1, "p", None);
        assert_eq!((body["version"].as_str(), body["podname"].as_str()), (Some("v1"), Some("p")));
        assert_eq!(body["reviews"].as_array().map(Vec::len), Some(2));
        assert!(body["reviews"][0].get("rating").is_none());
    }

    #[test]
    fn stars_have_the_color_of_the_version() {
        let ratings = json!({ "id": 0, "ratings": { "Reviewer1": 5, "Reviewer2": 4 } });
        let body = body(0, Version::V3, "p", Some(&("red", Ok((StatusCode::OK, ratings)))));
        assert_eq!(body["reviews"][0]["rating"], json!({ "stars": 5, "color": "red" }));
        assert_eq!(body["reviews"][1]["rating"]["stars"], 4);
    }

    #[test]
    fn without_ratings_the_reviews_are_still_there() {
        for (failure, reason) in [
            (Ok((StatusCode::INTERNAL_SERVER_ERROR, json!("fault"))), "it answered 500"),
            (Err(anyhow!("refused")), "refused"),
        ] {
            let body = body(0, Version::V2, "p", Some(&("black", failure)));
            assert_eq!(body["reviews"][0]["rating"]["error"], "Ratings are not available");
            assert_eq!(body["reviews"][0]["rating"]["reason"], reason);
            assert!(body["reviews"][1]["text"].is_string());
        }
    }
}
