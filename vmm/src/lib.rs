//! A KVM microVM monitor: machine, devices, control API.
//!
//! [`machine::Machine`] is the recipe, read it first. Around it:
//!
//! | module | what |
//! |---|---|
//! | [`config`] | what a person or the runtime asks for |
//! | [`memory`] | guest RAM, and how kernel and initramfs get into it |
//! | [`arch`] | everything that is x86-64: registers, cpuid, boot tables |
//! | [`vcpu`] | one thread per vCPU, and the meaning of each exit |
//! | [`bus`] | which device answers which address |
//! | [`devices`] | legacy ports and virtio |
//! | [`event_loop`] | the one thread in which devices do their work |
//! | [`control`] | the control socket, server and client |
//! | [`jail`] | what the monitor gives up before the guest runs |
//! | [`snapshot`] | a machine as a directory, from which others go on |
//! | [`selftest`] | whether this host's KVM can run Linux at all |
//! | [`report`] | what is left behind for people and programs when the machine ends |
//!
//! A monitor runs one virtual machine and is one process. The crate knows nothing of containers.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("only x86-64 Linux so far: another architecture is a second folder beside arch/x86_64");

pub mod arch;
pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod error;
pub mod event_loop;
pub mod exit;
pub mod jail;
pub mod listen;
pub mod machine;
pub mod memory;
pub mod random;
pub mod report;
pub mod selftest;
pub mod signals;
pub mod snapshot;
pub mod sync;
pub mod timeline;
pub mod vcpu;

pub use error::{Error, Result};
