//! What is injected into a request: the route's `fault`, and what the request itself asks for by header.
//!
//! Promises that headers count only where the route says so, that they only ever lower a share, and that no delay is
//! longer than [`defaults::HEADER_DELAY`]. A header that says nothing sensible is passed over, as in Envoy. Tested by
//! the table below.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::state::{
    defaults,
    snapshot::{Abort, Fault, Percentage},
};

/// Delay in milliseconds.
const DELAY: &str = "x-envoy-fault-delay-request";

/// Share of requests that the delay is for, in whole percent.
const DELAY_SHARE: &str = "x-envoy-fault-delay-request-percentage";

/// HTTP status to answer with.
const ABORT: &str = "x-envoy-fault-abort-request";

/// gRPC status to answer with; only looked at without an HTTP status.
const ABORT_GRPC: &str = "x-envoy-fault-abort-grpc-request";

/// Share of requests that the abort is for, in whole percent.
const ABORT_SHARE: &str = "x-envoy-fault-abort-request-percentage";

/// The last gRPC status there is.
const LAST_GRPC: u32 = 16;

/// What may be injected into one request, with the chance of each; first the delay, then the abort.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Injection {
    /// How long the request is held up.
    pub delay: Option<(Percentage, Duration)>,
    /// What it is answered with.
    pub abort: Option<(Percentage, Abort)>,
}

/// What to inject into a request with these headers.
pub fn injection(fault: &Fault, headers: &HeaderMap) -> Injection {
    if !fault.by_header {
        return Injection { delay: fault.delay, abort: fault.abort };
    }
    let asked_delay = number(headers, DELAY).filter(|millis| *millis > 0);
    let asked_delay = asked_delay.map(|millis| Duration::from_millis(millis).min(defaults::HEADER_DELAY));
    let asked_abort = abort(headers);
    Injection {
        delay: combine(fault.delay, asked_delay, number(headers, DELAY_SHARE)),
        abort: combine(fault.abort, asked_abort, number(headers, ABORT_SHARE)),
    }
}

/// What the request asks for in the place of what the route says, as often as the route says at most.
fn combine<T: Copy>(
    configured: Option<(Percentage, T)>,
    asked: Option<T>,
    percent: Option<u64>,
) -> Option<(Percentage, T)> {
    let Some(what) = asked else { return configured };
    let most = configured.map_or(Percentage::WHOLE, |(share, _)| share);
    let share =
        percent.map(|percent| Percentage(u32::try_from(percent.min(100)).unwrap_or(0) * Percentage::PERCENT));
    Some((share.unwrap_or(most).min(most), what))
}

fn abort(headers: &HeaderMap) -> Option<Abort> {
    let status = number(headers, ABORT).filter(|status| (200..600).contains(status));
    let status = status.and_then(|status| StatusCode::from_u16(u16::try_from(status).ok()?).ok());
    let grpc = || number(headers, ABORT_GRPC).and_then(|status| u32::try_from(status).ok());
    match status {
        Some(status) => Some(Abort::Http(status)),
        None => grpc().filter(|status| *status <= LAST_GRPC).map(Abort::Grpc),
    }
}

/// A header's value when it is a number and nothing else.
fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    let text = headers.get(name)?.to_str().ok()?;
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // More digits than fit ask for more than there is.
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    /// Share in whole percent, and milliseconds.
    type Delay = Option<(u32, u64)>;

    type Pairs<'a> = &'a [(&'static str, &'static str)];

    fn headers(pairs: Pairs<'_>) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    fn delay(fault: &Fault, pairs: Pairs<'_>) -> Delay {
        let injection = injection(fault, &headers(pairs));
        injection.delay.map(|(share, time)| (share.0 / Percentage::PERCENT, time.as_millis() as u64))
    }

    #[test]
    fn headers_ask_for_delays_where_the_route_lets_them() {
        let open = Fault { by_header: true, ..Fault::default() };
        let half = Fault {
            by_header: true,
            delay: Some((Percentage(500_000), Duration::from_secs(2))),
            abort: None,
        };
        let closed = Fault { by_header: false, ..half.clone() };
        let table: [(&Fault, Pairs<'_>, Delay); 13] = [
            (&open, &[], None),
            (&open, &[(DELAY, "100")], Some((100, 100))),
            (&open, &[(DELAY, "100"), (DELAY_SHARE, "25")], Some((25, 100))),
            (&open, &[(DELAY, "100"), (DELAY_SHARE, "250")], Some((100, 100))),
            (&open, &[(DELAY, "100"), (DELAY_SHARE, "x")], Some((100, 100))),
            (&open, &[(DELAY, "99999999999999999999999")], Some((100, 3_600_000))),
            (&open, &[(DELAY, "0")], None),
            (&open, &[(DELAY, "-1")], None),
            (&open, &[(DELAY, "")], None),
            (&half, &[], Some((50, 2_000))),
            (&half, &[(DELAY, "100"), (DELAY_SHARE, "80")], Some((50, 100))),
            (&half, &[(DELAY, "100"), (DELAY_SHARE, "10")], Some((10, 100))),
            (&closed, &[(DELAY, "100"), (DELAY_SHARE, "10")], Some((50, 2_000))),
        ];
        for (fault, pairs, expected) in table {
            assert_eq!(delay(fault, pairs), expected, "{fault:?} {pairs:?}");
        }
    }

    #[test]
    fn headers_ask_for_aborts_where_the_route_lets_them() {
        let open = Fault { by_header: true, ..Fault::default() };
        let http = |status| StatusCode::from_u16(status).ok().map(Abort::Http);
        let table: [(Pairs<'_>, Option<Abort>); 8] = [
            (&[(ABORT, "503")], http(503)),
            (&[(ABORT, "503"), (ABORT_GRPC, "14")], http(503)),
            (&[(ABORT, "199"), (ABORT_GRPC, "14")], Some(Abort::Grpc(14))),
            (&[(ABORT, "600")], None),
            (&[(ABORT, "abc")], None),
            (&[(ABORT_GRPC, "0")], Some(Abort::Grpc(0))),
            (&[(ABORT_GRPC, "17")], None),
            (&[(ABORT_SHARE, "100")], None),
        ];
        for (pairs, expected) in table {
            let abort = injection(&open, &headers(pairs)).abort;
            assert_eq!(abort, expected.map(|abort| (Percentage::WHOLE, abort)), "{pairs:?}");
            let closed = injection(&Fault::default(), &headers(pairs)).abort;
            assert_eq!(closed, None, "{pairs:?}");
        }
        let lowered = injection(&open, &headers(&[(ABORT, "500"), (ABORT_SHARE, "1")]));
        assert_eq!(lowered.abort.map(|(share, _)| share), Some(Percentage(Percentage::PERCENT)));
    }
}
