//! Productpage: what people see. Asks details and reviews at the same time, and shows what came.

use anyhow::Result;
use hyper::StatusCode;
use serde_json::{Value, json};

use crate::{
    http::{Answer, Asked, Upstream, id_after},
    page,
};

/// The path of the API.
const PRODUCTS: &str = "/api/v1/products";

/// The service.
#[derive(Debug)]
pub struct Productpage {
    /// What is printed on the book.
    pub details: Upstream,
    /// What readers think.
    pub reviews: Upstream,
    /// Stars, for the API alone: on the page they come through reviews.
    pub ratings: Upstream,
}

impl Productpage {
    /// Answers a request.
    pub async fn answer(&self, asked: &Asked) -> Answer {
        match asked.path.as_str() {
            "/" | "/productpage" => self.page(asked).await,
            PRODUCTS => Answer::json(&json!([{ "id": 0, "title": "The Comedy of Errors" }])),
            path => match path.strip_prefix(PRODUCTS).map(|rest| rest.trim_start_matches('/')) {
                Some(product) => self.product(product, asked).await,
                None => Answer::elsewhere(path),
            },
        }
    }

    async fn page(&self, asked: &Asked) -> Answer {
        let (details, reviews) = tokio::join!(
            self.details.get("/details/0", &asked.travelling),
            self.reviews.get("/reviews/0", &asked.travelling),
        );
        let (details, reviews) = (usable(details), usable(reviews));
        let user = asked.travelling.get("end-user").and_then(|user| user.to_str().ok());
        let mut answer = Answer::html(page::render(user, &details, &reviews));
        answer.headers = vec![
            ("x-bookinfo-reviews", page::version(&reviews).to_owned()),
            ("x-bookinfo-stars", page::stars(&reviews).to_owned()),
        ];
        answer
    }

    /// `ID`, `ID/reviews` or `ID/ratings`: passes on what the service behind it says, its status included.
    async fn product(&self, product: &str, asked: &Asked) -> Answer {
        let (id, part) = product.split_once('/').unwrap_or((product, "details"));
        let upstream = match part {
            "details" => &self.details,
            "reviews" => &self.reviews,
            "ratings" => &self.ratings,
            _ => return Answer::elsewhere(&asked.path),
        };
        let Some(id) = id_after(id, "") else { return Answer::elsewhere(&asked.path) };
        match upstream.get(&format!("/{part}/{id}"), &asked.travelling).await {
            Ok((status, body)) => Answer::with_status(status.as_u16(), &body),
            Err(error) => Answer::with_status(503, &json!({ "error": format!("{error:#}") })),
        }
    }
}

/// What can be shown, or why there is nothing.
fn usable(answered: Result<(StatusCode, Value)>) -> Result<Value, String> {
    match answered {
        Ok((status, body)) if status.is_success() => Ok(body),
        Ok((status, _)) => Err(format!("status {}", status.as_u16())),
        Err(error) => Err(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_by_its_status() {
        assert_eq!(usable(Ok((StatusCode::OK, json!(1)))), Ok(json!(1)));
        assert_eq!(usable(Ok((StatusCode::SERVICE_UNAVAILABLE, json!(1)))), Err("status 503".to_owned()));
        assert_eq!(usable(Err(anyhow::anyhow!("refused"))), Err("refused".to_owned()));
    }
}
