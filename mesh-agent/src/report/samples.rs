//! Workloads and clusters for this room's tests.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use crate::{
    identity::SpiffeId,
    state::{
        defaults,
        snapshot::{Authentication, Balancing, CapturePolicy, Cluster, Workload},
    },
};

/// The identity of a service account in namespace `default`.
pub fn identity(account: &str) -> SpiffeId {
    SpiffeId {
        trust_domain: "cluster.local".into(),
        namespace: "default".into(),
        service_account: account.into(),
    }
}

/// A pod `NAME-1` at 10.244.0.`host`, of the app `name` in version v1.
pub fn workload(name: &str, host: u8) -> Arc<Workload> {
    let labels = [("app", name), ("version", "v1")].map(|(key, value)| (key.into(), value.into()));
    Arc::new(Workload {
        namespace: "default".into(),
        name: format!("{name}-1").into(),
        ips: vec![IpAddr::from([10, 244, 0, host])],
        node: Some("node-a".into()),
        identity: identity(name),
        labels: BTreeMap::from(labels),
        view: None,
        enrolled: true,
        netns: None,
        announced: false,
        capture: CapturePolicy::default(),
        authorization: Arc::default(),
        authentication: Authentication::default(),
        workload_name: name.into(),
        canonical_service: name.into(),
        canonical_revision: "v1".into(),
    })
}

/// The cluster of a service's port 9080, without endpoints.
pub fn cluster(name: &str) -> Arc<Cluster> {
    Arc::new(Cluster {
        name: format!("outbound|9080||{name}.default.svc.cluster.local").into(),
        host: format!("{name}.default.svc.cluster.local").into(),
        service: name.into(),
        namespace: "default".into(),
        port: 9080,
        protocol: None,
        subset: None,
        view: None,
        endpoints: Vec::new(),
        spread: Arc::default(),
        balancing: Balancing::default(),
        hash: None,
        outlier: None,
        connect_timeout: Duration::from_secs(10),
        pool: crate::state::snapshot::ConnectionPool::UNLIMITED,
        tls: crate::state::snapshot::Origination::Plaintext,
        limits_connections: false,
        retry_budget: defaults::RETRY_BUDGET,
        proxy_protocol: None,
        tunnel: None,
        headless: false,
        standby: crate::state::snapshot::Standby::default(),
        state: Arc::default(),
    })
}
