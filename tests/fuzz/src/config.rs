//! Configuration: whatever a file holds, it is read and compiled or refused, and compiling twice gives the same.

use std::{path::Path, sync::Arc};

use mesh_agent::{
    source::read_text,
    state::{
        compile::{GatewayPod, Netns, Settings, compile},
        snapshot::Gateway,
    },
};

/// Reads the bytes as a file of YAML documents and compiles what was accepted.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let (objects, _) = read_text(text);
    if objects.is_empty() {
        return;
    }
    let own = GatewayPod { namespace: "default".into(), name: "in".into() };
    for (netns, gateway) in
        [(Netns::Annotation, Some(own)), (Netns::Node(Path::new("/run/netns").into()), None)]
    {
        let settings = Settings { netns, gateway, ..Settings::default() };
        let (first, problems) = compile(&objects, None, &settings);
        let (second, again) = compile(&objects, Some(&first), &settings);
        assert_eq!(problems, again, "the same objects have the same problems");
        assert_eq!(first.services.len(), second.services.len());
        assert_eq!(first.workloads.len(), second.workloads.len());
        let ports = |gateway: &Option<Arc<Gateway>>| gateway.as_ref().map(|gateway| gateway.ports.len());
        assert_eq!(ports(&first.gateway), ports(&second.gateway));
    }
}
