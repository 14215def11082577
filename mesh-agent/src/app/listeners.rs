//! The agent's own listeners: bound, or those of the agent before.

use std::{io, net::SocketAddr, path::Path};

use anyhow::Result;

use crate::{
    admin::{self, Address},
    config::{GatewayConfig, NodeConfig},
    handover::OwnListeners,
};

/// Where they are to be.
pub(super) struct Places<'a> {
    admin: Address,
    metrics: SocketAddr,
    readiness: SocketAddr,
    ready_socket: Option<&'a Path>,
}

impl<'a> From<&'a NodeConfig> for Places<'a> {
    fn from(config: &'a NodeConfig) -> Self {
        let ready_socket = config.ready_socket.as_deref();
        Self { admin: config.admin(), metrics: config.metrics, readiness: config.readiness, ready_socket }
    }
}

impl<'a> From<&'a GatewayConfig> for Places<'a> {
    fn from(config: &'a GatewayConfig) -> Self {
        let ready_socket = config.ready_socket.as_deref();
        Self { admin: config.admin(), metrics: config.metrics, readiness: config.readiness, ready_socket }
    }
}

/// What was bound before the kernel was touched: an address that is taken stops the start.
pub(super) struct Listeners {
    pub admin: admin::Listener,
    pub metrics: admin::Listener,
    pub readiness: admin::Listener,
    /// Where this process alone says whether it is ready; never handed over.
    pub own_readiness: Option<admin::Listener>,
}

impl Listeners {
    pub async fn bind(places: Places<'_>) -> Result<Self> {
        Ok(Self {
            admin: admin::Listener::bind_admin(&places.admin).await?,
            metrics: admin::Listener::bind(places.metrics).await?,
            readiness: admin::Listener::bind(places.readiness).await?,
            own_readiness: own_readiness(&places).await?,
        })
    }

    /// Those of the agent before, but for any that is to be elsewhere now.
    pub async fn take_over(places: Places<'_>, own: OwnListeners) -> Result<Self> {
        let at = |file, address: &Address| admin::Listener::handed_over(file, address);
        Ok(Self {
            admin: match at(own.admin, &places.admin)? {
                Some(admin) => admin,
                None => admin::Listener::bind_admin(&places.admin).await?,
            },
            metrics: match at(own.metrics, &Address::Tcp(places.metrics))? {
                Some(metrics) => metrics,
                None => admin::Listener::bind(places.metrics).await?,
            },
            readiness: match at(own.readiness, &Address::Tcp(places.readiness))? {
                Some(readiness) => readiness,
                None => admin::Listener::bind(places.readiness).await?,
            },
            own_readiness: own_readiness(&places).await?,
        })
    }

    /// The same sockets, for a successor.
    pub fn share(&self) -> io::Result<OwnListeners> {
        Ok(OwnListeners {
            admin: self.admin.share()?,
            metrics: self.metrics.share()?,
            readiness: self.readiness.share()?,
        })
    }
}

async fn own_readiness(places: &Places<'_>) -> io::Result<Option<admin::Listener>> {
    match places.ready_socket {
        Some(path) => admin::Listener::bind_admin(&Address::Unix(path.to_owned())).await.map(Some),
        None => Ok(None),
    }
}
