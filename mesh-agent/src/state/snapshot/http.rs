//! HTTP routes: what a request must be to be taken, and what becomes of it.
//!
//! Whatever could be invalid was refused when the configuration was read. Tested through `compile/` and `route/`.

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, HeaderValue, StatusCode, uri::Authority};
use regex::Regex;

use super::{Cluster, RetryPolicy};

/// One `http[]` entry of a `VirtualService`, or the default route of a service.
#[derive(Debug, Clone)]
pub struct HttpRoute {
    /// `name`, for logs and metrics.
    pub name: Arc<str>,
    /// The object that wrote it, for example `VirtualService default/reviews`; the Service for a default route.
    pub origin: Arc<str>,
    /// Alternatives (OR); empty matches everything.
    pub matches: Vec<RequestMatch>,
    /// What happens to a request that matches.
    pub action: RouteAction,
    /// `fault`.
    pub fault: Fault,
    /// `headers` of the route.
    pub headers: HeaderOps,
    /// `rewrite`.
    pub rewrite: Rewrite,
    /// `timeout`: the whole request with all tries; `None` is unlimited (Istio's default).
    pub timeout: Option<Duration>,
    /// `retries`.
    pub retries: RetryPolicy,
    /// `mirror` or `mirrors`: who gets a copy of the request.
    pub mirrors: Vec<Mirror>,
    /// `corsPolicy`.
    pub cors: Option<Box<CorsPolicy>>,
    /// `name`, where one is written: what the route is called in metrics unless its match has a `statPrefix`.
    pub stat_name: Option<Arc<str>>,
}

impl HttpRoute {
    /// What logs call the route that took a request: with the name of the match, where that has one.
    pub fn name_of<'a>(&'a self, matched: Option<&'a RequestMatch>) -> &'a Arc<str> {
        matched.and_then(|matched| matched.name.as_ref()).unwrap_or(&self.name)
    }

    /// What metrics call the route that took a request, where it is called anything.
    pub fn stat_name_of<'a>(&'a self, matched: Option<&'a RequestMatch>) -> Option<&'a Arc<str>> {
        matched.and_then(|matched| matched.stat_prefix.as_ref()).or(self.stat_name.as_ref())
    }
}

/// `mirror`, or one of `mirrors`.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// The share of requests that is copied; above 0.
    pub percentage: Percentage,
    /// Who gets the copies; what they answer is nobody's.
    pub backend: Backend,
}

/// `corsPolicy`.
#[derive(Debug, Clone)]
pub struct CorsPolicy {
    /// `allowOrigins`, or `allowOrigin` as exact matches.
    pub allow_origins: Vec<StringMatch>,
    /// `allowMethods`, as the header's value.
    pub allow_methods: Option<HeaderValue>,
    /// `allowHeaders`, as the header's value.
    pub allow_headers: Option<HeaderValue>,
    /// `exposeHeaders`, as the header's value.
    pub expose_headers: Option<HeaderValue>,
    /// `maxAge`, as the header's value: whole seconds.
    pub max_age: Option<HeaderValue>,
    /// `allowCredentials`.
    pub allow_credentials: bool,
    /// `unmatchedPreflights`.
    pub unmatched_preflights: UnmatchedPreflights,
}

/// What becomes of a preflight whose origin is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnmatchedPreflights {
    /// `FORWARD`: the app answers it (Istio's default).
    #[default]
    Forward,
    /// `IGNORE`: the mesh answers it, without a word about CORS.
    Ignore,
}

/// One `match[]` entry: all that is set must hold (AND).
#[derive(Debug, Clone, Default)]
pub struct RequestMatch {
    /// `name`, after the route's: what logs call the route when this match took the request.
    pub name: Option<Arc<str>>,
    /// `statPrefix`: what metrics call it.
    pub stat_prefix: Option<Arc<str>>,
    /// `uri`, against the path without the query.
    pub uri: Option<StringMatch>,
    /// `ignoreUriCase`.
    pub ignore_uri_case: bool,
    /// `scheme`.
    pub scheme: Option<StringMatch>,
    /// `method`.
    pub method: Option<StringMatch>,
    /// `authority`, against the Host header or `:authority`.
    pub authority: Option<StringMatch>,
    /// `headers`.
    pub headers: Vec<(HeaderName, HeaderMatch)>,
    /// `withoutHeaders`: none may match.
    pub without_headers: Vec<(HeaderName, HeaderMatch)>,
    /// `queryParams`.
    pub query_params: Vec<(String, StringMatch)>,
    /// `port`.
    pub port: Option<u16>,
    /// `sourceLabels`.
    pub source_labels: Vec<(String, String)>,
    /// `sourceNamespace`.
    pub source_namespace: Option<String>,
}

/// Istio's `StringMatch`.
#[derive(Debug, Clone)]
pub enum StringMatch {
    /// The whole string.
    Exact(String),
    /// A plain string prefix.
    Prefix(String),
    /// RE2, must match the whole string: compiled as `^(?:…)$`.
    Regex(Regex),
}

/// A match on one header.
#[derive(Debug, Clone)]
pub enum HeaderMatch {
    /// The header is there (`{}` or regex `*`).
    Present,
    /// The value matches; several values are one, joined by commas.
    Value(StringMatch),
}

/// What a route does with a request.
#[derive(Debug, Clone)]
pub enum RouteAction {
    /// Sends it to one of these, by weight; never empty, the sum of weights is above 0.
    Forward(Vec<WeightedBackend>),
    /// Answers with a redirect.
    Redirect(Redirect),
    /// Answers itself.
    Direct {
        /// Status of the answer.
        status: StatusCode,
        /// Body of the answer.
        body: bytes::Bytes,
    },
}

/// One destination of a route.
#[derive(Debug, Clone)]
pub struct WeightedBackend {
    /// Its share; of the sum of all weights of the route.
    pub weight: u32,
    /// `headers` of the destination, applied after the route's.
    pub headers: HeaderOps,
    /// Where to.
    pub backend: Backend,
}

/// A destination, resolved.
#[derive(Debug, Clone)]
pub enum Backend {
    /// Endpoints of a service or subset.
    Cluster(Arc<Cluster>),
    /// It names something that does not exist (unknown host, port or subset): 503, with this sentence in the log.
    Missing(Arc<str>),
}

/// `fault`: none by default.
#[derive(Debug, Clone, Default)]
pub struct Fault {
    /// `delay`.
    pub delay: Option<(Percentage, Duration)>,
    /// `abort`.
    pub abort: Option<(Percentage, Abort)>,
    /// Whether requests may ask for a fault with the headers `x-envoy-fault-*`.
    pub by_header: bool,
}

/// How an injected abort answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// `httpStatus`.
    Http(StatusCode),
    /// `grpcStatus`, as its number.
    Grpc(u32),
}

/// A share of requests in millionths: a ten-thousandth of a percent is the least that Istio can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percentage(pub u32);

impl Percentage {
    /// Every request.
    pub const WHOLE: Self = Self(1_000_000);

    /// One percent.
    pub const PERCENT: u32 = Self::WHOLE.0 / 100;
}

/// `headers`: set before add, then remove. Read as [`BothHeaderOps`]; most routes have none, and no room for them.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps(Option<Box<BothHeaderOps>>);

/// What [`HeaderOps`] are.
#[derive(Debug, Clone, Default)]
pub struct BothHeaderOps {
    /// For the request.
    pub request: HeaderOp,
    /// For the response.
    pub response: HeaderOp,
}

/// Of a route that has none.
static NO_HEADER_OPS: BothHeaderOps = BothHeaderOps { request: HeaderOp::NONE, response: HeaderOp::NONE };

impl From<BothHeaderOps> for HeaderOps {
    fn from(both: BothHeaderOps) -> Self {
        Self(Some(Box::new(both)))
    }
}

impl Deref for HeaderOps {
    type Target = BothHeaderOps;

    fn deref(&self) -> &BothHeaderOps {
        self.0.as_deref().unwrap_or(&NO_HEADER_OPS)
    }
}

impl DerefMut for HeaderOps {
    fn deref_mut(&mut self) -> &mut BothHeaderOps {
        self.0.get_or_insert_default()
    }
}

/// Changes to one set of headers.
#[derive(Debug, Clone, Default)]
pub struct HeaderOp {
    /// Replaces all values.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Adds a value.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Removes all values.
    pub remove: Vec<HeaderName>,
    /// `set`/`add` of `host` or `:authority`.
    pub authority: Option<Authority>,
}

impl HeaderOp {
    const NONE: Self = Self { set: Vec::new(), add: Vec::new(), remove: Vec::new(), authority: None };
}

/// `rewrite`: what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct Rewrite {
    /// New path.
    pub path: Option<PathRewrite>,
    /// New Host / `:authority`; wins over header operations.
    pub authority: Option<Authority>,
}

/// How `rewrite.uri` and `rewrite.uriRegexRewrite` change the path. The query stays.
#[derive(Debug, Clone)]
pub enum PathRewrite {
    /// `uri`: replaces the matched prefix when the match was a prefix, else the whole path.
    Uri(String),
    /// `uriRegexRewrite`: every match is replaced, `\1` as in RE2 already turned into `$1` form.
    Regex(Regex, String),
}

/// `redirect`.
#[derive(Debug, Clone)]
pub struct Redirect {
    /// `uri`: the whole new path; only the matched prefix where [`Redirect::prefix`] says so.
    pub uri: Option<String>,
    /// `uri` was written with `%PREFIX()%` in front.
    pub prefix: bool,
    /// `authority`.
    pub authority: Option<String>,
    /// `port` or `derivePort`.
    pub port: Option<RedirectPort>,
    /// `scheme`.
    pub scheme: Option<String>,
    /// `redirectCode`, 301 by default.
    pub status: StatusCode,
}

/// Port of a redirect's Location.
#[derive(Debug, Clone, Copy)]
pub enum RedirectPort {
    /// `port`.
    Number(u16),
    /// `derivePort: FROM_PROTOCOL_DEFAULT`.
    ProtocolDefault,
    /// `derivePort: FROM_REQUEST_PORT`.
    RequestPort,
}
