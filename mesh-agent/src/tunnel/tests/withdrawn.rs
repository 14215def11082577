//! Certificates that are revoked, and roots that go: nobody new, and what is open is cut.

use std::{fs, path::PathBuf};

use rcgen::{Issuer, KeyPair};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::identity::{
    LeafPolicy, drop_roots,
    pki::{list, serial},
    prepare, switch,
};

type Fallible<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const DOMAIN: &str = "cluster.local";

/// One end of a mesh: an authority of its own over the shared files, so that it can be told what the other is not.
struct End {
    authority: Arc<Authority>,
    crl: PathBuf,
}

struct World {
    dir: tempfile::TempDir,
    client: End,
    server: End,
}

impl World {
    fn new() -> Fallible<Self> {
        let dir = tempfile::tempdir()?;
        let state = dir.path().join("state");
        let end = |name: &str| -> Fallible<End> {
            let crl = dir.path().join(name).join("crl.pem");
            fs::create_dir(dir.path().join(name))?;
            fs::write(&crl, "")?;
            // So that all are replaced within seconds when another root signs.
            let policy = LeafPolicy { lifetime: Duration::from_mins(1), ..LeafPolicy::default() };
            let authority = Arc::new(Authority::open(&state, DOMAIN)?.with_leaf_policy(policy));
            authority.follow_state_dir(&state)?;
            authority.follow_crl(&crl)?;
            Ok(End { authority, crl })
        };
        let (client, server) = (end("client")?, end("server")?);
        Ok(Self { dir, client, server })
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    async fn pair(&self) -> Fallible<Pair> {
        let client = self.client.authority.identity(&spiffe("client")).await?;
        let server = self.server.authority.identity(&spiffe("server")).await?;
        Ok(Pair { client, server })
    }

    /// Tells one end alone that the certificate now used by `whose` is revoked, and waits until it knows.
    async fn revoke(&self, told: &End, whose: &WorkloadIdentity) -> Fallible<()> {
        let state = self.state();
        let key = KeyPair::from_pem(&fs::read_to_string(state.join("ca-key.pem"))?)?;
        let issuer = Issuer::from_ca_cert_pem(&fs::read_to_string(state.join("ca-cert.pem"))?, key)?;
        let tomorrow = OffsetDateTime::now_utc() + time::Duration::DAY;
        let mut looks = told.authority.looks();
        fs::write(&told.crl, list(&issuer, &[&serial(&whose.certificate().serial)?], tomorrow)?.pem()?)?;
        looks.wait_for(|()| told.authority.revoked() == 1).await?;
        Ok(())
    }
}

/// An echo through a tunnel, that stays open.
async fn open(node: &Node, pair: &Pair) -> Fallible<(MeshConnection, crate::http2::ByteStream)> {
    let connection = node.connect_tunnels(pair).await?;
    let mut stream = connection.open_tunnel(ECHO, CLIENT).await?;
    stream.write_all(b"ping").await?;
    let mut back = [0; 4];
    stream.read_exact(&mut back).await?;
    Ok((connection, stream))
}

/// Reads until the stream ends, which it has to.
async fn ends(stream: &mut crate::http2::ByteStream) {
    let mut rest = Vec::new();
    // Any end is as good as another.
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn a_client_that_is_revoked_is_cut_and_refused() -> TestResult {
    let world = World::new()?;
    let pair = world.pair().await?;
    let mut node = Node::start(&pair.server, 2, echo).await?;
    let (_connection, mut stream) = open(&node, &pair).await?;
    world.revoke(&world.server, &pair.client).await?;
    ends(&mut stream).await;
    let cut = node.served.join_next().await.ok_or("nothing was served")??;
    assert!(matches!(&cut, Err(error) if error.kind == Kind::Revoked), "{cut:?}");

    let connection = node.connect_tunnels(&pair).await?;
    let refused = connection.open_tunnel(ECHO, CLIENT).await.map(|_| ());
    assert!(matches!(&refused, Err(error) if error.kind == Kind::TlsFailure), "{refused:?}");
    let refused = node.served.join_next().await.ok_or("nothing was served")??;
    assert!(
        matches!(&refused, Err(error) if error.kind == Kind::Revoked && error.detail.contains("is revoked")),
        "{refused:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_revoked_is_cut_and_left() -> TestResult {
    let world = World::new()?;
    let pair = world.pair().await?;
    let node = Node::start(&pair.server, 2, echo).await?;
    let (connection, mut stream) = open(&node, &pair).await?;
    world.revoke(&world.client, &pair.server).await?;
    ends(&mut stream).await;
    assert!(!connection.is_open());
    let refused = node.connect_tunnels(&pair).await.map(|_| ());
    assert!(
        matches!(&refused, Err(error) if error.kind == Kind::TlsFailure && error.detail.contains("revoked")),
        "{refused:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_pool_leaves_what_stands_on_a_root_that_goes_and_the_rest_stays() -> TestResult {
    let world = World::new()?;
    let pair = world.pair().await?;
    let node = Node::start(&pair.server, 2, echo).await?;
    let pool = Pool::default();
    let key = PoolKey::new(
        pair.client.id.clone(),
        POD,
        node.address,
        std::slice::from_ref(&pair.server.id),
        Wire::Hbone,
    );
    let first = pool.get(&key, &pair.client, node.dial()).await?;
    let mut stream = first.open_tunnel(ECHO, CLIENT).await?;
    prepare(&world.state(), DOMAIN)?;
    let mut renewals = [pair.client.renewals(), pair.server.renewals()];
    let mut looks = world.client.authority.looks();
    looks.wait_for(|()| world.client.authority.authorities().len() == 2).await?;
    let mut others = world.server.authority.looks();
    others.wait_for(|()| world.server.authority.authorities().len() == 2).await?;
    switch(&world.state(), DOMAIN, true)?;
    for renewed in &mut renewals {
        renewed.changed().await?;
    }
    assert!(first.is_open(), "another root signs, and the one before is believed");
    drop_roots(&world.state(), DOMAIN, true)?;
    first.done().await;
    // What is under way goes on for a while.
    stream.write_all(b"ping").await?;
    let mut back = [0; 4];
    stream.read_exact(&mut back).await?;
    let second = pool.get(&key, &pair.client, node.dial()).await?;
    assert!(!second.is_same(&first) && second.is_open() && !first.is_open());
    Ok(())
}
