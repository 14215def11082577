//! Bookinfo without a mesh: its pods run on two nodes and answer, and what cannot be reached is shown as missing.

use std::fs;

use anyhow::Result;
use lab::{
    Lab,
    bookinfo::{self, Bookinfo, PORT},
};
use serde_json::Value;

#[tokio::test]
async fn services_answer_and_go_on_without_what_they_cannot_reach() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("bookinfo").await?;
    let bookinfo = Bookinfo::start(&lab).await?;
    // Service addresses are routed nowhere here, so the page has nothing to show but says so.
    let page = bookinfo.client.http_get(&bookinfo.page_of_pod()?, &[("end-user", "jason")]).await?;
    assert_eq!(page.status, 200);
    assert_eq!(page.headers.get(bookinfo::REVIEWS_HEADER).map(String::as_str), Some("none"));
    assert_eq!(page.headers.get(bookinfo::POD_HEADER).map(String::as_str), Some("productpage-v1"));
    assert!(page.body.contains("jason") && page.body.contains("Reviews are not available"), "{}", page.body);
    let ask = async |pod: &str, path: &str| -> Result<Value> {
        let url = format!("http://{}{path}", bookinfo.pod(pod)?.at(PORT));
        Ok(serde_json::from_str(&bookinfo.client.http_get(&url, &[]).await?.body)?)
    };
    assert_eq!(ask("ratings-v1", "/ratings/0").await?["ratings"]["Reviewer1"], 5);
    assert_eq!(ask("details-v1", "/details/0").await?["year"], 1595);
    assert_eq!(ask("reviews-v1", "/reviews/0").await?["version"], "v1");
    let without = ask("reviews-v3", "/reviews/0").await?;
    assert_eq!(without["reviews"][0]["rating"]["error"], "Ratings are not available");
    lab.finish().await
}

#[tokio::test]
async fn the_manifests_of_the_sample_get_addresses() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("bookinfo-yaml").await?;
    let mut bookinfo = Bookinfo::start(&lab).await?;
    let yaml = fs::read_to_string(lab.config_dir().join("bookinfo.yaml"))?;
    for service in [&bookinfo.details, &bookinfo.ratings, &bookinfo.reviews, &bookinfo.productpage] {
        let given = format!("spec:\n  clusterIP: {}\n", service.ip());
        assert_eq!(yaml.matches(&given).count(), 1, "{yaml}");
    }
    assert_eq!(yaml.matches("kind: Service\n").count(), 4);
    assert_eq!(yaml.matches("kind: ServiceAccount\n").count(), 4);
    assert!(!yaml.contains("kind: Deployment"));
    let broken = bookinfo.add(&lab, "a", "ratings-broken", "ratings", "v1", &["--broken=503"]).await?;
    let answer = bookinfo.client.http_get(&format!("http://{}/ratings/0", broken.at(PORT)), &[]).await?;
    assert_eq!(answer.status, 503);
    lab.finish().await
}
