//! The kernel hands over exactly the connections of enrolled pods, tells everyone the truth about them, and is left as
//! it was found. Needs root and the kernel object (`cargo xtask build-ebpf`).

mod agent_gone;
mod exclusions;
mod flows;
mod full_maps;
mod inbound;
mod lifecycle;
mod outbound;
mod sockets;
mod world;
