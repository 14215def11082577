//! Abuse of HTTP/2 by a client costs bounded memory and time, and nobody else notices.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    apps::{AttackKind, End},
    fields,
};

use crate::world::{HTTP2, World, counted, logged_times};

/// Memory that one connection may come to cost, whatever it sends: windows, and what the allocator keeps.
const MEMORY: u64 = 64 << 20;

/// Processor time of a debug build that may go with an attack of any size, the bystander's and the last requests included.
const CPU: Duration = Duration::from_secs(4);

/// Processor time of a debug build for each frame that the attacker got rid of.
const CPU_PER_FRAME: Duration = Duration::from_micros(60);

/// Asserts what an attack may cost the agent.
fn cheap(kind: AttackKind, spent: Duration, attacked: &lab::apps::Attack) -> Result<()> {
    let allowed = CPU + CPU_PER_FRAME * u32::try_from(attacked.frames_sent)?;
    eprintln!("{kind:?} took {spent:?} of processor time, {allowed:?} allowed");
    ensure!(spent < allowed, "{kind:?} took {spent:?} of processor time: {attacked:?}");
    Ok(())
}

/// What the log says of the rule that ends a connection, for the attacks that are ended in any case.
fn broken_rule(kind: AttackKind) -> Option<&'static str> {
    matches!(
        kind,
        AttackKind::RapidReset
            | AttackKind::ContinuationFlood
            | AttackKind::HeaderBomb
            | AttackKind::OpenStreams
            | AttackKind::EmptyDataFlood
    )
    .then_some("the peer breaks HTTP/2")
}

/// Attacks the far app, and shows that others are served meanwhile and after, for bounded memory and CPU time.
async fn attack(kind: AttackKind, count: u64, args: &[&str]) -> Result<Option<lab::apps::Attack>> {
    let name = format!("abuse-{kind:?}").to_lowercase();
    let flags = ["--flush-timeout=2", "--request-head-timeout=2"];
    let Some(world) = World::with(&name, &flags).await? else { return Ok(None) };
    let agent = &world.pair.agent_a;
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    let (memory, cpu) = (agent.rss_bytes()?, agent.cpu_time()?);
    // Who waits for the last of many resets leaves with it.
    let limit = Duration::from_secs(if kind == AttackKind::ZeroWindow { 30 } else { 8 });
    let bystander = world.near.pod.get(world.far.url("/")).many(40, 2, None);
    let (attacked, seen) =
        tokio::join!(world.client().h2_attack(world.far.at(HTTP2), kind, count, limit, args), bystander);
    let (attacked, seen) = (attacked?, seen?);
    eprintln!("{attacked:?}");
    ensure!(seen.statuses.get(&200) == Some(&40), "another pod suffered: {seen:?}");
    let grown = agent.peak_rss_bytes()?.saturating_sub(memory);
    ensure!(grown < MEMORY, "{kind:?} took {} MiB: {attacked:?}", grown >> 20);
    let near = [("reporter", "source"), ("source_workload", "near"), ("response_code", "200")];
    counted(agent, "istio_requests_total", &near, 40).await?;
    if let Some(rule) = broken_rule(kind) {
        // Ended by a rule, once, and told so: who it was and what is wrong.
        let refused = [("kind", "bad_request"), ("side", "source"), ("pod", "client")];
        counted(agent, "mesh_refused_total", &refused, 1).await?;
        let line = [("event", "refused"), ("pod", "client"), ("kind", "bad_request"), ("flags", "DPE")];
        let line = agent.logged(&line).await?;
        ensure!(line["error"].contains(rule), "{line:?}");
    }
    if let Some(resets) = attacked.resets.get(&REFUSED_STREAM).filter(|_| kind == AttackKind::OpenStreams) {
        let refused = [("kind", "overflow"), ("side", "source"), ("pod", "client")];
        counted(agent, "mesh_refused_total", &refused, *resets).await?;
        let line = [("event", "refused"), ("kind", "overflow"), ("pod", "client"), ("flags", "UO")];
        logged_times(agent, &line, usize::try_from(*resets)?).await?;
    }
    if kind == AttackKind::ZeroWindow {
        let given_up = [("response_flags", "SI"), ("reporter", "source"), ("source_workload", "client")];
        counted(agent, "istio_requests_total", &given_up, count).await?;
        let line = [("src.workload", "client"), ("flags", "SI"), ("status", "200"), ("reporter", "source")];
        logged_times(agent, &line, usize::try_from(count)?).await?;
    }
    cheap(kind, agent.cpu_time()?.saturating_sub(cpu), &attacked)?;
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await?;
    Ok(Some(attacked))
}

/// `REFUSED_STREAM`
const REFUSED_STREAM: u32 = 7;
/// `ENHANCE_YOUR_CALM`
const CALM: u32 = 11;

fn told_to_calm_down(attacked: &lab::apps::Attack) -> bool {
    attacked.goaway.as_ref().is_some_and(|goaway| goaway.code == CALM)
}

#[tokio::test]
async fn rapid_resets_end_the_connection() -> Result<()> {
    let Some(attacked) = attack(AttackKind::RapidReset, 20_000, &[]).await? else { return Ok(()) };
    ensure!(attacked.end != End::Survived, "{attacked:?}");
    ensure!(told_to_calm_down(&attacked) || attacked.end == End::Reset, "{attacked:?}");
    Ok(())
}

#[tokio::test]
async fn header_blocks_without_end_are_ended() -> Result<()> {
    let Some(attacked) = attack(AttackKind::ContinuationFlood, 20_000, &[]).await? else { return Ok(()) };
    ensure!(matches!(attacked.end, End::Closed | End::Reset) && attacked.answers == 0, "{attacked:?}");
    Ok(())
}

#[tokio::test]
async fn header_bombs_are_not_unfolded() -> Result<()> {
    let Some(attacked) = attack(AttackKind::HeaderBomb, 2_000, &[]).await? else { return Ok(()) };
    ensure!(told_to_calm_down(&attacked) && attacked.answers == 0, "{attacked:?}");
    Ok(())
}

#[tokio::test]
async fn settings_pings_and_empty_data_cost_what_they_cost() -> Result<()> {
    for (kind, deaf) in [
        (AttackKind::SettingsFlood, true),
        (AttackKind::PingFlood, true),
        (AttackKind::PingFlood, false),
        (AttackKind::EmptyDataFlood, false),
    ] {
        let args: &[&str] = if deaf { &["--deaf"] } else { &[] };
        let Some(attacked) = attack(kind, 100_000, args).await? else { return Ok(()) };
        ensure!(attacked.frames_sent > 0, "{attacked:?}");
    }
    Ok(())
}

#[tokio::test]
async fn windows_that_stay_closed_are_given_up() -> Result<()> {
    // Several frames each, and all that one mesh connection carries has room there: none waits for another's to be reset.
    let args = ["--path=/pattern/38000", "--until-resets=500", "--linger-ms=30000"];
    let Some(attacked) = attack(AttackKind::ZeroWindow, 500, &args).await? else { return Ok(()) };
    ensure!(attacked.data_bytes == 0, "{attacked:?}");
    ensure!(attacked.resets.values().sum::<u64>() == 500, "{attacked:?}");
    Ok(())
}

#[tokio::test]
async fn windows_that_are_open_and_a_client_that_reads_nothing() -> Result<()> {
    // Each answer fits the buffers of a stream; together they are hundreds of megabytes.
    let args = ["--path=/bytes/390000", "--deaf", "--deaf-ms=4000", "--linger-ms=3000"];
    let Some(world) = World::with("abuse-deaf", &["--flush-timeout=2"]).await? else { return Ok(()) };
    let agent = &world.pair.agent_a;
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    let (memory, cpu) = (agent.rss_bytes()?, agent.cpu_time()?);
    let attack = world.client().h2_attack(
        world.far.at(HTTP2),
        AttackKind::OpenWindows,
        1000,
        Duration::from_secs(10),
        &args,
    );
    let attacked = attack.await?;
    ensure!(attacked.end != End::Survived, "{attacked:?}");
    cheap(AttackKind::OpenWindows, agent.cpu_time()?.saturating_sub(cpu), &attacked)?;
    // Half of it for each of both ways through the agent; far less than what was asked for.
    let grown = agent.peak_rss_bytes()?.saturating_sub(memory);
    eprintln!("{} MiB, {attacked:?}", grown >> 20);
    ensure!(grown < 2 * MEMORY, "it took {} MiB: {attacked:?}", grown >> 20);
    let refused = [("kind", "stream_idle"), ("side", "source"), ("pod", "client")];
    counted(agent, "mesh_refused_total", &refused, 1).await?;
    let line = [("event", "refused"), ("pod", "client"), ("kind", "stream_idle"), ("flags", "SI")];
    let line = agent.logged(&line).await?;
    ensure!(line["error"] == "the client has taken nothing of what is ready for it for 2s", "{line:?}");
    // What was open is told first, and as what it is.
    let lines = agent.access_log();
    let given_up = lines.iter().position(|line| line.contains("kind=stream_idle"));
    let of_stream = |line: &String| line.contains("path=/bytes/390000") && line.contains("reporter=source");
    let requests: Vec<_> = lines.iter().enumerate().filter(|(_, line)| of_stream(line)).collect();
    let stalled = |line: &String| fields(line)["flags"] == "SI";
    ensure!(requests.iter().any(|(_, line)| stalled(line)), "{requests:?}");
    for (at, line) in requests {
        ensure!(Some(at) < given_up, "after the connection: {line}");
        ensure!(stalled(line) || fields(line)["flags"] == "-", "{line}");
    }
    ensure!(world.client().http_get(&world.far.url("/"), &[]).await?.status == 200);
    world.finish().await
}

#[tokio::test]
async fn requests_that_are_never_finished_stay_within_the_limit() -> Result<()> {
    let Some(attacked) = attack(AttackKind::OpenStreams, 5_000, &[]).await? else { return Ok(()) };
    // 1024 at a time: the rest is refused, or never gets its turn.
    ensure!(attacked.answers <= 1024 && attacked.resets.contains_key(&REFUSED_STREAM), "{attacked:?}");
    Ok(())
}
