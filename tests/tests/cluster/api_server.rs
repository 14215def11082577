//! The API server may be away: what runs goes on meanwhile, and afterwards everything is as before. Tests of the mesh under
//! the same conditions stand on this one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use lab::cluster::Cluster;

use crate::load;

fn now() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

#[test]
fn pods_go_on_while_the_api_server_is_away() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let namespace = cluster.namespace("api-server")?;
    let nodes = load::begin(&cluster, &namespace)?;
    cluster.stop("kube-apiserver")?;
    let gone = now()?;
    ensure!(cluster.kubectl(["get", "--raw", "/readyz"]).is_err(), "it answers, though it has ended");
    cluster.start("kube-apiserver")?;
    let back = now()?;
    for node in &nodes {
        let answers = load::end(&namespace, node)?;
        ensure!(
            answers.iter().all(|(_, status)| status == "200"),
            "all requests of {node} succeed: {answers:?}"
        );
        let meanwhile = answers.iter().map(|(sent, _)| sent);
        let count = meanwhile.filter(|sent| (gone.as_secs()..=back.as_secs()).contains(sent)).count();
        ensure!(count > 0, "{node} sent requests while there was no API server: {answers:?}");
    }
    Ok(())
}
