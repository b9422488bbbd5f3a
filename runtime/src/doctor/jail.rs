//! What of the jail this host can give to a monitor that this user starts.

use std::io;

use super::{Check, Verdict};
use crate::Settings;
use crate::jail;
use crate::settings::Jail;

/// Tries each namespace in a child, and asks for the rest.
pub(super) fn check(settings: &Settings) -> Check {
    match jail::wish(&settings.isolation) {
        Err(error) => Check::bad("jail", Verdict::Failed, error.chain(), "correct or remove the variable"),
        Ok(Jail::Off) => Check::bad(
            "jail",
            Verdict::Warning,
            "it is off: a monitor keeps all rights of its caller",
            "set isolation.jail = \"on\" in the configuration file, and unset BULKHEAD_JAIL",
        ),
        Ok(wish) => {
            let missing = missing();
            if missing.is_empty() {
                return Check::ok("jail", "namespaces, system call filters and landlock can be had");
            }
            let verdict = if wish == Jail::Required { Verdict::Failed } else { Verdict::Warning };
            let found: Vec<_> = missing.iter().map(|(what, why, _)| format!("no {what} ({why})")).collect();
            let advice: Vec<_> = missing.iter().map(|(_, _, advice)| *advice).collect();
            Check::bad("jail", verdict, found.join("; "), advice.join("; "))
        }
    }
}

type Missing = (&'static str, String, &'static str);

fn missing() -> Vec<Missing> {
    let mut missing = Vec::new();
    let root = rustix::process::geteuid().is_root();
    let base = if root { 0 } else { libc::CLONE_NEWUSER };
    let users = "a user without rights needs namespaces of users: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone \
        and kernel.apparmor_restrict_unprivileged_userns decide about them";
    let rights = "this root may make none: a container of an engine must be given CAP_SYS_ADMIN, and a seccomp profile that \
        allows unshare";
    if let Err(error) = try_namespaces(base | libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWPID) {
        missing.push(("namespaces", error.to_string(), if root { rights } else { users }));
    }
    // SAFETY: asks whether an action is known, and reads its number.
    let filters = unsafe {
        let trap = libc::SECCOMP_RET_TRAP;
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const trap)
    };
    if filters != 0 {
        let advice = "the host's kernel needs CONFIG_SECCOMP_FILTER";
        missing.push(("system call filters", io::Error::last_os_error().to_string(), advice));
    }
    const VERSION: libc::c_int = 1;
    // SAFETY: with this flag nothing is read; the answer is the version.
    let landlock = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0, VERSION)
    };
    if landlock < 1 {
        let advice = "the host's kernel needs CONFIG_SECURITY_LANDLOCK, and landlock in lsm= of its command line; the jail holds \
            without it";
        missing.push(("landlock", io::Error::last_os_error().to_string(), advice));
    }
    missing
}

/// Makes namespaces in a child, which ends with them.
fn try_namespaces(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the child makes two system calls and ends by _exit.
    unsafe {
        match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let failed = libc::unshare(flags) != 0;
                libc::_exit(if failed { *libc::__errno_location() & 0xff } else { 0 })
            }
            child => {
                let mut status = 0;
                while libc::waitpid(child, &raw mut status, 0) < 0 {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
                match libc::WEXITSTATUS(status) {
                    0 if libc::WIFEXITED(status) => Ok(()),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }
}
