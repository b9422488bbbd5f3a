//! What a test left behind: everything a host could accumulate, before and after.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Places where Bulkhead keeps files.
const FILES: &[&str] = &["/run", "/var/lib/bulkhead", "/tmp", "/dev/shm"];

/// What Bulkhead makes on first use and keeps on purpose.
fn is_kept(path: &Path) -> bool {
    let exactly = ["/run/bulkhead/kvm-works", "/var/lib/bulkhead/containers", "/var/lib/bulkhead/names"];
    exactly.iter().any(|kept| path == Path::new(kept))
        || path.starts_with("/var/lib/bulkhead/scratch")
        || path.starts_with("/run/bulkhead/verified")
        || path.strip_prefix("/var/lib/bulkhead/templates").is_ok_and(is_template)
}

/// Of templates: the directory, the lock, the stamps and what is complete. Not what is half-made, and no failure.
fn is_template(path: &Path) -> bool {
    let name = path.components().next().map(|first| first.as_os_str().to_string_lossy().into_owned());
    name.is_none_or(|name| {
        let complete = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        complete || name == "lock" || name == "stamps"
    })
}

/// Everything of a host that could be left behind, each with how often it is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeMap<String, usize>,
}

impl Snapshot {
    /// Looks at this host. `whole`: at all of it, for a host of the test's own; otherwise only at what cannot be
    /// somebody else's.
    pub fn take(whole: bool) -> Self {
        Self::of(std::process::id(), whole)
    }

    /// As [`Snapshot::take`], with the processes below `root` instead of those below this one.
    pub fn of(root: u32, whole: bool) -> Self {
        let mut snapshot = Self::default();
        for process in descendants_of(root) {
            snapshot.add("process", &format!("{} {}", process.pid, process.command));
        }
        snapshot.mounts();
        for dir in FILES.iter().filter(|dir| whole || dir.ends_with("/bulkhead")) {
            snapshot.files(Path::new(dir));
        }
        if whole {
            for link in names("/sys/class/net") {
                snapshot.add("network link", &link);
            }
            snapshot.cgroups(Path::new("/sys/fs/cgroup"));
            snapshot.unix_sockets();
            snapshot.loop_devices();
            // Counts open VMs.
            for module in ["kvm_amd", "kvm_intel", "vhost_net", "vhost_vsock"] {
                let users = fs::read_to_string(format!("/sys/module/{module}/refcnt")).unwrap_or_default();
                snapshot.add("users of module", &format!("{module}: {}", users.trim()));
            }
        }
        snapshot
    }

    /// What is new in `self` since `before`, one line each, and what is gone.
    pub fn difference(&self, before: &Self) -> Vec<String> {
        let count = |snapshot: &Self, thing: &str| snapshot.things.get(thing).copied().unwrap_or(0);
        let mut lines = Vec::new();
        for (thing, number) in &self.things {
            let added = number.saturating_sub(count(before, thing));
            if added > 0 {
                let times = if added > 1 { format!(" ({added} times)") } else { String::new() };
                lines.push(format!("left behind: {thing}{times}"));
            }
        }
        for thing in before.things.keys().filter(|thing| count(self, thing) < count(before, thing)) {
            lines.push(format!("gone: {thing}"));
        }
        lines
    }

    /// Without the files below a directory.
    pub fn without(mut self, dir: &Path) -> Self {
        let prefix = format!("file {}", dir.display());
        self.things.retain(|thing, _| !thing.starts_with(&prefix));
        self
    }

    fn add(&mut self, kind: &str, name: &str) {
        *self.things.entry(format!("{kind} {name}")).or_default() += 1;
    }

    fn mounts(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mount in mounts.lines() {
            let fields: Vec<&str> = mount.split(' ').collect();
            let kind = fields.iter().position(|field| *field == "-").and_then(|dash| fields.get(dash + 1));
            self.add("mount", &format!("{} ({})", fields.get(4).unwrap_or(&"?"), kind.unwrap_or(&"?")));
        }
    }

    fn files(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if !is_kept(&entry.path()) {
                self.add("file", &entry.path().display().to_string());
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.files(&entry.path());
            }
        }
    }

    fn cgroups(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.add("cgroup", &entry.path().display().to_string());
                self.cgroups(&entry.path());
            }
        }
    }

    fn unix_sockets(&mut self) {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        for path in sockets.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7)) {
            self.add("unix socket", path);
        }
    }

    fn loop_devices(&mut self) {
        for device in names("/sys/block") {
            if let Ok(file) = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")) {
                self.add("loop device", &format!("{device} on {}", file.trim_end()));
            }
        }
    }
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A process that this one, or one of its children, started. None can get away while we are their subreaper.
#[derive(Debug)]
pub struct Descendant {
    /// Process id.
    pub pid: i32,
    /// Its command line, or its name.
    pub command: String,
    /// Where it waits in the kernel.
    pub waits_in: String,
}

/// All living descendants of this process.
pub fn descendants() -> Vec<Descendant> {
    descendants_of(std::process::id())
}

/// All living descendants of a process.
pub fn descendants_of(root: u32) -> Vec<Descendant> {
    let mut parents = Vec::new();
    for pid in names("/proc").iter().filter_map(|name| name.parse::<i32>().ok()) {
        if let Some(parent) = parent(pid) {
            parents.push((pid, parent));
        }
    }
    let mut family = vec![i32::try_from(root).unwrap_or(0)];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        family.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    family
        .iter()
        .skip(1)
        .map(|&pid| Descendant { pid, command: command_of(pid), waits_in: waits_in(pid) })
        .collect()
}

/// The parent of a process that lives; one that is a zombie does not.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state ppid …", and a name may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if fields.next()? == "Z" { None } else { fields.next()?.parse().ok() }
}

fn command_of(pid: i32) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&words).replace('\0', " ").trim_end().to_string();
    if line.is_empty() {
        return fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_string();
    }
    line
}

fn waits_in(pid: i32) -> String {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    format!("{} {}", read("wchan").trim_end(), read("syscall").split_whitespace().next().unwrap_or(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_what_is_new_and_what_is_gone() {
        let snapshot = |things: &[(&str, usize)]| Snapshot {
            things: things.iter().map(|(thing, number)| ((*thing).to_string(), *number)).collect(),
        };
        let before = snapshot(&[("mount /a", 1), ("mount /b", 1), ("file /c", 1)]);
        let after = snapshot(&[("mount /a", 3), ("file /c", 1), ("cgroup /d", 1)]);
        let expected = ["left behind: cgroup /d", "left behind: mount /a (2 times)", "gone: mount /b"];
        assert_eq!(after.difference(&before), expected);
        assert!(before.difference(&before).is_empty());
    }

    #[test]
    fn a_child_is_seen_until_it_ends() {
        let mut child = std::process::Command::new("sleep").arg("54321").spawn().unwrap();
        let seen = |pid: u32| descendants().iter().any(|found| i64::from(found.pid) == i64::from(pid));
        assert!(seen(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!seen(child.id()));
    }
}
