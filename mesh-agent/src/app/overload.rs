//! The memory of this process, watched; and who is shed, for those who ask.

use std::{
    io,
    sync::{Arc, Weak},
};

use anyhow::Result;

use super::NotStarted;
use crate::{
    admin::OverloadView,
    capture,
    config::OverloadMarks,
    overload::{self, Marks, Memory, Overload, Pods, Senses},
    proxy::Mesh,
};

/// What may be used; says whose limit that is, once.
pub(super) fn measure(config: &OverloadMarks) -> Result<(Memory, Arc<Overload>)> {
    let OverloadMarks { memory_limit, memory_high: high, memory_critical: critical } = *config;
    if high > critical {
        let text = format!("--memory-high {high} is above --memory-critical {critical}");
        return Err(NotStarted(text).into());
    }
    let memory = Memory::of_process(memory_limit);
    if let Some(limit) = memory.limit {
        tracing::info!(limit, of = memory.whose, high, critical, "memory is limited");
    } else {
        tracing::info!("memory has no limit: nothing is ever refused for want of it");
    }
    let overload = Arc::new(Overload::new(memory.limit));
    Ok((memory, overload))
}

/// Watches it for as long as the process lives, where there is a limit. On a thread of its own: where it is needed, the
/// others have more to do than they can.
///
/// # Errors
/// No thread can be had.
pub(super) fn watch(memory: Memory, mesh: &Arc<Mesh>, config: &OverloadMarks) -> io::Result<()> {
    let Some(limit) = memory.limit else { return Ok(()) };
    let marks = Marks::new(limit, config.memory_high, config.memory_critical);
    let [counted, relieved, told] = [(); 3].map(|()| Arc::downgrade(mesh));
    let senses = Senses {
        used: Box::new(move || memory.used()),
        pods: Box::new(move || pods(&counted)),
        relieve: Box::new(move |share| relieve(&relieved, share)),
        tell: Box::new(move |overload| tell(&told, overload)),
    };
    let watching = overload::watch(Arc::clone(&mesh.overload), marks, senses);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    std::thread::Builder::new().name("memory".to_owned()).spawn(move || runtime.block_on(watching))?;
    Ok(())
}

fn pods(mesh: &Weak<Mesh>) -> Pods {
    let Some(mesh) = mesh.upgrade() else { return Pods::default() };
    let all = mesh.pods.all();
    let held = all.values().map(|pod| pod.held()).collect();
    Pods { held, promised: all.values().map(|pod| pod.allowance().promised()).sum() }
}

fn tell(mesh: &Weak<Mesh>, overload: &Overload) {
    let Some(mesh) = mesh.upgrade() else { return };
    let limit = overload.limit().unwrap_or_default();
    mesh.reporter.set_memory(overload.used(), overload.promised(), limit, overload.level() as u8);
    for pod in mesh.pods.all().values() {
        pod.allowance().set_sparing(overload.sheds(|| pod.held()));
    }
}

fn relieve(mesh: &Weak<Mesh>, share: u64) {
    if let Some(mesh) = mesh.upgrade() {
        mesh.pods.all().values().filter(|pod| pod.held() >= share).for_each(|pod| pod.close_idle());
    }
    capture::give_back_free_memory();
}

/// What operators are shown.
pub(super) fn view(mesh: &Mesh) -> OverloadView {
    let overload = &mesh.overload;
    let all = mesh.pods.all();
    let shed = all.iter().filter(|(_, pod)| overload.sheds(|| pod.held()));
    let mut shed: Vec<_> = shed.map(|(name, _)| name.to_string()).collect();
    shed.sort();
    OverloadView {
        level: overload.level().word().to_owned(),
        memory_bytes: overload.used(),
        memory_promised_bytes: overload.promised(),
        memory_limit_bytes: overload.limit(),
        shed,
    }
}
