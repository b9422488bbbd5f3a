//! What is in force for a living sandbox: read from /proc, whoever meant what. Only landlock, which the kernel tells nobody of, is as
//! the monitor says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vmm::control::Client;
use vmm::jail::Confinement;

use crate::state::{Files, Record};
use crate::{Context, Error, Result, names};

/// Kinds of namespaces.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
/// How the kernel calls the monitor.
const MONITOR: &str = "bulkhead-vmm";
/// The file server's program.
const SERVER: &str = "virtiofsd";
/// Deepest that descendants of a sandbox's process are looked for.
const DEPTH: usize = 3;

/// The processes of a sandbox that a guest could take over.
#[derive(Clone, Debug, Serialize)]
pub struct Isolation {
    /// The container, if it is one of `bulkhead`'s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its monitor.
    pub monitor: Process,
    /// What serves it files of the host's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub file_servers: Vec<Process>,
    /// What the monitor says of its jail: landlock, and what could not be had and why. `None`: it does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor_says: Option<Confinement>,
}

/// One process.
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    /// Process id on the host.
    pub pid: i32,
    /// Its ids from there inwards: the last is that in its own namespace.
    pub namespace_pids: Vec<i32>,
    /// Name of the program.
    pub name: String,
    /// Real, effective, saved and file system user.
    pub uids: Vec<u32>,
    /// The same of groups.
    pub gids: Vec<u32>,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Bits of each set of capabilities, in hexadecimal.
    pub capabilities: BTreeMap<String, String>,
    /// Whether nothing it executes could get more rights.
    pub no_new_privs: bool,
    /// Whether other processes of its user may look into it. `None`: that cannot be seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dumpable: Option<bool>,
    /// System call filters.
    pub threads: Vec<Thread>,
    /// Its namespaces.
    pub namespaces: BTreeMap<String, Namespace>,
    /// What is mounted where it can see it.
    pub mounts: Vec<Mount>,
    /// Open descriptors by kind.
    pub descriptors: BTreeMap<String, usize>,
    /// Limits that are not `unlimited`, soft and hard.
    pub limits: BTreeMap<String, String>,
    /// Its lines of `/proc/PID/cgroup`.
    pub cgroup: Vec<String>,
}

/// See [`Process::threads`].
#[derive(Clone, Debug, Serialize)]
pub struct Thread {
    /// Its id.
    pub tid: i32,
    /// Its name.
    pub name: String,
    /// `off`, `strict` or `filter`.
    pub seccomp: String,
    /// How many filters it has.
    pub filters: u32,
}

/// See [`Process::namespaces`].
#[derive(Clone, Debug, Serialize)]
pub struct Namespace {
    /// As the kernel numbers it.
    pub id: String,
    /// Whether it is another than that of the host's first process, or, for who may not see that, than one's own. `None`: neither can be
    /// seen.
    pub own: Option<bool>,
}

/// See [`Process::mounts`].
#[derive(Clone, Debug, Serialize)]
pub struct Mount {
    /// Where.
    pub point: String,
    /// What of its file system is there.
    pub root: String,
    /// Kind of file system.
    pub kind: String,
    /// Options of the mount.
    pub options: String,
}

/// What is in force for a container's processes.
///
/// # Errors
/// It does not run, or what it is made of cannot be seen.
pub fn of_container(record: &Record, files: &Files) -> Result<Isolation> {
    let supervisor = i32::try_from(record.supervisor_pid).unwrap_or(0);
    let monitor = i32::try_from(record.monitor_pid).unwrap_or(0);
    if supervisor == 0 || monitor == 0 {
        let id = names::short(&record.id);
        return Err(Error::Usage(format!("container {id} does not run: it has no processes to look at")));
    }
    let servers = descendants(supervisor).into_iter().filter(|pid| is_server(*pid));
    let says = Client::connect(&files.control()).and_then(|mut client| client.status()).ok();
    Ok(Isolation {
        id: Some(record.id.clone()),
        monitor: look(monitor)?,
        file_servers: servers.map(look).collect::<Result<_>>()?,
        monitor_says: says.map(|status| status.jail),
    })
}

/// What is in force for a monitor, or for the processes below the one that started it: `bulkhead-oci state` says which that is.
///
/// # Errors
/// There is no monitor.
pub fn of_process(pid: i32) -> Result<Isolation> {
    let family = if name_of(pid) == MONITOR { siblings(pid) } else { descendants(pid) };
    let none = || {
        Error::Usage(format!("neither process {pid} nor one that it has started is a monitor ({MONITOR})"))
    };
    let monitor = family.iter().copied().find(|pid| name_of(*pid) == MONITOR).ok_or_else(none)?;
    let servers = family.into_iter().filter(|pid| is_server(*pid));
    let says = control_of(monitor)
        .and_then(|path| Client::connect(&path).and_then(|mut client| client.status()).ok());
    Ok(Isolation {
        id: None,
        monitor: look(monitor)?,
        file_servers: servers.map(look).collect::<Result<_>>()?,
        monitor_says: says.map(|status| status.jail),
    })
}

/// The control socket beside the configuration on the monitor's command line.
fn control_of(pid: i32) -> Option<PathBuf> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    words.find(|word| word == "--config")?;
    let config = PathBuf::from(words.next()?.into_owned());
    Some(config.parent()?.join("control"))
}

fn siblings(pid: i32) -> Vec<i32> {
    let parent = status_of(pid).ok().and_then(|status| status.get("PPid")?.parse().ok()).unwrap_or(0);
    // The given one comes first, and those of another sandbox of the same parent, as of a shim's, are none of its own.
    let mut all = vec![pid];
    all.extend(children(parent).into_iter().filter(|other| *other != pid && name_of(*other) != MONITOR));
    all
}

fn descendants(pid: i32) -> Vec<i32> {
    let (mut all, mut level) = (Vec::new(), vec![pid]);
    for _ in 0..DEPTH {
        level = level.into_iter().flat_map(children).collect();
        all.extend(&level);
    }
    all
}

fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn name_of(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Whether it is a file server, perhaps run by a loader of its own, whose name it has then.
fn is_server(pid: i32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words =
        line.split(|byte| *byte == 0).map(|word| PathBuf::from(String::from_utf8_lossy(word).into_owned()));
    words.any(|word| word.file_name().is_some_and(|name| name == SERVER))
}

/// The lines of a status file.
fn status_of(pid: i32) -> std::io::Result<BTreeMap<String, String>> {
    Ok(fields(&fs::read_to_string(format!("/proc/{pid}/status"))?))
}

fn fields(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

fn numbers<N: std::str::FromStr>(text: Option<&String>) -> Vec<N> {
    text.into_iter().flat_map(|text| text.split_whitespace()).filter_map(|word| word.parse().ok()).collect()
}

/// Everything about one process.
fn look(pid: i32) -> Result<Process> {
    let what = || format!("cannot look at process {pid}");
    let place = PathBuf::from(format!("/proc/{pid}"));
    let status = status_of(pid).context(what)?;
    let get = |key: &str| status.get(key).cloned().unwrap_or_default();
    let sets = [
        ("effective", "CapEff"),
        ("permitted", "CapPrm"),
        ("inheritable", "CapInh"),
        ("bounding", "CapBnd"),
        ("ambient", "CapAmb"),
    ];
    let read = |name: &str| fs::read_to_string(place.join(name)).unwrap_or_default();
    Ok(Process {
        pid,
        namespace_pids: numbers(status.get("NSpid")),
        name: get("Name"),
        uids: numbers(status.get("Uid")),
        gids: numbers(status.get("Gid")),
        groups: numbers(status.get("Groups")),
        capabilities: sets.iter().map(|(name, key)| ((*name).to_owned(), get(key))).collect(),
        no_new_privs: get("NoNewPrivs") == "1",
        dumpable: dumpable(&place, &numbers(status.get("Uid"))),
        threads: threads(&place).context(what)?,
        namespaces: NAMESPACES.iter().filter_map(|kind| Some(((*kind).to_owned(), namespace(&place, kind)?))).collect(),
        mounts: mounts(&read("mountinfo")),
        descriptors: descriptors(&place).context(|| {
            format!("cannot see the descriptors of process {pid}: only root and its user, while it can be looked into, may")
        })?,
        limits: limits(&read("limits")),
        cgroup: read("cgroup").lines().map(str::to_owned).collect(),
    })
}

/// The kernel gives the files of a process that nobody may look into to root. Of root's own processes they always are.
fn dumpable(place: &Path, uids: &[u32]) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;
    let owner = fs::metadata(place.join("environ")).ok()?.uid();
    let uid = *uids.get(1)?;
    (uid != 0).then_some(owner == uid)
}

fn threads(place: &Path) -> std::io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(place.join("task"))?.flatten() {
        // One that has just ended.
        let Ok(text) = fs::read_to_string(task.path().join("status")) else { continue };
        let status = fields(&text);
        let get = |key: &str| status.get(key).map(String::as_str);
        threads.push(Thread {
            tid: get("Pid").and_then(|tid| tid.parse().ok()).unwrap_or(0),
            name: get("Name").unwrap_or_default().to_owned(),
            seccomp: match get("Seccomp") {
                Some("0") => "off",
                Some("1") => "strict",
                Some("2") => "filter",
                _ => "unknown",
            }
            .to_owned(),
            filters: get("Seccomp_filters").and_then(|count| count.parse().ok()).unwrap_or(0),
        });
    }
    threads.sort_by_key(|thread| thread.tid);
    Ok(threads)
}

fn namespace(place: &Path, kind: &str) -> Option<Namespace> {
    let of =
        |place: &Path| Some(fs::read_link(place.join("ns").join(kind)).ok()?.to_string_lossy().into_owned());
    let id = of(place)?;
    // Who may not see those of the host's first process is in them by all likelihood.
    let host = of(Path::new("/proc/1")).or_else(|| of(Path::new("/proc/self")));
    let own = host.map(|host| host != id);
    Some(Namespace { id, own })
}

/// `proc_pid_mountinfo(5)`.
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut words = before.split(' ').skip(3);
        let (root, point, options) = (words.next()?, words.next()?, words.next()?);
        let kind = after.split(' ').next()?;
        Some(Mount { point: point.into(), root: root.into(), kind: kind.into(), options: options.into() })
    };
    text.lines().filter_map(mount).collect()
}

fn descriptors(place: &Path) -> std::io::Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for fd in fs::read_dir(place.join("fd"))?.flatten() {
        // One that has just been closed.
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        *kinds.entry(kind_of(&target.to_string_lossy())).or_insert(0) += 1;
    }
    Ok(kinds)
}

/// The kind of what a descriptor's link says; of files, which.
fn kind_of(target: &str) -> String {
    let target = target.strip_suffix(" (deleted)").unwrap_or(target);
    match target.split_once(':') {
        Some(("anon_inode", name)) => name.trim_matches(['[', ']']).to_owned(),
        Some((kind @ ("socket" | "pipe" | "pidfd"), _)) => kind.to_owned(),
        _ if target.starts_with("/memfd:") => "memfd".to_owned(),
        _ => target.to_owned(),
    }
}

fn limits(text: &str) -> BTreeMap<String, String> {
    let line = |line: &str| {
        // Columns of 26, 21 and 21 characters.
        let (name, rest) = line.split_at_checked(26)?;
        let mut words = rest.split_whitespace();
        let (soft, hard) = (words.next()?, words.next()?);
        let limited = soft != "unlimited" || hard != "unlimited";
        limited.then(|| (name.trim().to_owned(), format!("{soft} {hard}")))
    };
    text.lines().skip(1).filter_map(line).collect()
}

impl Isolation {
    /// Rows for people: what, of the monitor, of each file server.
    #[must_use]
    pub fn rows(&self) -> Vec<Vec<String>> {
        let all: Vec<&Process> = std::iter::once(&self.monitor).chain(&self.file_servers).collect();
        let row = |name: &str, cell: &dyn Fn(&Process) -> String| {
            std::iter::once(name.to_owned())
                .chain(all.iter().map(|process| cell(process)))
                .collect::<Vec<_>>()
        };
        let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        let mut rows = vec![
            row("process", &|process| format!("{} {}", process.name, process.pid)),
            row("users", &|process| list(&process.uids)),
            row("groups", &|process| list(&[process.gids.as_slice(), &process.groups].concat())),
        ];
        for set in ["effective", "permitted", "inheritable", "bounding", "ambient"] {
            rows.push(row(&format!("capabilities, {set}"), &|process| {
                process.capabilities.get(set).cloned().unwrap_or_default()
            }));
        }
        rows.push(row("no new privileges", &|process| yes(process.no_new_privs)));
        rows.push(row("dumpable", &|process| process.dumpable.map_or("not to be seen".into(), yes)));
        rows.push(row("threads without a filter", &|process| {
            let open: Vec<_> = process.threads.iter().filter(|thread| thread.seccomp != "filter").collect();
            let names: Vec<_> = open.iter().map(|thread| thread.name.as_str()).collect();
            format!("{} of {} {}", open.len(), process.threads.len(), names.join(" ")).trim_end().to_owned()
        }));
        for kind in NAMESPACES {
            rows.push(row(&format!("namespace, {kind}"), &|process| match process
                .namespaces
                .get(kind)
                .and_then(|namespace| namespace.own)
            {
                Some(true) => "its own".to_owned(),
                Some(false) => "the host's".to_owned(),
                None => "not to be seen".to_owned(),
            }));
        }
        rows.push(row("mounts", &|process| {
            let shown = process.mounts.iter().take(4);
            let mut words: Vec<_> = shown.map(|mount| format!("{} ({})", mount.point, mount.kind)).collect();
            if process.mounts.len() > 4 {
                words.push(format!("and {} more", process.mounts.len() - 4));
            }
            words.join(", ")
        }));
        rows.push(row("descriptors", &|process| process.descriptors.values().sum::<usize>().to_string()));
        for (limit, name) in
            [("Max open files", "limit, open files"), ("Max core file size", "limit, core file")]
        {
            rows.push(row(name, &|process| process.limits.get(limit).cloned().unwrap_or("unlimited".into())));
        }
        rows.push(row("cgroup", &|process| process.cgroup.join(" ")));
        if let Some(says) = &self.monitor_says {
            rows.push(vec!["landlock, it says".into(), says.landlock.clone().unwrap_or("none".into())]);
            for missing in &says.missing {
                rows.push(vec![format!("missing, {}", missing.layer), missing.why.clone()]);
            }
        }
        rows
    }
}

fn yes(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_as_it_is() {
        let _open = fs::File::open("/dev/null").unwrap();
        let seen = look(std::process::id().cast_signed()).unwrap();
        assert_eq!(seen.uids[1], rustix::process::geteuid().as_raw());
        assert!(seen.threads.iter().any(|thread| thread.tid == seen.pid) && seen.threads.len() >= 2);
        assert!(seen.namespaces["mnt"].id.starts_with("mnt:["));
        assert!(seen.mounts.iter().any(|mount| mount.point == "/"));
        assert!(seen.descriptors["/dev/null"] >= 1, "{:?}", seen.descriptors);
        assert!(seen.limits.contains_key("Max open files"), "{:?}", seen.limits);
        assert_eq!(seen.capabilities["bounding"].len(), 16);
        assert!(of_process(seen.pid).unwrap_err().to_string().contains("is a monitor"));
    }

    #[test]
    fn what_a_descriptor_is_of_is_told_by_its_link() {
        for (target, kind) in [
            ("anon_inode:[eventfd]", "eventfd"),
            ("anon_inode:kvm-vcpu:0", "kvm-vcpu:0"),
            ("socket:[123]", "socket"),
            ("pipe:[1]", "pipe"),
            ("/memfd:guest-memory (deleted)", "memfd"),
            ("/dev/kvm", "/dev/kvm"),
            ("/var/lib/a:b (deleted)", "/var/lib/a:b"),
        ] {
            assert_eq!(kind_of(target), kind);
        }
    }

    #[test]
    fn a_mount_and_a_limit_are_read() {
        let text =
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\nnonsense\n";
        let mounts = mounts(text);
        assert_eq!(mounts.len(), 1);
        let Mount { point, root, kind, options } = &mounts[0];
        assert_eq!((point.as_str(), root.as_str(), kind.as_str()), ("/mnt2", "/mnt1", "ext3"));
        assert_eq!(options, "rw,noatime");
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 4096                 files     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n";
        assert_eq!(limits(text), BTreeMap::from([("Max open files".into(), "1024 4096".into())]));
    }
}
