//! The host's policy, as far as it is about what a bundle asks for. The host's files are looked at when they are opened.

use bulkhead_runtime::policy::{self, Policy};
use bulkhead_runtime::shares::Access;
use bulkhead_runtime::{Artefacts, Context as _, Result, verify};
use serde_json::Value;

use crate::config::Bundle;

/// Whether the bundle may run, in a machine of its own or of another's.
///
/// # Errors
/// The rule that forbids it.
pub fn check(bundle: &Bundle, artefacts: &Artefacts, joins: bool) -> Result<()> {
    let policy = policy::in_force()?;
    if !bundle.holds_pod() {
        policy.engines_image(bundle.image_name())?;
    }
    if policy.lists_kernels() && bundle.vm.kernel.is_some() {
        policy.kernel(&artefacts.kernel, &verify::digest(&artefacts.kernel)?.to_string())?;
    }
    process(policy, &bundle.process, bundle.privileged)?;
    if bundle.seccomp.is_none() {
        policy.unconfined()?;
    }
    for volume in &bundle.volumes {
        let what = || format!("cannot use {}", volume.host.display());
        let place = std::fs::canonicalize(&volume.host).context(what)?;
        policy.host_path(&place, if volume.read_only { Access::ReadOnly } else { Access::ReadWrite })?;
    }
    if joins {
        return Ok(());
    }
    let shape = bundle.shape(&artefacts.settings.machine)?;
    policy.machine(shape.memory_mib, shape.vcpus)
}

/// Whether one more process may have the capabilities that it asks for.
///
/// # Errors
/// The rule that forbids it.
pub fn check_process(asked: &Value) -> Result<()> {
    process(policy::in_force()?, asked, false)
}

fn process(policy: &Policy, process: &Value, privileged: bool) -> Result<()> {
    let sets =
        process.get("capabilities").and_then(Value::as_object).into_iter().flat_map(|sets| sets.values());
    let capabilities: Vec<_> = sets.filter_map(Value::as_array).flatten().filter_map(Value::as_str).collect();
    policy.privileges(privileged, &capabilities)
}
