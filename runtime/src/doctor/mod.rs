//! Is this host able to run sandboxes, and if not, what is to be done?

pub mod engines;
mod jail;

use std::env;
use std::fs::{self, OpenOptions};
use std::path::Path;

use serde::Serialize;

use crate::{Artefacts, Layout, Result, Settings, settings};

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Something optional is missing.
    Warning,
    /// Sandboxes cannot run.
    Failed,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it went.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it, empty when there is nothing to do.
    pub advice: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), advice: String::new() }
    }
    fn bad(
        name: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { name, verdict, found: found.into(), advice: advice.into() }
    }
}

/// Looks at everything a sandbox needs. `wrong`: why the settings are the defaults instead of the file's.
#[must_use]
pub fn examine(layout: &Layout, settings: &Settings, wrong: Option<&crate::Error>) -> Vec<Check> {
    let file = match wrong {
        None => Check::ok("settings", settings::source()),
        Some(error) => Check::bad(
            "settings",
            Verdict::Failed,
            error.chain(),
            "correct the line: nothing runs before (docs/configuration.md)",
        ),
    };
    let mut checks = vec![file, kvm()];
    checks.push(match Artefacts::find(settings) {
        Ok(found) => Check::ok(
            "artefacts",
            format!(
                "monitor {}, kernel {}, initramfs {}",
                found.monitor.display(),
                found.kernel.display(),
                found.initramfs.display()
            ),
        ),
        Err(error) => Check::bad(
            "artefacts",
            Verdict::Failed,
            error.chain(),
            "build them with `make`, or install Bulkhead with `make install`",
        ),
    });
    checks.extend([
        storage(layout),
        templates(layout),
        formatter(),
        virtiofsd(settings),
        jail::check(settings),
        cgroups(),
        tap(),
        vhost(),
    ]);
    checks
}

fn templates(layout: &Layout) -> Check {
    match crate::template::last_failure(layout) {
        None => Check::ok(
            "templates",
            format!("machines that have booted are kept in {}", layout.templates().display()),
        ),
        Some(why) => Check::bad(
            "templates",
            Verdict::Warning,
            format!("the last one could not be made: {}", why.trim_end()),
            "containers start all the same, more slowly: every microVM boots. It is tried again ten minutes later",
        ),
    }
}

/// The check of KVM alone, which `run` makes before it promises anything.
#[must_use]
pub fn kvm() -> Check {
    match vmm::selftest::run() {
        vmm::selftest::Verdict::Usable => Check::ok("kvm", "/dev/kvm runs guests"),
        vmm::selftest::Verdict::Unusable { found, advice } => {
            Check::bad("kvm", Verdict::Failed, found, advice)
        }
    }
}

/// As [`kvm`], but remembers until the next boot of the host that it went well.
///
/// # Errors
/// KVM cannot be used, in the words of `doctor`.
pub fn require_kvm(layout: &Layout) -> Result<()> {
    // The permission can differ from caller to caller, so opening the device is not remembered.
    let opens = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    let marker = layout.run.join("kvm-works");
    if opens && marker.exists() {
        return Ok(());
    }
    let check = kvm();
    if check.verdict != Verdict::Ok {
        return Err(crate::Error::Usage(format!("{}; {}", check.found, check.advice)));
    }
    crate::state::private_dir(&layout.run)?;
    let _ = fs::write(marker, "");
    Ok(())
}

fn storage(layout: &Layout) -> Check {
    const LOW: u64 = 1 << 30;
    let existing = layout.data.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let place = layout.data.display();
    if rustix::fs::access(existing, rustix::fs::Access::WRITE_OK).is_err() {
        let advice = "run as root, or choose another place with --root DIR";
        return Check::bad("storage", Verdict::Failed, format!("{place} cannot be written"), advice);
    }
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let found = format!("{place}, {} MiB free", free >> 20);
            if free < LOW {
                let advice = "free some space (`bulkhead image prune`), or use --root DIR";
                Check::bad("storage", Verdict::Warning, found, advice)
            } else {
                Check::ok("storage", found)
            }
        }
        Err(error) => Check::bad("storage", Verdict::Failed, format!("{place}: {error}"), "use --root DIR"),
    }
}

fn virtiofsd(settings: &Settings) -> Check {
    match crate::shares::find(&settings.programs.virtiofsd) {
        Ok(program) => Check::ok("virtiofsd", program.display().to_string()),
        Err(error) => Check::bad(
            "virtiofsd",
            Verdict::Warning,
            format!("directories of the host cannot be shared (-v): {}", error.chain()),
            "install virtiofsd, or name it in BULKHEAD_VIRTIOFSD",
        ),
    }
}

fn formatter() -> Check {
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    match path.split(':').map(|dir| Path::new(dir).join("mke2fs")).find(|file| file.exists()) {
        Some(file) => Check::ok("mke2fs", file.display().to_string()),
        None => Check::bad(
            "mke2fs",
            Verdict::Warning,
            "not found: writable layers on disk cannot be made",
            "install e2fsprogs, or run with --storage 0",
        ),
    }
}

fn cgroups() -> Check {
    let root = Path::new("/sys/fs/cgroup");
    if let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) {
        return Check::ok("cgroups", format!("version 2, with {}", controllers.trim()));
    }
    let found = if root.join("unified").exists() { "version 1 and 2 (hybrid)" } else { "version 1" };
    if root.join("memory").exists() {
        return Check::ok("cgroups", found);
    }
    let advice = "mount cgroup2 on /sys/fs/cgroup; limits inside the guest hold without it";
    Check::bad("cgroups", Verdict::Warning, "none are mounted", advice)
}

fn tap() -> Check {
    device("tap", "/dev/net/tun", "load it with `modprobe tun`; needed for containers with a network")
}

fn vhost() -> Check {
    device(
        "vhost",
        "/dev/vhost-net",
        "load it with `modprobe vhost_net`; speeds up networks, nothing needs it yet",
    )
}

fn device(name: &'static str, path: &str, advice: &str) -> Check {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok(name, path),
        Err(error) => Check::bad(name, Verdict::Warning, format!("{path}: {error}"), advice),
    }
}
