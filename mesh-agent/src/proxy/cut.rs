//! What stands open, and is cut once it would not be permitted any more.
//!
//! Promises: whoever is permitted something holds a [`Standing`] made before policy was asked, so that no change is
//! missed; when what the pod asks of those who come has changed, it is asked again, and an answer of no ends what is open
//! with the error of a refusal; so does a certificate that is withdrawn (`identity/shown.rs`). Costs nothing while nothing changes: it waits for its pod's word, and is not asked byte by
//! byte. Tested in the lab (`tests/tests/authorization.rs`, `mtls_modes.rs`).

use std::{
    fmt,
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, Method, Request, Uri};
use tokio::sync::watch;

use super::{external::Approved, guards::Ticket, permits::From};
use crate::{
    config::PathNormalization,
    error::{Error, Kind, Result},
    identity::{Shown, SpiffeId},
    policy::{self, Asked, Head, Open, jwt},
    route, tunnel,
    upstream::Pod,
};

/// What is open.
#[derive(Debug)]
pub(super) enum What {
    /// A connection that passes unread.
    Connection,
    /// A connection whose requests are judged one by one.
    Requests,
    /// Bytes that are no requests, with the server name of their `ClientHello`.
    Opaque(Option<String>),
    /// The kubelet's, which no policy refuses: what it may ask for is looked at with each request.
    Probe,
    /// A request, as it was judged. `raw_path`: what becomes of its path before it is judged, where that has not been done;
    /// `judged`: when, as its tokens count time.
    Request { method: Method, uri: Uri, headers: HeaderMap, raw_path: Option<PathNormalization>, judged: u64 },
}

impl What {
    /// A request under way.
    pub fn request<B>(request: &Request<B>, raw_path: Option<PathNormalization>, judged: u64) -> Self {
        Self::Request {
            method: route::method(request.method(), request.extensions()).clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            raw_path,
            judged,
        }
    }
}

/// Something open at a pod of this node: who has it, and for what.
pub(super) struct Standing {
    pod: Arc<Pod>,
    source: Option<SpiffeId>,
    client: SocketAddr,
    app: SocketAddr,
    pub what: What,
    /// Those external authorizers that have said yes, and what else they said.
    approved: Approved,
    /// What the limits of the port have given it.
    ticket: Ticket,
    /// What the source proved itself with, where it came by mutual TLS.
    pub shown: Option<Arc<Shown>>,
    changes: watch::Receiver<()>,
    /// Only of what lasts.
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standing").field("app", &self.app).field("what", &self.what).finish_non_exhaustive()
    }
}

impl Standing {
    /// To be made before policy is asked: what changes from here on is seen.
    pub fn new(pod: &Arc<Pod>, from: From<'_>, app: SocketAddr, what: What) -> Box<Self> {
        let From { identity, client } = from;
        let (pod, source) = (Arc::clone(pod), identity.cloned());
        let changes = pod.policy_changes();
        let (approved, ticket) = (Approved::default(), Ticket::default());
        Box::new(Self {
            pod,
            source,
            client,
            app,
            what,
            approved,
            ticket,
            shown: None,
            changes,
            waiting: None,
        })
    }

    /// The same connection, of which more is known.
    pub fn known_as(mut self: Box<Self>, what: What) -> Box<Self> {
        self.what = what;
        self
    }

    /// The same, which external authorizers have said yes to.
    pub fn approved_by(mut self: Box<Self>, approved: Approved) -> Box<Self> {
        self.approved = approved;
        self
    }

    /// The same, which the limits of the port have let in.
    pub fn admitted(mut self: Box<Self>, ticket: Ticket) -> Box<Self> {
        self.ticket = ticket;
        self
    }

    /// The response is whole.
    pub fn finished(&self) {
        self.ticket.finished();
    }

    /// Makes the changes that external authorizers ask for in the response, and tells what the limits of the port leave.
    pub fn changes_of_response(&self, headers: &mut HeaderMap) {
        self.ticket.tell(headers);
        policy::external::change(headers, &self.approved.response);
    }

    /// Why it has to end now, if it has: looks only whether anything has changed since it was last asked.
    pub fn look(&mut self) -> Option<Error> {
        // An `Err` says that the pod is gone, which this keeps.
        if !self.changes.has_changed().unwrap_or(false) {
            return None;
        }
        self.changes.mark_unchanged();
        self.ask().err()
    }

    /// Ready when it has to end.
    pub fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        loop {
            if let Some(error) = self.look() {
                return Poll::Ready(error);
            }
            let changes = &self.changes;
            let waiting = self.waiting.get_or_insert_with(|| Box::pin(change(changes.clone())));
            ready!(waiting.as_mut().poll(cx));
            self.waiting = None;
        }
    }

    fn ask(&self) -> Result<()> {
        still_believed(self.shown.as_deref(), self.client)?;
        let workload = self.pod.workload();
        let (source, client) = (self.source.as_ref(), self.client);
        let approved = &*self.approved.by;
        let asked = Asked { workload: &workload, destination: self.app, source, client, approved };
        let open = match &self.what {
            What::Probe => return Ok(()),
            What::Connection => Open::Connection,
            What::Requests => Open::Requests,
            What::Opaque(name) => Open::Opaque(name.as_deref()),
            What::Request { method, uri, headers, raw_path, judged } => {
                let form = raw_path.filter(|_| workload.authorization.reads_paths);
                let normal = form.map(|form| policy::normalise(uri.path(), form)).transpose();
                let normal = normal.map_err(|bad| Error::new(Kind::BadRequest, bad.to_string()))?;
                let path = normal.as_deref().unwrap_or_else(|| uri.path());
                let authority = uri.authority().map_or("", |authority| authority.as_str());
                let mut request = Request::new(());
                (*request.uri_mut(), *request.headers_mut()) = (uri.clone(), headers.clone());
                let tokens = &workload.authentication.tokens;
                let claims = jwt::settle(tokens, self.app.port(), &mut request, *judged)?;
                policy::external::change(request.headers_mut(), &self.approved.request);
                let (headers, claims) = (request.headers(), claims.as_ref());
                return policy::stands(
                    &asked,
                    Open::Request(Head { method, authority, path, headers, claims }),
                );
            }
        };
        policy::stands(&asked, open)
    }
}

/// Whether what somebody has proved itself with still counts.
pub(super) fn still_believed(shown: Option<&Shown>, client: SocketAddr) -> Result<()> {
    if shown.is_some_and(Shown::is_cut) { Err(tunnel::not_believed(client)) } else { Ok(()) }
}

/// The pod's word is kept for as long as this is: nobody waits for a pod that is gone.
async fn change(mut changes: watch::Receiver<()>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Whether the end of a connection is a cut: it is reported as a refusal too.
pub(super) const fn is_cut(error: &Error) -> bool {
    matches!(error.kind, Kind::Denied | Kind::Plaintext | Kind::Revoked | Kind::Token(_))
}

/// What `work` comes to, unless what stands is cut before. Pinned where it is made: a future that is handed over takes its
/// room twice, in the future that it is handed to.
pub(super) async fn unless_cut<T>(
    standing: Option<&mut Box<Standing>>,
    work: Pin<&mut impl Future<Output = Result<T>>>,
) -> Result<T> {
    let Some(standing) = standing else { return work.await };
    tokio::select! {
        biased;
        done = work => done,
        error = poll_fn(|cx| standing.poll_cut(cx)) => Err(error),
    }
}
