//! `mesh-agent controller` and `mesh-agent token`: their parts, put together and ended in order.

use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{NotStarted, Signals, source::From, start_log};
use crate::{
    admin::{self, Readiness},
    config::{ControllerConfig, TokenConfig, TokensOf},
    controller::{
        Accounts, ApiServer, AuthoritySecret, Callers, CertificateService, Limits, Reviews,
        ServerCertificate, Services, TokenFor, TokenKey, Tokens,
        jwks::{Addresses, Fetcher},
        key_sets::KeySets,
        leader::Candidate,
        root_config_map, serve, status,
        webhook::{self, Webhook},
    },
    identity::{EmbeddedCa, write_over},
    source::{Cluster, Sandboxes, Source},
    state::compile::{Netns, Settings},
};

/// `mesh-agent controller`: runs until SIGTERM or SIGINT.
pub fn controller(config: ControllerConfig, log: &str) -> Result<()> {
    start_log(log)?;
    let from = From::find(&config.source, Cluster::is_around(), "controller")?;
    Signals::hold().context("holding signals back")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(config, &from))
}

async fn run(config: ControllerConfig, from: &From) -> Result<()> {
    let mut signals = Signals::register().context("listening for signals")?;
    let settings = Settings {
        trust_domain: config.trust_domain.as_str().into(),
        root_namespace: config.root_namespace.as_str().into(),
        node: None,
        netns: Netns::Annotation,
        gateway: None,
    };
    let cluster = from.cluster().await?;
    // It enrols nothing.
    let source =
        from.follow(cluster.as_ref(), settings.clone(), (Path::new(""), &Sandboxes::default())).await?;
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("--listen {}", config.listen))?;
    let readiness = admin::Listener::bind(config.readiness).await?;
    let ca = authority(&config, cluster.as_ref()).await?;
    let callers = callers(&config)?;
    let certificate = ServerCertificate::new(Arc::clone(&ca), config.server_names.clone(), &["h2"])
        .context("--server-names")?;
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    if let Some(address) = config.webhook_listen {
        let webhook = Webhook::new(source.inquiry.clone(), settings);
        tasks.spawn(validate(&config, address, &ca, webhook, stop.clone()).await?);
    }
    if let Some(candidate) = lead(&config, cluster.as_ref(), (&ca, &source))? {
        tasks.spawn(candidate.run(stop.clone()));
    }
    let limits = Limits {
        lifetime: config.certificate_lifetime,
        max_lifetime: config.max_certificate_lifetime,
        requests_per_second: config.requests_per_second,
        burst: config.request_burst,
    };
    let accounts = Accounts::new(config.agent_accounts, config.gateway_accounts);
    let snapshots = source.snapshots.clone();
    let certificates =
        CertificateService::new(ca, &config.trust_domain, callers, accounts, snapshots.clone(), limits);
    let addresses = Addresses { allowed: config.jwks_allow, refused: api_server() };
    let fetcher = Fetcher::new(addresses, config.jwks_ca.as_ref()).context("--jwks-ca")?;
    let key_sets = KeySets::default();
    let fetching = key_sets.clone();
    tokio::spawn(async move { fetching.follow(fetcher, snapshots).await });
    let services = Services { certificates, key_sets };
    tokio::spawn(admin::serve_readiness(readiness, Readiness::default(), stop.clone()));
    let served = tokio::spawn(serve(listener, certificate, services, stop.clone()));
    tracing::info!(listen = %config.listen, "controller started");
    signals.until_told_to_stop(|| source.reread.reread()).await;
    stop.cancel();
    served.await.context("serving certificates")?;
    tasks.close();
    tasks.wait().await;
    tracing::info!("controller stopped");
    Ok(())
}

/// The authority, as this role's flags say; in a cluster it is where all replicas find it, and its roots where agents do.
async fn authority(config: &ControllerConfig, cluster: Option<&Cluster>) -> Result<Arc<EmbeddedCa>> {
    let state = || format!("--state-dir {}", config.state_dir.display());
    if let Some(name) = &config.ca_secret {
        let Some(cluster) = &cluster else {
            let text = "--ca-secret: a Secret is a cluster's, and the configuration is a directory's: use --ca-certs";
            return Err(NotStarted(text.to_owned()).into());
        };
        let secret = AuthoritySecret::new(cluster.client(), name, &config.state_dir, &config.trust_domain);
        secret.settle().await?;
        tokio::spawn(secret.follow());
    }
    let ca = match &config.ca_certs {
        Some(dir) => EmbeddedCa::plugged_in(dir, &config.trust_domain).context("--ca-certs")?,
        None => EmbeddedCa::open(&config.state_dir, &config.trust_domain).with_context(state)?,
    };
    let ca = Arc::new(ca);
    if config.ca_certs.is_none() {
        ca.follow(&config.state_dir, &config.trust_domain).with_context(state)?;
    }
    if let (Some(cluster), Some(_)) = (cluster, &config.ca_secret) {
        tokio::spawn(root_config_map::publish(cluster.client(), Arc::clone(&ca)));
    }
    Ok(ca)
}

/// What serves the webhook.
async fn validate(
    config: &ControllerConfig,
    address: SocketAddr,
    ca: &Arc<EmbeddedCa>,
    webhook: Webhook,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + use<>> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("--webhook-listen {address}"))?;
    let names = config.server_names.clone();
    let certificate = ServerCertificate::new(Arc::clone(ca), names, webhook::PROTOCOLS)?;
    Ok(webhook.serve(listener, certificate, stop))
}

/// What one replica alone does, whichever leads; if there is anything.
fn lead(
    config: &ControllerConfig,
    cluster: Option<&Cluster>,
    (ca, source): (&Arc<EmbeddedCa>, &Source),
) -> Result<Option<Candidate>> {
    let configuration = config.webhook_configuration.as_ref();
    if configuration.is_none() && !config.write_status {
        return Ok(None);
    }
    let Some(cluster) = cluster else {
        let text = "--webhook-configuration and --write-status are for a cluster, and the configuration is a directory's";
        return Err(NotStarted(text.to_owned()).into());
    };
    let candidate = Candidate::new(cluster.client(), identity(config.pod_name.as_deref()));
    if let Some(name) = configuration {
        let (client, name, ca) = (cluster.client(), name.clone(), Arc::clone(ca));
        tokio::spawn(candidate.leadership().lead(move || {
            let (client, name, ca) = (client.clone(), name.clone(), Arc::clone(&ca));
            async move { webhook::keep_believed(client, &name, &ca).await }
        }));
    }
    if config.write_status {
        let (client, problems) = (cluster.client(), source.problems.clone());
        let tell = move || status::keep_told(client.clone(), problems.clone());
        tokio::spawn(candidate.leadership().lead(tell));
    }
    Ok(Some(candidate))
}

/// A name that no other process has, nor will have.
fn identity(pod: Option<&str>) -> String {
    let host = || nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
    let name = pod.map_or_else(|| host().unwrap_or_else(|_| "controller".to_owned()), str::to_owned);
    format!("{name}_{:016x}", fastrand::u64(..))
}

/// Where the API server of the cluster is, if this runs in one: as every pod is told.
fn api_server() -> Vec<IpAddr> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok();
    host.and_then(|host| host.parse().ok()).into_iter().collect()
}

fn callers(config: &ControllerConfig) -> Result<Callers> {
    let (dir, audience) = (&config.state_dir, &config.token_audience);
    match config.tokens {
        TokensOf::Controller => Tokens::open(dir, &config.trust_domain, audience)
            .map(|tokens| Callers::Signed(Box::new(tokens)))
            .with_context(|| format!("--state-dir {}", dir.display())),
        TokensOf::Kubernetes => {
            let api = ApiServer::of_the_cluster().context("--tokens kubernetes")?;
            Ok(Callers::Reviewed(Reviews::new(api, audience)))
        }
    }
}

/// `mesh-agent token`: makes one token.
pub fn token(config: &TokenConfig, out: &mut impl Write) -> Result<()> {
    let key = TokenKey::open(&config.state_dir)
        .with_context(|| format!("--state-dir {}", config.state_dir.display()))?;
    let whom = TokenFor {
        trust_domain: &config.trust_domain,
        audience: &config.audience,
        account: &config.service_account,
        node: &config.node,
        duration: config.duration,
    };
    let token = key.issue(&whom, OffsetDateTime::now_utc())?;
    match &config.out {
        Some(path) => write_over(path, 0o600, format!("{token}\n").as_bytes())?,
        None => writeln!(out, "{token}").context("writing the token")?,
    }
    Ok(())
}
