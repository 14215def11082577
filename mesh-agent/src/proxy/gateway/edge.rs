//! What a gateway says of a client, in the place of what the client says of itself.
//!
//! As Istio's ingress does by default (Envoy's `use_remote_address`, no trusted proxy in front): `x-forwarded-for` gets the client's
//! address at its end, `x-forwarded-proto` and `x-envoy-external-address` are the gateway's word, every request has an id of its own,
//! and of what only the mesh may say (`x-envoy-…`, `x-forwarded-client-cert`) nothing is taken from a client. What it proved itself
//! with is told (`SANITIZE_SET`). Pure. Tested below, and in the lab (`tests/tests/gateway/headers.rs`).

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const EXTERNAL_ADDRESS: HeaderName = HeaderName::from_static("x-envoy-external-address");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// What all names begin with that only the mesh may say.
const FAMILY: &str = "x-envoy-";

/// Who has asked.
pub(super) struct Client<'a> {
    /// Where it is.
    pub ip: IpAddr,
    /// It has come by TLS.
    pub secure: bool,
    /// What apps are told of the certificate that it has shown.
    pub certificate: Option<&'a HeaderValue>,
}

/// Puts the gateway's word in the place of the client's.
pub(super) fn mark(headers: &mut HeaderMap, client: &Client<'_>) {
    let said: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(FAMILY)).cloned().collect();
    for name in said {
        headers.remove(name);
    }
    headers.remove(REQUEST_ID);
    match client.certificate {
        Some(certificate) => drop(headers.insert(CLIENT_CERT, certificate.clone())),
        None => drop(headers.remove(CLIENT_CERT)),
    }
    let proto = if client.secure { "https" } else { "http" };
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(proto));
    let address = client.ip.to_string();
    // An address is what a header value may have, and so is a list of such values.
    if let Ok(value) = HeaderValue::from_str(&address) {
        headers.insert(EXTERNAL_ADDRESS, value);
    }
    let mut through: Vec<&[u8]> = headers.get_all(FORWARDED_FOR).iter().map(HeaderValue::as_bytes).collect();
    through.push(address.as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&through.join(&b", "[..])) {
        headers.insert(FORWARDED_FOR, value);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn marked(said: &[(&'static str, &'static str)], client: &Client<'_>) -> Vec<(String, String)> {
        let mut headers = HeaderMap::new();
        for (name, value) in said {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        mark(&mut headers, client);
        let text = |(name, value): (&HeaderName, &HeaderValue)| {
            (name.to_string(), value.to_str().unwrap().to_owned())
        };
        let mut all: Vec<_> = headers.iter().map(text).collect();
        all.sort();
        all
    }

    fn expected(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_client_says_nothing_that_only_the_gateway_may() {
        let ip = "192.0.2.7".parse().unwrap();
        let plain = Client { ip, secure: false, certificate: None };
        let said = [
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.2, 10.0.0.3"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-client-cert", "By=me"),
            ("x-envoy-external-address", "10.0.0.1"),
            ("x-envoy-upstream-rq-timeout-ms", "1"),
            ("x-envoy-anything", "1"),
            ("x-request-id", "mine"),
            ("x-own", "1"),
        ];
        let left = expected(&[
            ("x-envoy-external-address", "192.0.2.7"),
            ("x-forwarded-for", "10.0.0.1, 10.0.0.2, 10.0.0.3, 192.0.2.7"),
            ("x-forwarded-proto", "http"),
            ("x-own", "1"),
        ]);
        assert_eq!(marked(&said, &plain), left);
    }

    #[test]
    fn what_it_proved_itself_with_is_told() {
        let (ip, shown) = ("fd00::7".parse().unwrap(), HeaderValue::from_static("Hash=1"));
        let secure = Client { ip, secure: true, certificate: Some(&shown) };
        let left = expected(&[
            ("x-envoy-external-address", "fd00::7"),
            ("x-forwarded-client-cert", "Hash=1"),
            ("x-forwarded-for", "fd00::7"),
            ("x-forwarded-proto", "https"),
        ]);
        assert_eq!(marked(&[("x-forwarded-client-cert", "By=me")], &secure), left);
    }
}
