//! Ratings: how many stars each reader gives.

use serde_json::json;

use crate::http::{Answer, id_after};

/// The service.
#[derive(Debug)]
pub struct Ratings {
    /// The status of every answer, where this is a broken replica.
    pub broken: Option<u16>,
}

impl Ratings {
    /// Answers a request.
    pub fn answer(&self, path: &str) -> Answer {
        match (id_after(path, "/ratings/"), self.broken) {
            (Some(_), Some(status)) => {
                Answer::with_status(status, &json!({ "error": "this replica is broken" }))
            }
            (Some(id), None) => {
                Answer::json(&json!({ "id": id, "ratings": { "Reviewer1": 5, "Reviewer2": 4 } }))
            }
            (None, _) => Answer::elsewhere(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_replica_fails_but_is_healthy() {
        let ratings = Ratings { broken: Some(503) };
        assert_eq!((ratings.answer("/ratings/0").status, ratings.answer("/health").status), (503, 200));
        assert_eq!(
            Ratings { broken: None }.answer("/ratings/7").body,
            r#"{"id":7,"ratings":{"Reviewer1":5,"Reviewer2":4}}"#
        );
    }
}
