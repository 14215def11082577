//! The service over its wire, asked by the agent's own client: TLS, gRPC, and what each end makes of the other.

use std::{fs, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{REVIEWS, TestResult, World, limits, token, world};
use crate::{
    controller::{ServerCertificate, Services, key_sets::KeySets, serve},
    error::Error,
    identity::{Authority, EmbeddedCa, LeafPolicy, RemoteCaConfig, WorkloadIdentity},
};

const NAME: &str = "mesh-controller.mesh-system.svc";

/// The service of this world at an address, and what an agent has to know of it.
async fn served(
    world: World,
) -> super::Outcome<(tempfile::TempDir, RemoteCaConfig, CancellationToken, JoinHandle<()>)> {
    let World { dir, service, configuration } = world;
    let ca = Arc::new(EmbeddedCa::open(dir.path(), "cluster.local")?);
    let certificate = ServerCertificate::new(ca, vec![NAME.into(), "192.0.2.1".into()], &["h2"])?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let config = RemoteCaConfig {
        address: listener.local_addr()?.to_string(),
        server_name: NAME.into(),
        roots: dir.path().join("ca-cert.pem"),
        token: dir.path().join("token"),
    };
    fs::write(&config.token, token(dir.path(), "mesh-system/mesh-agent", "a")?)?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let running = tokio::spawn(async move {
        let services = Services { certificates: service, key_sets: KeySets::default() };
        serve(listener, certificate, services, stopped).await;
        drop(configuration);
    });
    Ok((dir, config, stop, running))
}

#[tokio::test]
async fn an_agent_is_certified_over_the_wire() -> TestResult {
    let (_dir, config, stop, running) = served(world(limits())?).await?;
    let authority = Authority::remote(config, "cluster.local")?;
    let identity = certified(&authority).await?;
    let certificate = identity.certificate();
    assert_eq!(certificate.identity.to_string(), REVIEWS);
    let LeafPolicy { lifetime, backdate } = LeafPolicy::default();
    assert_eq!(certificate.not_after - certificate.not_before, lifetime + backdate);
    assert!(identity.server_config().is_ok());
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(5), running).await??;
    Ok(())
}

#[tokio::test]
async fn a_refusal_reaches_the_operator_word_for_word() -> TestResult {
    let (_dir, config, ..) = served(world(limits())?).await?;
    let (address, path) = (config.address.clone(), config.token.clone());
    let authority = Authority::remote(config, "cluster.local")?;
    fs::write(&path, "no token")?;
    let error = refused(&authority).await?;
    let expected =
        format!("no certificate for {REVIEWS} from the certificate authority at {address}: Unauthenticated");
    assert!(error.detail.starts_with(&expected), "{error}");
    Ok(())
}

#[tokio::test]
async fn the_token_is_read_each_time_it_is_used() -> TestResult {
    let (dir, config, ..) = served(world(limits())?).await?;
    let path = config.token.clone();
    let authority = Authority::remote(config, "cluster.local")?;
    fs::write(&path, "")?;
    let error = refused(&authority).await?;
    assert!(error.detail.contains("it is empty"), "{error}");
    fs::write(&path, token(dir.path(), "mesh-system/mesh-agent", "a")?)?;
    certified(&authority).await?;
    Ok(())
}

/// How long a test asks.
const LIMIT: Duration = Duration::from_secs(20);

/// Nobody waits long for an authority, and for one in trouble not at all: what it says is found by asking again.
async fn certified(authority: &Authority) -> super::Outcome<Arc<WorkloadIdentity>> {
    let id = REVIEWS.parse()?;
    let asked = async {
        loop {
            if let Ok(identity) = authority.identity(&id).await {
                return identity;
            }
            tokio::task::yield_now().await;
        }
    };
    Ok(tokio::time::timeout(LIMIT, asked).await?)
}

/// What is said to who gets no certificate.
async fn refused(authority: &Authority) -> super::Outcome<Error> {
    let id = REVIEWS.parse()?;
    let asked = async {
        loop {
            match authority.identity(&id).await {
                Ok(_) => return Err("certified".into()),
                Err(error) if error.detail.ends_with("it has not answered yet") => {}
                Err(error) => return Ok(error),
            }
        }
    };
    tokio::time::timeout(LIMIT, asked).await?
}

#[tokio::test]
async fn a_server_that_is_not_the_authority_hears_no_token() -> TestResult {
    let (_dir, good, ..) = served(world(limits())?).await?;
    let (other, ..) = served(world(limits())?).await?;
    let wrong_roots = RemoteCaConfig { roots: other.path().join("ca-cert.pem"), ..good.clone() };
    let wrong_name = RemoteCaConfig { server_name: "another.svc".into(), ..good.clone() };
    for (config, expected) in
        [(wrong_roots, "invalid peer certificate: UnknownIssuer"), (wrong_name, "not valid for name")]
    {
        let error = refused(&Authority::remote(config, "cluster.local")?).await?;
        let (where_to, detail) = (&good.address, &error.detail);
        assert!(detail.contains(where_to.as_str()) && detail.contains(expected), "{detail}");
    }
    // An address among the names is one, too.
    let by_address = RemoteCaConfig { server_name: "192.0.2.1".into(), ..good };
    certified(&Authority::remote(by_address, "cluster.local")?).await?;
    Ok(())
}

#[tokio::test]
async fn connections_are_made_anew() -> TestResult {
    let (dir, config, stop, running) = served(world(limits())?).await?;
    let (address, authority) = (config.address.clone(), Authority::remote(config, "cluster.local")?);
    drop(certified(&authority).await?);
    stop.cancel();
    running.await?;
    let error = refused(&authority).await?;
    assert!(error.detail.contains(&address), "{error}");
    // Another controller at the same address, with the same state.
    let World { service, configuration, .. } = world_in(dir.path())?;
    let certificate = ServerCertificate::new(
        Arc::new(EmbeddedCa::open(dir.path(), "cluster.local")?),
        vec![NAME.into()],
        &["h2"],
    )?;
    let listener = TcpListener::bind(&address).await?;
    let services = Services { certificates: service, key_sets: KeySets::default() };
    tokio::spawn(serve(listener, certificate, services, CancellationToken::new()));
    certified(&authority).await?;
    drop(configuration);
    Ok(())
}

fn world_in(state: &std::path::Path) -> super::Outcome<World> {
    let fresh = tempfile::tempdir()?;
    for file in ["ca-key.pem", "ca-cert.pem", "token-key.pem"] {
        fs::copy(state.join(file), fresh.path().join(file))?;
    }
    super::world_at(fresh, limits())
}
