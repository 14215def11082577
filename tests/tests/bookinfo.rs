//! Bookinfo: without a mesh its pods run on two nodes and answer, and what cannot be reached is shown as missing; with
//! an agent on each node the page is whole, and who asks decides about the stars.

use std::fs;

use anyhow::{Result, ensure};
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

/// The whole chain, both nodes: client and productpage on a, details, reviews v2 and v3 and ratings on b.
#[tokio::test]
async fn the_page_shows_black_stars_to_jason_and_red_ones_to_others() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("bookinfo-page").await?;
    let bookinfo = Bookinfo::start(&lab).await?;
    bookinfo::apply(&lab, "reviews.yaml", "virtual-service-jason.yaml")?;
    let (a, b) = (lab.node("a").await?.agent(), lab.node("b").await?.agent());
    let agents = tokio::try_join!(a.start(), b.start())?;
    for pod in bookinfo.pods.iter().chain([&bookinfo.client]) {
        pod.enrolled().await?;
    }
    for (user, stars, version) in [("jason", "black", "v2"), ("ada", "red", "v3"), ("", "red", "v3")] {
        for _ in 0..5 {
            let page = bookinfo.client.http_get(&bookinfo.page(), &[("end-user", user)]).await?;
            let seen = [bookinfo::STARS_HEADER, bookinfo::REVIEWS_HEADER].map(|name| page.headers.get(name));
            ensure!(page.status == 200, "{page:?}");
            ensure!(seen == [Some(&stars.to_owned()), Some(&version.to_owned())], "{user:?} saw {seen:?}");
            ensure!(page.body.contains("1595"), "details are there too: {}", page.body);
        }
    }
    // Each hop is a service of its own for the metrics of its client's node.
    let metrics = agents.0.metrics().await?;
    for service in ["productpage", "reviews", "details"] {
        let labels =
            [("reporter", "source"), ("destination_service_name", service), ("response_code", "200")];
        let seen = lab::metric(&metrics, "istio_requests_total", &labels);
        ensure!((seen - 15.0).abs() < f64::EPSILON, "{service}: {seen}\n{metrics}");
    }
    lab.finish().await
}
