//! Whole-system tests, one file a topic. Each runs inside a KVM host of its own; see `tests/README.md`.

mod archives;
mod bad_input;
mod containerd;
mod containers;
mod cri;
mod cri_streams;
mod cri_volumes;
mod daemons;
mod density;
mod disks;
mod docker;
mod engine_checkpoints;
mod erofs;
mod faults;
mod faults_clock;
mod faults_io;
mod faults_oci;
mod faults_stopped;
mod figures;
mod flags;
mod framework;
mod hardening;
mod isolation;
mod jail;
mod many;
mod monitor;
mod network;
mod network_figures;
mod oci;
mod oci_bad_input;
mod oci_cgroups;
mod oci_checkpoint;
mod oci_console;
mod oci_figures;
mod oci_hooks;
mod oci_host;
mod oci_loopback;
mod oci_states;
mod oci_systemd;
mod pod_figures;
mod podman;
mod pods;
mod policy;
mod pool;
mod real_images;
mod run;
mod settings;
mod shim;
mod snapshot_forms;
mod snapshots;
mod soak;
mod templates;
mod terminal;
mod verity;
mod virtio_fs;
mod virtio_fs_hostile;

use anyhow::Result;
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Finished;
use bulkhead_tests::registry::Needs;

/// What most tests need.
const BUSYBOX: Needs = Needs::images(Needs::bulkhead(), &["busybox"]);

/// `bulkhead run --rm FLAGS busybox sh -c SCRIPT`.
fn shell(host: &Host, flags: &[&str], script: &str) -> Result<Finished> {
    host.bulkhead_program(["run", "--rm"]).args(flags).args(["busybox", "sh", "-c", script]).run()
}

fn main() {
    // In a container, as its process.
    let mut words = std::env::args_os().skip(1);
    let first = words.next();
    if first.as_ref().is_some_and(|word| word == oci_loopback::FLAG) {
        eprintln!("{}", oci_loopback::without_bpf(words));
        std::process::exit(127);
    }
    if first.is_some_and(|word| word == oci_figures::FLAG) {
        let dir = words.next().unwrap_or_else(|| "/".into());
        if let Err(error) = oci_figures::measure_io(dir.as_ref()) {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
        return;
    }
    bulkhead_tests::runner::main()
}
