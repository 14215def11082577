//! The certificates of a node or a gateway as it starts with them, follows them, and shows them; and the steps of `mesh-agent ca`.

use std::{io::Write, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::watch;

use super::CERTIFICATES_EVERY;
use crate::{
    admin::{self, CertificateView},
    config::{CaConfig, CaFlags, CaSource, CaStep, CertificateFlags},
    identity::{self, Authority, AuthorityInfo, CertificateInfo, LeafPolicy, RemoteCaConfig},
    report::{AuthorityExpiry, Reporter},
    state::{Problem, snapshot::Snapshot},
};

/// The authority of a node or a gateway, following its files.
pub(super) fn open_authority(
    (state_dir, trust_domain): (&Path, &str),
    ca: &CaFlags,
    flags: &CertificateFlags,
) -> Result<Arc<Authority>> {
    let policy = LeafPolicy { lifetime: flags.certificate_lifetime, ..LeafPolicy::default() };
    let at = || format!("--state-dir {}", state_dir.display());
    let source = ca.source();
    let embedded = source == CaSource::Embedded;
    let authority = match source {
        CaSource::Embedded => Authority::open(state_dir, trust_domain).with_context(at)?,
        CaSource::Remote { address, server_name, roots, token } => {
            let remote = RemoteCaConfig { address, server_name, roots, token };
            Authority::remote(remote, trust_domain).context("--ca-address")?
        }
        CaSource::Spiffe(socket) => Authority::spiffe(socket, trust_domain).context("--ca")?,
    };
    let authority = Arc::new(authority.with_leaf_policy(policy));
    if embedded {
        authority.follow_state_dir(state_dir).with_context(at)?;
    }
    if let Some(crl) = &flags.crl {
        authority.follow_crl(crl).with_context(|| format!("--crl {}", crl.display()))?;
    }
    Ok(authority)
}

/// `mesh-agent ca`: says what it has done, or what is to be done.
///
/// # Errors
/// When a step is not taken.
pub fn ca(config: &CaConfig, out: &mut dyn Write) -> Result<()> {
    let CaConfig { step, state_dir, trust_domain } = config;
    let said = match step {
        CaStep::Status => identity::rotation(state_dir, trust_domain),
        CaStep::Prepare => identity::prepare(state_dir, trust_domain),
        CaStep::Switch { now } => identity::switch(state_dir, trust_domain, *now),
        CaStep::Drop { now } => identity::drop_roots(state_dir, trust_domain, *now),
    };
    let said = said.with_context(|| format!("--state-dir {}", state_dir.display()))?;
    Ok(writeln!(out, "{said}")?)
}

/// What `/certs` shows.
pub(super) fn certificates_of(authority: Arc<Authority>) -> admin::Read<Vec<CertificateView>> {
    Arc::new(move || {
        let authorities = authority.authorities().into_iter().map(authority_view);
        authorities.chain(authority.certificates().into_iter().map(certificate_view)).collect()
    })
}

fn authority_view(authority: AuthorityInfo) -> CertificateView {
    let AuthorityInfo { role, name, serial, not_before, not_after } = authority;
    CertificateView { role: role.to_owned(), ..view(name, serial, not_before, not_after) }
}

fn certificate_view(certificate: CertificateInfo) -> CertificateView {
    let CertificateInfo { identity, serial, not_before, not_after } = certificate;
    view(identity.to_string(), serial, not_before, not_after)
}

fn view(
    identity: String,
    serial: String,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
) -> CertificateView {
    let written = |at: OffsetDateTime| at.format(&Rfc3339).unwrap_or_else(|_| at.to_string());
    CertificateView {
        role: CertificateView::WORKLOAD.to_owned(),
        identity,
        serial,
        not_before: written(not_before),
        not_after: written(not_after),
        expires_in_seconds: (not_after - OffsetDateTime::now_utc()).whole_seconds(),
    }
}

/// Gauges that follow the configuration and the certificates.
pub(super) async fn keep_gauges(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    problems: watch::Receiver<Arc<[Problem]>>,
    authority: Arc<Authority>,
    reporter: Arc<Reporter>,
) {
    let mut looks = authority.looks();
    let mut every = tokio::time::interval(CERTIFICATES_EVERY);
    let set_config = |snapshots: &mut watch::Receiver<Arc<Snapshot>>| {
        let revision = snapshots.borrow_and_update().revision;
        reporter.set_config(revision, problems.borrow().len());
    };
    set_config(&mut snapshots);
    loop {
        tokio::select! {
            // Says nothing of certificates, which take longer to look through than a change of endpoints may.
            changed = snapshots.changed() => match changed {
                Ok(()) => {
                    set_config(&mut snapshots);
                    continue;
                }
                Err(_) => return,
            },
            // The sender is in `authority`.
            _ = looks.changed() => {}
            _ = every.tick() => {}
        }
        set_certificates(&authority, &reporter);
    }
}

fn set_certificates(authority: &Authority, reporter: &Reporter) {
    let certificates = authority.certificates().into_iter();
    let expiry: Vec<_> =
        certificates.map(|certificate| (certificate.identity, certificate.not_after.into())).collect();
    reporter.set_certificates(&expiry);
    let authorities = authority.authorities().into_iter().map(|authority| AuthorityExpiry {
        role: authority.role,
        name: authority.name,
        at: authority.not_after.into(),
    });
    reporter.set_trust(authorities.collect(), authority.revoked(), authority.problems().len());
}
