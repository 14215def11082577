//! Requests that the agent sends for a pod beside what its app asks for: mirrors, questions to authorizers, health checks.
//!
//! Promises that they go the way of the pod's own requests: with its place among what the rule allows it, chosen like them,
//! with the permit that they need. Never retries, and learns nothing of the endpoint; whoever sends it does. Tested in the lab
//! (`tests/tests/http/mirror.rs`, `external_authorization.rs`, `health_checks.rs`).

use std::{net::SocketAddr, sync::Arc};

use http::{Request, Response};

use super::{
    Mesh, choose,
    permits::{self, Stands},
};
use crate::{
    balance::{self, Chosen, Wish},
    body::{Body, Inform, Nobody},
    error::Result,
    policy::Permit,
    state::snapshot::{Cluster, Endpoint, Protocol},
    upstream::{self, Destination, Kept, Lease, Pod, RequestPlace, Usage, Via},
};

/// Whose request it is, and to whom.
pub(super) struct Errand<'a> {
    mesh: &'a Mesh,
    pod: &'a Pod,
    cluster: &'a Cluster,
    protocol: Protocol,
    /// Whom it is shown to come from.
    client: SocketAddr,
    /// What that one has dialled; `None`: it is the agent's own affair.
    dialled: Option<SocketAddr>,
    /// What the pod has in use of the cluster, where that is limited.
    usage: Option<Arc<Usage>>,
}

/// What policies are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// A request like those of apps.
    Request,
    /// A question to an external authorizer, about which no authorizer is asked.
    Question,
}

/// How an endpoint is reached, and that it may be.
pub(super) struct Way {
    via: Via,
    permit: Permit,
}

impl<'a> Errand<'a> {
    /// One that is the agent's own affair: it needs no place among what the pod may have.
    pub const fn new(
        mesh: &'a Mesh,
        pod: &'a Pod,
        cluster: &'a Cluster,
        protocol: Protocol,
        client: SocketAddr,
    ) -> Self {
        Self { mesh, pod, cluster, protocol, client, dialled: None, usage: None }
    }

    /// The same, on behalf of a client who has dialled this.
    pub fn for_client(self, dialled: SocketAddr) -> Self {
        Self { dialled: Some(dialled), ..self }
    }

    /// The same, which counts as a request of the pod.
    pub fn counted(self) -> Self {
        Self { usage: self.pod.usage(self.cluster), ..self }
    }

    /// A place among what the rule allows the pod, to be held until the response has ended.
    ///
    /// # Errors
    /// [`crate::error::Kind::Full`].
    pub async fn place(&self) -> Result<Option<RequestPlace>> {
        match &self.usage {
            Some(usage) => usage.request(&self.cluster.pool, self.protocol).await.map(Some),
            None => Ok(None),
        }
    }

    /// An endpoint for the request. `dialled`: by the client, where there is one.
    ///
    /// # Errors
    /// [`crate::error::Kind::NoHealthyUpstream`].
    pub fn choose(
        &self,
        request: &Request<Body>,
        tried: &[SocketAddr],
        dialled: Option<SocketAddr>,
    ) -> Result<Chosen> {
        let asked = Some((request.uri(), request.headers()));
        let hash = balance::key(self.cluster, asked, self.client.ip()).hash;
        choose::endpoint(self.mesh, self.pod, self.cluster, &Wish { tried, hash, ..Wish::default() }, dialled)
    }

    /// The way to an endpoint, if policies let the request go; with what is asked again when they change.
    ///
    /// # Errors
    /// Those of policies, and where a pod of this node is not enrolled.
    pub async fn way(
        &self,
        endpoint: &Endpoint,
        request: &mut Request<Body>,
        what: What,
    ) -> Result<(Way, Stands)> {
        let Self { mesh, cluster, client, .. } = *self;
        let via = upstream::via(&mesh.pods, &mesh.node, endpoint, cluster.connect_timeout).await?;
        let own = self.pod.workload();
        let from = permits::From { identity: Some(&own.identity), client };
        let (permit, standing) = match what {
            What::Request => permits::request_to(mesh, from, &via, endpoint, request).await?,
            What::Question => (permits::question_to(mesh, from, &via, endpoint, request)?, None),
        };
        Ok((Way { via, permit }, standing))
    }

    /// Sends it; interim responses are nobody's.
    ///
    /// # Errors
    /// Those of the connection and of the exchange.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        way: &Way,
        request: Request<Body>,
    ) -> Result<(Response<Body>, Lease)> {
        let kept = Kept::of(self.cluster, self.usage.as_ref());
        let destination = Destination {
            address: endpoint.address,
            via: &way.via,
            protocol: self.protocol,
            connect_timeout: self.cluster.connect_timeout,
            kept: self.dialled.map_or(kept, |dialled| kept.on_behalf(self.client, dialled)),
            flow: None,
        };
        let nobody: Arc<dyn Inform> = Arc::new(Nobody);
        self.pod.send(&way.permit, &destination, Box::new(request), self.client, &nobody).await
    }
}
