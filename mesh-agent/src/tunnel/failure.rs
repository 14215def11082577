//! What a failure of TLS or HTTP/2 means on the path: one [`Kind`], and a sentence that names the peer.

use std::{error::Error as StdError, fmt, io, net::SocketAddr};

use http::StatusCode;
use rustls::{CertificateError, Error as TlsError, OtherError};

use crate::{
    error::{Error, Kind},
    http2::Failed,
    identity::PeerRefusal,
};

/// The TLS error inside an IO error, if one is.
fn tls_error(error: &io::Error) -> Option<&TlsError> {
    error.get_ref()?.downcast_ref()
}

fn refusal(error: &TlsError) -> Option<&PeerRefusal> {
    match error {
        TlsError::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.downcast_ref(),
        _ => None,
    }
}

/// What is wrong with a peer's certificate, in words.
fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is not of this mesh's root".to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet; check the clocks of both nodes".to_owned()
        }
        CertificateError::Revoked => "its certificate is revoked".to_owned(),
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            "the CRL of its issuer is out of date; a newer one has to be given with --crl".to_owned()
        }
        other => format!("its certificate is not acceptable: {other}"),
    }
}

/// A failed handshake at the accepting end.
pub(super) fn accepting(error: &io::Error, peer: SocketAddr) -> Error {
    let unauthenticated =
        |reason: &dyn fmt::Display| Error::new(Kind::Unauthenticated, format!("{peer} is refused: {reason}"));
    let tls = |reason: &dyn fmt::Display| {
        Error::new(Kind::TlsFailure, format!("the TLS handshake with {peer} failed: {reason}"))
    };
    match tls_error(error) {
        Some(TlsError::NoCertificatesPresented) => unauthenticated(&"it showed no client certificate"),
        Some(TlsError::InvalidCertificate(reason @ CertificateError::Revoked)) => {
            Error::new(Kind::Revoked, format!("{peer} is refused: {}", certificate(reason)))
        }
        Some(TlsError::InvalidCertificate(reason)) => match tls_error(error).and_then(refusal) {
            Some(refusal) => unauthenticated(refusal),
            None => unauthenticated(&certificate(reason)),
        },
        Some(TlsError::InvalidMessage(_)) => tls(&"what it sent is not TLS; this port takes mesh mTLS only"),
        Some(TlsError::NoApplicationProtocol) => tls(&"it offers neither ALPN mesh-h2 nor h2"),
        Some(TlsError::AlertReceived(alert)) => tls(&format!("it refused our certificate ({alert:?})")),
        Some(other) => tls(other),
        None => tls(error),
    }
}

/// A failed handshake at the dialling end.
pub(super) fn dialling(error: &io::Error, peer: SocketAddr) -> Error {
    let tls = |reason: &dyn fmt::Display| {
        Error::new(Kind::TlsFailure, format!("the TLS handshake with {peer} failed: {reason}"))
    };
    match tls_error(error) {
        Some(TlsError::InvalidCertificate(reason)) => match tls_error(error).and_then(refusal) {
            Some(refusal) => {
                Error::new(Kind::IdentityMismatch, format!("{peer} is not whom it should be: {refusal}"))
            }
            None => tls(&certificate(reason)),
        },
        Some(TlsError::InvalidMessage(_)) => tls(&"what it sent is not TLS; is it a mesh port?"),
        Some(TlsError::AlertReceived(alert)) => {
            tls(&format!("it refused us ({alert:?}); its agent's log says why"))
        }
        Some(other) => tls(other),
        None => tls(error),
    }
}

/// The refusal that the reading half of an established connection met, if it is one of TLS: in TLS 1.3 a server
/// judges the client's certificate only after the client's handshake is done.
pub(super) fn late_refusal(error: &io::Error, peer: SocketAddr) -> Option<Error> {
    tls_error(error).map(|_| dialling(error, peer))
}

/// A request that failed: refused untouched, or broken on its way.
pub(super) fn failed(failed: &Failed, peer: SocketAddr) -> Error {
    let Failed { error, untouched } = failed;
    if *untouched {
        return Error::new(
            Kind::RefusedStream,
            format!("{peer} refused the stream untouched: {}", chain(error)),
        );
    }
    stream(error, peer)
}

/// A stream or connection that broke.
pub(super) fn stream(error: &h2::Error, peer: SocketAddr) -> Error {
    let broke = Error::new(Kind::UpstreamReset, format!("the stream to {peer} broke: {}", chain(error)));
    Error { reset: error.reason().filter(|_| error.is_reset()), ..broke }
}

/// An error with its causes, in one line.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// A CONNECT that was answered with something else than 200.
pub(super) fn refused_tunnel(status: StatusCode, destination: SocketAddr, peer: SocketAddr) -> Error {
    let (kind, reason) = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            (Kind::Denied, "policy of the destination denies it")
        }
        StatusCode::SERVICE_UNAVAILABLE => (Kind::ConnectFailure, "the app cannot be reached there"),
        StatusCode::BAD_REQUEST => (Kind::BadRequest, "the destination is not one of that pod"),
        _ => (Kind::ConnectFailure, "an answer HBONE does not have"),
    };
    Error::new(kind, format!("{peer} answered {status} to CONNECT {destination}: {reason}"))
}
