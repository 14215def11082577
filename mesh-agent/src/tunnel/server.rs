//! The accepting end: who dialled, and where a tunnel may lead.
//!
//! Nothing is served before the peer has proved an identity of our trust domain, and nothing is passed on to an
//! address that is not the pod's own. Tested in `tunnel/tests`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use http::{Method, uri::Authority};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    Wire, failure, native,
    settings::{HANDSHAKE_TIMEOUT, LAST_WORDS, MESH_TLS_PORT, ROOT_GONE_GRACE},
};
use crate::{
    copy::Socket,
    error::{Error, Kind, Result},
    identity::{Shown, SpiffeId, Usage, Withdrawn, WorkloadIdentity, single_identity},
};

/// A peer that has proved who it is.
#[derive(Debug)]
pub struct Accepted {
    /// Where it is to be served.
    pub tls: TlsStream<Socket>,
    /// Whom it proved to be.
    pub peer: SpiffeId,
    /// What was agreed on.
    pub wire: Wire,
    /// What it proved that with.
    pub(crate) shown: Shown,
}

/// The server's half of the handshake on a connection to a pod's 15008.
///
/// # Errors
/// [`Kind::Revoked`] when the peer's certificate is, [`Kind::Unauthenticated`] when the peer proved no identity of our trust domain, [`Kind::TlsFailure`] for
/// everything else that is wrong (plaintext, another TLS version, no ALPN of ours, 10 s without a result).
pub async fn accept(stream: TcpStream, identity: &WorkloadIdentity) -> Result<Accepted> {
    let peer =
        stream.peer_addr().map_err(|error| Error::new(Kind::TlsFailure, format!("a peer left: {error}")))?;
    // Only latency suffers when it fails.
    let _ = stream.set_nodelay(true);
    let beginning = identity.begin();
    let acceptor = TlsAcceptor::from(identity.server_config()?);
    let tls = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(Socket::new(stream)))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake within 10 s")))
        .map_err(|error| failure::accepting(&error, peer))?;
    let session = tls.get_ref().1;
    let wire = Wire::from_alpn(session.alpn_protocol()).ok_or_else(|| {
        Error::new(Kind::TlsFailure, format!("{peer} is refused: it offers neither ALPN mesh-h2 nor h2"))
    })?;
    let chain = session.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or_else(|| {
        Error::new(Kind::Unauthenticated, format!("{peer} is refused: it showed no client certificate"))
    })?;
    let proven = single_identity(leaf)
        .map_err(|refusal| Error::new(Kind::Unauthenticated, format!("{peer} is refused: {refusal}")))?;
    let shown = beginning.shown(chain, Usage::Client);
    Ok(Accepted { tls, peer: proven, wire, shown })
}

/// Completes when nothing may stand any more on what a peer has shown: `leave` is called when its connection is to end,
/// and `cut` when whatever is left of it is to be refused; that then has a moment to be told.
pub(crate) async fn withdrawn(shown: &Shown, peer: SocketAddr, leave: impl Fn(), cut: impl Fn()) -> Error {
    let why = shown.withdrawn().await;
    leave();
    if why == Withdrawn::RootGone {
        tokio::time::sleep(ROOT_GONE_GRACE).await;
    }
    shown.cut();
    cut();
    tokio::time::sleep(LAST_WORDS).await;
    not_believed(peer)
}

/// The end of what stood on a certificate that is withdrawn.
pub(crate) fn not_believed(peer: SocketAddr) -> Error {
    let why = "its certificate is revoked, or its root is not believed any more";
    Error::new(Kind::Revoked, format!("{peer} is cut: {why}"))
}

/// Where a tunnel leads: an address of the pod, and no port of ours.
pub(super) fn tunnel_destination(
    method: &Method,
    authority: Option<&Authority>,
    pod_ips: &[IpAddr],
) -> Result<SocketAddr> {
    let bad = |detail: String| Error::new(Kind::BadRequest, detail);
    if method != Method::CONNECT {
        return Err(bad(format!(
            "{method} on port {MESH_TLS_PORT}: a stream is a CONNECT or has a mesh-port header"
        )));
    }
    let authority = authority.map(Authority::as_str).unwrap_or_default();
    let address: SocketAddr =
        authority.parse().map_err(|_| bad(format!("CONNECT to {authority:?}: not an address and port")))?;
    let destination = SocketAddr::new(address.ip().to_canonical(), address.port());
    if destination.port() == 0 {
        return Err(bad(format!("CONNECT to {authority:?}: 0 is no port")));
    }
    if !pod_ips.contains(&destination.ip()) {
        return Err(bad(format!("CONNECT to {authority:?}: not an address of this pod ({pod_ips:?})")));
    }
    native::check_port(destination.port())?;
    Ok(destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_leads_to_the_pod_and_to_no_port_of_ours()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let pod: [IpAddr; 2] = ["10.0.0.7".parse()?, "fd00::7".parse()?];
        let to = |authority: &str| {
            let authority: Option<Authority> = authority.parse().ok();
            tunnel_destination(&Method::CONNECT, authority.as_ref(), &pod).map_err(|error| error.kind)
        };
        assert_eq!(to("10.0.0.7:80"), Ok("10.0.0.7:80".parse()?));
        assert_eq!(to("[fd00::7]:80"), Ok("[fd00::7]:80".parse()?));
        assert_eq!(to("[::ffff:10.0.0.7]:80"), Ok("10.0.0.7:80".parse()?));
        for bad in
            ["10.0.0.8:80", "127.0.0.1:80", "10.0.0.7", "10.0.0.7:0", "me@10.0.0.7:80", "reviews:80", ""]
        {
            assert_eq!(to(bad), Err(Kind::BadRequest), "{bad}");
        }
        for port in [15001, 15006, 15008] {
            assert_eq!(to(&format!("10.0.0.7:{port}")), Err(Kind::IllegalDestination));
        }
        let get = tunnel_destination(&Method::GET, None, &pod).map_err(|error| error.kind);
        assert_eq!(get, Err(Kind::BadRequest));
        Ok(())
    }
}
