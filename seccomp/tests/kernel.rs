//! This machine's kernel takes what the compiler makes, and does as it says.

#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only test functions themselves")]

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use bulkhead_seccomp::{Profile, Program};

/// Runs a shell line under a filter.
fn under(profile: &Profile, line: &str) -> Output {
    let program = Program::compile(profile).unwrap().to_bytes();
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    let load = move || {
        let filter =
            libc::sock_fprog { len: (program.len() / 8) as u16, filter: program.as_ptr().cast_mut().cast() };
        // SAFETY: between fork and execve: two system calls, which only read `filter` and the program that it points to.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure allocates nothing and takes no lock.
    unsafe { command.pre_exec(load) };
    command.output().unwrap()
}

#[test]
fn the_default_profile_lets_programs_live_and_no_more() {
    let line =
        "echo $(cat /proc/self/status | grep Seccomp:); ls / >/dev/null && echo listed; unshare --user true";
    let output = under(&Profile::default_with(&[]), line);
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(said, "Seccomp: 2\nlisted\n", "{complained}");
    assert!(!output.status.success() && complained.contains("not permitted"), "{complained}");
}

#[test]
fn a_profile_from_a_file_binds() {
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;
    let output = under(&Profile::from_json(json, &[]).unwrap(), "mkdir /tmp/never");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not supported"), "{output:?}");
}
