//! The loopback of a container's network namespace, which engines connect to (`kubectl port-forward`, through CRI in
//! `cri_streams.rs`): with `bulkhead-oci` alone, to its end, and where the kernel does not allow BPF.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Finished;
use bulkhead_tests::test;

use crate::oci::{Bundle, NEEDS, pid_in};

const PATIENCE: Duration = Duration::from_secs(10);

/// The flag for [`without_bpf`].
pub const FLAG: &str = "--without-bpf";

/// Becomes another program, for which `bpf(2)` is forbidden.
pub fn without_bpf(words: impl IntoIterator<Item = OsString>) -> io::Error {
    let step =
        |code: u32, yes: u8, no: u8, k: u32| libc::sock_filter { code: code as u16, jt: yes, jf: no, k };
    let mut filter = [
        // The number of the system call is what it looks at first.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_bpf as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program points to its four instructions, alive during the call and only read.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if done != 0 {
        return io::Error::last_os_error();
    }
    let mut words = words.into_iter();
    Command::new(words.next().unwrap_or_default()).args(words).exec()
}

fn get(host: &Host) -> Result<Finished> {
    let get = ["ip", "netns", "exec", "loop", "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/f"];
    host.run(get)
}

test!(connections_to_its_loopback_go_to_the_guest_while_it_lives, NEEDS);
fn connections_to_its_loopback_go_to_the_guest_while_it_lives(host: &Host) -> Result<()> {
    host.run(["ip", "netns", "add", "loop"])?.ok()?;
    host.run(["ip", "-n", "loop", "link", "set", "lo", "up"])?.ok()?;
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.applets(&["httpd", "mkdir"])?;
    bundle.change(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"] = "/run/netns/loop".into();
            }
        }
    })?;
    bundle.runs("mkdir /www; echo inside >/www/f; exec httpd -f -p 127.0.0.1:8080 -h /www")?;
    let file = bundle.dir.join("pid").display().to_string();
    bundle.apart(&["run", "-d", "--pid-file", &file, "c1"])?;
    host.eventually("the server in the guest", PATIENCE, || Ok(get(host)?.stdout() == "inside\n"))?;
    // Whatever it dies of, nothing that takes connections is left in the namespace.
    host.run(["kill", "-KILL", &pid_in(bundle.dir.join("pid").as_path())?.to_string()])?.ok()?;
    bundle.wait_for(host, "c1", "stopped")?;
    host.eventually("the end", PATIENCE, || Ok(get(host)?.stderr().contains("Connection refused")))?;
    bundle.call(&["delete", "c1"])?.ok()?;

    // Without the right to such programs it works otherwise, and says what does not.
    let log = bundle.dir.join("log").display().to_string();
    let tests = std::env::current_exe()?.display().to_string();
    let wrapper = ["sh", "-c", "exec \"$@\" >out 2>err </dev/null", "sh", &tests, FLAG];
    bundle.wrapped(&wrapper, &["--log", &log, "run", "-d", "c1"]).run()?.ok()?;
    host.eventually("a warning", PATIENCE, || {
        let log = fs::read_to_string(&log).context("the log")?;
        Ok(log.contains("level=warning")
            && log.contains("Operation not permitted")
            && log.contains("port-forward"))
    })?;
    bundle.call(&["exec", "c1", "cat", "/www/f"])?.ok()?.stdout_is("inside\n")?;
    ensure!(get(host)?.stderr().contains("Connection refused"));
    bundle.call(&["delete", "--force", "c1"])?.ok()?;
    host.run(["ip", "netns", "delete", "loop"])?.ok()?;
    // `ip netns` makes it a mount of its own.
    host.run(["umount", "/run/netns"])?.ok()?;
    Ok(fs::remove_dir("/run/netns")?)
}
