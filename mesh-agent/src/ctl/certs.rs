//! `meshctl certs`: the roots the agent believes, what signs, and the certificates it uses for its pods.

use std::io::Write;

use super::{
    Failure, Output,
    client::Client,
    output::{self, Rows, duration},
};
use crate::admin::CertificateView;

pub(super) async fn run(client: &Client, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let certificates: Vec<CertificateView> = client.get("/certs").await?;
    output::print(output, out, &certificates, |certificates| {
        let mut rows = Rows::new(["ROLE", "IDENTITY", "SERIAL", "NOT BEFORE", "NOT AFTER", "EXPIRES IN"]);
        for certificate in certificates {
            let left = u64::try_from(certificate.expires_in_seconds);
            rows.push(&[
                certificate.role.clone(),
                certificate.identity.clone(),
                certificate.serial.clone(),
                certificate.not_before.clone(),
                certificate.not_after.clone(),
                left.map_or_else(|_| "expired".to_owned(), |seconds| duration(seconds.saturating_mul(1000))),
            ]);
        }
        rows
    })
}
