//! What the kernel has no room for is refused at once, counted, and logged once.

use std::process::Command;

use anyhow::{Result, ensure};
use lab::{Lab, apps, eventually, metric, require_root};

const PORT: u16 = 7000;
const REFUSED: &str = "mesh_kernel_refusals_total";
const REASON: [(&str, &str); 1] = [("reason", "captured_connections_full")];

#[tokio::test]
async fn a_full_table_is_seen_in_metrics_and_log() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("losses").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let pod = a.pod("p").start().await?;
    let stranger = b.pod("stranger").unenrolled().start().await?;
    stranger.serve(apps::tcp_echo(PORT)).await?;
    let agent = a
        .agent()
        .arg("--max-captured-connections-per-pod")
        .arg("1")
        .arg("--drain-deadline")
        .arg("0.1")
        .start()
        .await?;
    pod.enrolled().await?;
    let before = agent.metrics().await?;
    ensure!(
        before.contains("mesh_kernel_lost_total{reason=\"flows_full\"} 0"),
        "not there from the start\n{before}"
    );

    let script = format!("exec 3<>/dev/tcp/{}/{PORT}; echo open; exec sleep 60", stranger.ip());
    let mut command = Command::new("bash");
    command.args(["-c", &script]);
    let holds = pod.spawn(command)?;
    eventually("a connection that stays", async || {
        ensure!(holds.stdout() == "open\n", "{}", holds.tail());
        Ok(())
    })
    .await?;
    for _ in 0..3 {
        let refused = pod.tcp(stranger.at(PORT), 10, &[]).await;
        let refused = refused.map_err(|error| format!("{error:#}"));
        ensure!(refused.as_ref().is_err_and(|text| text.contains("refused")), "{refused:?}");
    }
    eventually("the count of three", async || {
        let metrics = agent.metrics().await?;
        let count = metric(&metrics, REFUSED, &REASON);
        ensure!((count - 3.0).abs() < f64::EPSILON, "{count}");
        Ok(())
    })
    .await?;
    let log = agent.log();
    let lines: Vec<_> = log.iter().filter(|line| line.contains(REASON[0].1)).collect();
    ensure!(lines.len() == 1 && lines[0].contains("--max-captured-connections-per-pod"), "{lines:?}");
    lab.finish().await
}
