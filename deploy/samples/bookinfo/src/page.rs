//! The page as HTML. Pure: from what the services said to text.

use std::fmt::Write as _;

use serde_json::Value;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}\
    th{text-align:left;padding-right:1rem}blockquote{margin:1rem 0}.black{color:#111}.red{color:#c00}\
    .error{color:#a40}footer{color:#666;font-size:85%}";
/// Stars are out of this many.
const MOST_STARS: usize = 5;

/// The page, for a user or for nobody in particular.
pub fn render(
    user: Option<&str>,
    details: &Result<Value, String>,
    reviews: &Result<Value, String>,
) -> String {
    let user = user.map_or_else(|| "nobody signed in".to_owned(), escaped);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>The Comedy of Errors</title>\
         <style>{STYLE}</style></head>\n<body><p>{user}</p><h1>The Comedy of Errors</h1>\n\
         <h2>Book details</h2>\n{}<h2>Reviews</h2>\n{}</body></html>\n",
        book(details),
        readers(reviews),
    )
}

/// Which version of reviews answered: `v1` to `v3`, or `none`.
pub fn version(reviews: &Result<Value, String>) -> &str {
    reviews.as_ref().ok().and_then(|reviews| reviews["version"].as_str()).unwrap_or("none")
}

/// The color of the stars; `none` where there are no stars, `error` where there should be.
pub fn stars(reviews: &Result<Value, String>) -> &str {
    let Ok(reviews) = reviews else { return "error" };
    let rating = &reviews["reviews"][0]["rating"];
    match (rating["color"].as_str(), rating.get("error")) {
        (Some(color), _) => color,
        (None, Some(_)) => "error",
        (None, None) => "none",
    }
}

fn book(details: &Result<Value, String>) -> String {
    match details {
        Ok(details) => {
            let mut table = "<table>\n".to_owned();
            for (label, key) in [("Author", "author"), ("Year", "year"), ("Type", "type"), ("Pages", "pages")]
            {
                let _ = writeln!(table, "<tr><th>{label}</th><td>{}</td></tr>", text(&details[key]));
            }
            table + "</table>\n"
        }
        Err(reason) => error("Book details are not available", reason),
    }
}

fn readers(reviews: &Result<Value, String>) -> String {
    let reviews = match reviews {
        Ok(reviews) => reviews,
        Err(reason) => return error("Reviews are not available", reason),
    };
    let mut quotes = String::new();
    for review in reviews["reviews"].as_array().into_iter().flatten() {
        let _ = writeln!(
            quotes,
            "<blockquote><p>{}</p><cite>{}</cite> {}</blockquote>",
            text(&review["text"]),
            text(&review["reviewer"]),
            rating(&review["rating"]),
        );
    }
    let (version, pod) = (text(&reviews["version"]), text(&reviews["podname"]));
    quotes + &format!("<footer>Reviews {version}, served by {pod}</footer>\n")
}

fn rating(rating: &Value) -> String {
    if let Some(stars) = rating["stars"].as_u64() {
        let full = usize::try_from(stars).unwrap_or(MOST_STARS).min(MOST_STARS);
        let shown = "★".repeat(full) + &"☆".repeat(MOST_STARS - full);
        return format!("<span class=\"{}\">{shown}</span>", text(&rating["color"]));
    }
    rating["error"]
        .as_str()
        .map(|said| error(said, rating["reason"].as_str().unwrap_or_default()))
        .unwrap_or_default()
}

fn error(what: &str, reason: &str) -> String {
    format!("<p class=\"error\">{} ({})</p>\n", escaped(what), escaped(reason))
}

/// A value as text for HTML: strings without their quotes, nothing for null.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => escaped(text),
        other => escaped(&other.to_string()),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reviews(rating: &Value) -> Value {
        let review = json!({ "reviewer": "Reviewer1", "text": "Good & short", "rating": rating });
        json!({ "version": "v2", "podname": "reviews-v2", "reviews": [review] })
    }

    #[test]
    fn stars_version_and_pod_are_shown() {
        let reviews = Ok(reviews(&json!({ "stars": 4, "color": "black" })));
        let page = render(Some("jason"), &Ok(json!({ "author": "W. S.", "year": 1595 })), &reviews);
        assert!(page.contains("<span class=\"black\">★★★★☆</span>"), "{page}");
        assert!(page.contains("Reviews v2, served by reviews-v2") && page.contains("<p>jason</p>"), "{page}");
        assert!(page.contains("<td>W. S.</td>") && page.contains("<td>1595</td>"), "{page}");
        assert!(page.contains("Good &amp; short"), "{page}");
        assert_eq!((version(&reviews), stars(&reviews)), ("v2", "black"));
    }

    #[test]
    fn no_stars_are_no_error() {
        let reviews = Ok(reviews(&Value::Null));
        assert_eq!(stars(&reviews), "none");
        assert!(!render(None, &Ok(json!({})), &reviews).contains("class=\"error\""));
    }

    #[test]
    fn what_fails_is_said_and_the_rest_is_shown() {
        let failed = json!({ "error": "Ratings are not available", "reason": "it answered 500" });
        let no_ratings = Ok(reviews(&failed));
        let page = render(None, &Err("status 503".to_owned()), &no_ratings);
        assert!(page.contains("Book details are not available (status 503)"), "{page}");
        assert!(
            page.contains("Ratings are not available (it answered 500)") && page.contains("Good"),
            "{page}"
        );
        assert_eq!(stars(&no_ratings), "error");
        let nothing = Err("refused".to_owned());
        assert!(render(None, &Ok(json!({})), &nothing).contains("Reviews are not available (refused)"));
        assert_eq!((version(&nothing), stars(&nothing)), ("none", "error"));
    }

    #[test]
    fn nothing_a_user_sends_becomes_markup() {
        let page = render(
            Some("<script>\"&"),
            &Ok(json!({})),
            &Ok(reviews(&json!({ "stars": 99, "color": "red" }))),
        );
        assert!(page.contains("&lt;script&gt;&quot;&amp;") && !page.contains("<script>"), "{page}");
        assert!(page.contains("★★★★★<"), "{page}");
    }
}
