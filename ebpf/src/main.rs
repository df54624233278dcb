//! Marline's kernel programs: they hand the sockets of enrolled pods to the agent.
//!
//! `capture` turns connects around, `lookup` steers what arrives, `account` counts both and holds the last gate, `direct` is the
//! gate of sockets that the agent handshakes on, `kubelet` lets the node's probes through; `maps` is all they know of the world. Loading, pinning and filling the maps is left to `agent/src/bpf.rs`.
//!
//! Rules: a namespace that is not in `PODS` is left alone; in one that is, whatever cannot be handed to the agent is refused
//! and counted. Only helpers that Linux 6.1 has for the program type are used.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod account;
mod capture;
mod context;
mod direct;
mod kubelet;
mod lookup;
mod maps;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
