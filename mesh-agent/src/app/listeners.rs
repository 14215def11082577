//! The agent's own listeners: bound, or those of the agent before.

use std::io;

use anyhow::Result;

use crate::{
    admin::{self, Address},
    config::NodeConfig,
    handover::OwnListeners,
};

/// What was bound before the kernel was touched: an address that is taken stops the start.
pub(super) struct Listeners {
    pub admin: admin::Listener,
    pub metrics: admin::Listener,
    pub readiness: admin::Listener,
    /// Where this process alone says whether it is ready; never handed over.
    pub own_readiness: Option<admin::Listener>,
}

impl Listeners {
    pub async fn bind(config: &NodeConfig) -> Result<Self> {
        Ok(Self {
            admin: admin::Listener::bind_admin(&config.admin()).await?,
            metrics: admin::Listener::bind(config.metrics).await?,
            readiness: admin::Listener::bind(config.readiness).await?,
            own_readiness: own_readiness(config).await?,
        })
    }

    /// Those of the agent before, but for any that is to be elsewhere now.
    pub async fn take_over(config: &NodeConfig, own: OwnListeners) -> Result<Self> {
        let at = |file, address: &Address| admin::Listener::handed_over(file, address);
        Ok(Self {
            admin: match at(own.admin, &config.admin())? {
                Some(admin) => admin,
                None => admin::Listener::bind_admin(&config.admin()).await?,
            },
            metrics: match at(own.metrics, &Address::Tcp(config.metrics))? {
                Some(metrics) => metrics,
                None => admin::Listener::bind(config.metrics).await?,
            },
            readiness: match at(own.readiness, &Address::Tcp(config.readiness))? {
                Some(readiness) => readiness,
                None => admin::Listener::bind(config.readiness).await?,
            },
            own_readiness: own_readiness(config).await?,
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

async fn own_readiness(config: &NodeConfig) -> io::Result<Option<admin::Listener>> {
    match &config.ready_socket {
        Some(path) => admin::Listener::bind_admin(&Address::Unix(path.clone())).await.map(Some),
        None => Ok(None),
    }
}
