//! The processes of a group.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Kills all that are in the group `dir`, except those that are just being started: call it again while any is left.
pub fn kill(dir: &Path) {
    // v2 does it by itself, since Linux 5.14.
    let file = dir.join("cgroup.kill");
    if file.exists() && fs::write(file, "1").is_ok() {
        return;
    }
    for pid in list(dir) {
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // It may have ended since, and its number be another's: but the descriptor's process is one, and is in the group
        // if that still has the number.
        if list(dir).contains(&pid) {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    }
}

/// Those that this process can name: one of another pid namespace is listed as 0.
fn list(dir: &Path) -> Vec<Pid> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok().and_then(Pid::from_raw)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_the_list_are_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        fs::write(dir.path().join("cgroup.procs"), format!("0\n{}\n", child.id())).unwrap();
        kill(dir.path());
        let status = std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap());
        assert_eq!(status, Some(libc::SIGKILL));
    }
}
