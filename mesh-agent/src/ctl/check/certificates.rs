//! How near the end of a certificate is.
//!
//! Pure functions of times in seconds. Tested below.

use k8s_openapi::jiff::Timestamp;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Check;
use crate::admin::CertificateView;

const DAY: i64 = 24 * 60 * 60;
/// A root or an intermediate is to be replaced in good time: people may have to.
const AUTHORITY_WARNS: i64 = 30 * DAY;
/// Certificates of pods are renewed when seven tenths of their time have passed; this is long after.
const WORKLOAD_WARNS: f64 = 0.15;

/// What the agent says of those it uses: one line for authorities, one for pods.
pub(super) fn of_agent(certificates: &[CertificateView]) -> Vec<Check> {
    let (pods, authorities): (Vec<_>, Vec<_>) =
        certificates.iter().partition(|one| one.role == CertificateView::WORKLOAD);
    let named = |one: &&CertificateView| format!("{} {}", one.role, one.identity);
    let ends: Vec<_> = authorities.iter().map(|one| (named(one), one.expires_in_seconds)).collect();
    vec![of_authorities("certificates: authorities", &ends), of_pods(&pods)]
}

/// Authorities by their names, with the seconds that each has left.
fn of_authorities(about: &str, ends: &[(String, i64)]) -> Check {
    let Some((name, left)) = ends.iter().min_by_key(|(_, left)| *left) else {
        return Check::failure(
            about,
            "there is none to believe",
            "see the log of the agent or the controller",
        );
    };
    let days = left / DAY;
    if *left <= 0 {
        return Check::failure(
            about,
            format!("{name} has expired: no connection of the mesh is believed"),
            "replace it: `mesh-agent ca` for the embedded authority, else the Secret with your own",
        );
    }
    if *left < AUTHORITY_WARNS {
        return Check::warning(
            about,
            format!("{name} expires in {days} days"),
            "replace it before: `mesh-agent ca` for the embedded authority, else the Secret with your own",
        );
    }
    Check::ok(about, format!("{}, the first of which expires in {days} days", ends.len()))
}

fn of_pods(certificates: &[&CertificateView]) -> Check {
    let about = "certificates: pods";
    let late: Vec<_> = certificates.iter().filter(|one| is_late(one)).collect();
    let Some(first) = late.iter().min_by_key(|one| one.expires_in_seconds) else {
        return Check::ok(about, format!("{} in use, renewed in time", certificates.len()));
    };
    let remedy =
        "see why renewals fail in the agent's log; the controller's says what it refuses (target `audit`)";
    let found = format!(
        "{} of {} were not renewed in time, first {}",
        late.len(),
        certificates.len(),
        first.identity
    );
    if first.expires_in_seconds <= 0 {
        return Check::failure(
            about,
            format!("{found}, which has expired: its connections are refused"),
            remedy,
        );
    }
    Check::warning(about, found, remedy)
}

fn is_late(one: &CertificateView) -> bool {
    let at = |text: &str| text.parse::<Timestamp>().ok().map(Timestamp::as_second);
    let lifetime = at(&one.not_before).zip(at(&one.not_after)).map(|(from, to)| to - from);
    one.expires_in_seconds <= 0
        || lifetime.is_some_and(|lifetime| (one.expires_in_seconds as f64) < lifetime as f64 * WORKLOAD_WARNS)
}

/// The roots of a file in PEM.
pub(super) fn of_roots(about: &str, pem: &str, now: i64) -> Check {
    let mut ends = Vec::new();
    for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let broken = |why: String| {
            Check::failure(
                about,
                format!("it holds what is no certificate ({why})"),
                "let the controller write it anew: delete it",
            )
        };
        let der = match der {
            Ok(der) => der,
            Err(error) => return broken(format!("{error:?}")),
        };
        match X509Certificate::from_der(&der) {
            Ok((_, root)) => {
                ends.push((format!("root {}", root.subject()), root.validity().not_after.timestamp() - now));
            }
            Err(error) => return broken(error.to_string()),
        }
    }
    of_authorities(about, &ends)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::{super::Verdict, *};

    fn view(role: &str, expires_in_seconds: i64) -> CertificateView {
        CertificateView {
            role: role.to_owned(),
            identity: "spiffe://t/ns/a/sa/b".to_owned(),
            serial: "1".to_owned(),
            not_before: "2026-01-01T00:00:00Z".to_owned(),
            not_after: "2026-01-02T00:00:00Z".to_owned(),
            expires_in_seconds,
        }
    }

    #[test]
    fn what_nears_its_end_warns_and_what_has_ended_fails() {
        let verdicts = |root: i64, pod: i64| {
            let checks = of_agent(&[view("root", root), view("workload", pod), view("workload", DAY)]);
            (checks[0].verdict, checks[1].verdict)
        };
        assert_eq!(verdicts(31 * DAY, DAY / 2), (Verdict::Ok, Verdict::Ok));
        assert_eq!(verdicts(29 * DAY, DAY / 10), (Verdict::Warning, Verdict::Warning));
        assert_eq!(verdicts(0, -1), (Verdict::Failure, Verdict::Failure));
        assert_eq!(of_agent(&[])[0].verdict, Verdict::Failure);
    }

    #[test]
    fn roots_are_read_from_pem() -> Result<()> {
        let key = rcgen::KeyPair::generate()?;
        let mut params = rcgen::CertificateParams::new(vec![])?;
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let end = params.not_after.unix_timestamp();
        let pem = params.self_signed(&key)?.pem();
        for (now, verdict) in
            [(end - 31 * DAY, Verdict::Ok), (end - DAY, Verdict::Warning), (end + 1, Verdict::Failure)]
        {
            assert_eq!(of_roots("roots", &pem, now).verdict, verdict);
        }
        for broken in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert_eq!(of_roots("roots", broken, 0).verdict, Verdict::Failure, "{broken}");
        }
        Ok(())
    }
}
