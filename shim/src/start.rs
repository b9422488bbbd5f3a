//! `start`: answers the address of the process that serves the container, which is started if it is not there yet.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::fs::FlockOperation;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::Flags;

/// Where shims of containerd's listen.
pub const SOCKETS: &str = "/run/containerd/s";
/// The descriptor on which the new process finds its socket.
pub const LISTENER: i32 = 3;
/// Annotations that name the pod of a container: containerd's CRI, CRI-O's.
const PODS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
/// Engines write some ten KiB.
const MAX_CONFIG: u64 = 8 << 20;

/// In the bundle, which is the working directory: prints the address.
///
/// # Errors
/// The bundle cannot be read, or the process not started.
pub fn start(flags: &Flags) -> Result<()> {
    let group = group(Path::new("config.json"))?.unwrap_or_else(|| flags.id.clone());
    let path = socket(&flags.address, &flags.namespace, &group);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(SOCKETS)
        .context("make the directory of sockets")?;
    // Two containers of one pod may come at once.
    let lock = File::open(SOCKETS).context("open the directory of sockets")?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).context("lock the directory of sockets")?;
    let address = format!("unix://{}", path.display());
    if UnixStream::connect(&path).is_err() {
        launch(flags, &path)?;
    }
    fs::write("address", &address).context("write the address into the bundle")?;
    std::io::stdout().write_all(address.as_bytes()).context("answer containerd")
}

/// The pod that a bundle is of, if it is of one.
fn group(config: &Path) -> Result<Option<String>> {
    let what = || format!("read {}", config.display());
    // By the sandbox API there is a bundle for the pod itself, in which nothing is yet.
    if !config.exists() && config.with_file_name("rootfs").is_dir() {
        return Ok(None);
    }
    let about = fs::metadata(config).with_context(what)?;
    ensure!(
        about.is_file() && about.len() <= MAX_CONFIG,
        "{}: it is no file, or too large",
        config.display()
    );
    let config: Value = serde_json::from_slice(&fs::read(config).with_context(what)?).with_context(what)?;
    let named = |key: &&str| config.get("annotations")?.get(*key)?.as_str().map(str::to_owned);
    Ok(PODS.iter().find_map(named))
}

fn socket(containerd: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Sha256::digest([containerd, namespace, group].join("\n"));
    let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(SOCKETS).join(name)
}

/// Starts the process that serves, with its socket: containerd can connect before it is up.
fn launch(flags: &Flags, path: &Path) -> Result<()> {
    // Of one that was killed.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    // containerd reads this fifo for as long as it lives, and need not have begun.
    let log = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("log");
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(&program);
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.map_or_else(|_| Stdio::null(), Stdio::from));
    let fd = listener.as_raw_fd();
    // SAFETY: one system call between fork and execve, on a descriptor that is open until the child has been started.
    unsafe {
        command.pre_exec(move || {
            let inherited =
                if fd == LISTENER { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, LISTENER) };
            if inherited < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        })
    };
    let child = command.spawn().with_context(|| format!("start {}", program.display()));
    let child = child.inspect_err(|_| drop(fs::remove_file(path)))?;
    // As containerd's own: containers are to be killed for memory before what looks after them.
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "-998");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_of_a_pod_have_one_socket() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let of = |text: &str| {
            fs::write(&file, text).unwrap();
            group(&file)
        };
        let pod = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
        assert_eq!(of(pod).unwrap().as_deref(), Some("pod"));
        assert_eq!(of("{}").unwrap(), None);
        assert!(of("{").is_err() && group(Path::new("/nowhere")).is_err());
        fs::remove_file(&file).unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        assert_eq!(group(&file).unwrap(), None);
        let path = |namespace: &str, group: &str| socket("/run/c.sock", namespace, group);
        assert_eq!(path("k8s.io", "pod"), path("k8s.io", "pod"));
        assert_ne!(path("k8s.io", "pod"), path("k8s", ".iopod"));
        // The kernel's limit on a socket's name.
        assert!(path("k8s.io", "pod").as_os_str().len() < 108);
    }
}
