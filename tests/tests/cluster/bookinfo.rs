//! Bookinfo as Deployments, without a mesh: from both nodes, through names and service addresses, every version of the
//! reviews answers.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use lab::cluster::{Cluster, Namespace};

/// Each of three versions is missed by as many requests in a row with a probability of (2/3)^60, some 3 in 10^11.
const REQUESTS: usize = 60;

#[test]
fn bookinfo_answers_through_names_and_service_addresses() -> Result<()> {
    let Some(cluster) = Cluster::given()? else { return Ok(()) };
    let namespace = cluster.namespace("bookinfo")?;
    namespace.apply_file("deploy/samples/bookinfo/bookinfo.yaml")?;
    let nodes = cluster.nodes()?;
    for node in &nodes {
        namespace.client(&format!("client-{node}"), node)?;
    }
    namespace.deployed()?;
    let address = namespace.get(&["service", "productpage"])?["spec"]["clusterIP"].clone();
    let address = address.as_str().context("productpage has a service address")?;
    ensure!(address.starts_with("10.96."), "{address} is an address of services");
    for node in &nodes {
        let client = format!("client-{node}");
        let looked_up = namespace.exec(&client, &["nslookup", "productpage.bookinfo.svc.cluster.local"])?;
        ensure!(looked_up.contains(address), "{client} looks up {address}: {looked_up}");
        // The node's rules for a service may come a moment after its pods are ready.
        let first =
            "until curl -sf -o /dev/null --max-time 5 http://productpage:9080/productpage; do :; done";
        namespace.exec(&client, &["timeout", "120", "sh", "-c", first])?;
        for host in ["productpage", "productpage.bookinfo", "productpage.bookinfo.svc.cluster.local", address]
        {
            let page =
                namespace.exec(&client, &["curl", "-sSf", &format!("http://{host}:9080/productpage")])?;
            ensure!(page.contains("The Comedy of Errors"), "{client} asks {host}: {page}");
            ensure!(!page.contains("not available"), "nothing is missing on the page: {page}");
        }
        let seen = versions(&namespace, &client, "somebody", REQUESTS)?;
        assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), ["v1", "v2", "v3"], "from {client}");
    }
    Ok(())
}

/// Which versions of the reviews answered so many requests of this user; every one has to succeed.
pub fn versions(
    namespace: &Namespace,
    client: &str,
    user: &str,
    requests: usize,
) -> Result<BTreeSet<String>> {
    let one = format!(
        "curl -sSf -o /dev/null -H 'end-user: {user}' -w '%header{{x-bookinfo-reviews}}\\n' http://productpage:9080/productpage"
    );
    let script = format!("for i in $(seq {requests}); do {one} || exit 1; done");
    let said = namespace.exec(client, &["sh", "-c", &script])?;
    ensure!(said.lines().count() == requests, "{said}");
    Ok(said.lines().map(str::to_owned).collect())
}
