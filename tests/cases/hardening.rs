//! What a container cannot do in its guest, and what the guest's own root cannot do to the agent and the host.

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Finished;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::{BUSYBOX, shell};

const PYTHON: Needs = Needs::images(Needs::bulkhead(), &["busybox", "python"]);

/// Names of errors by system call: `call(name, number, arguments…)` prints `name ok` or `name EPERM`.
const CALLS: &str = "
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(name, number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args])
    print(name, 'ok' if result >= 0 else errno.errorcode[ctypes.get_errno()])
def vsock(name, work):
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as s:
            s.settimeout(5)
            work(s)
            print(name, 'ok')
    except OSError as e:
        print(name, errno.errorcode[e.errno] if e.errno else type(e).__name__)
";

fn python(host: &Host, flags: &[&str], script: &str) -> Result<Finished> {
    let script = format!("{CALLS}{script}");
    host.bulkhead_program(["run", "--rm"]).args(flags).args(["python", "python3", "-c", &script]).run()
}

test!(system_calls_are_dockers_by_default, PYTHON.deadline(180));
fn system_calls_are_dockers_by_default(host: &Host) -> Result<()> {
    let script = "
print(open('/proc/self/status').read().split('Seccomp:')[1].split()[0])
call('unshare', 272, 0x20000)
call('mount', 165, 0, 0, 0, 0, 0)
call('keyctl', 250, 0, 0)
call('io_uring_setup', 425, 1, 0)
call('userfaultfd', 323, 0)
call('bpf', 321, 0, 0, 0)
call('perf_event_open', 298, 0, 0, 0, 0, 0)
call('clone3', 435, 0, 0)
call('clone with a namespace', 56, 0x10000000 | 17, 0, 0, 0, 0)
call('personality?', 135, 0xffffffff)
call('no randomisation', 135, 0x40000)
call('far in the future', 999)
call('x32 getpid', 0x40000000 + 39)
call('ptrace', 101, 0x4206, 1, 0, 0)
vsock('vsock', lambda s: None)
";
    let refused = "unshare EPERM\nmount EPERM\nkeyctl EPERM\nio_uring_setup EPERM\nuserfaultfd EPERM\nbpf EPERM\n\
        perf_event_open EPERM\nclone3 ENOSYS\nclone with a namespace EPERM\npersonality? ok\nno randomisation EPERM\n\
        far in the future ENOSYS\nx32 getpid ENOSYS\nptrace EPERM\nvsock EPERM\n";
    python(host, &[], script)?.ok()?.stdout_is(&format!("2\n{refused}"))?;
    // As somebody else, whose filter is set before the rights are given up.
    python(host, &["-u", "1000", "--security-opt", "no-new-privileges"], script)?
        .ok()?
        .stdout_has("unshare EPERM\n")?;
    let with_admin = python(host, &["--cap-add", "SYS_ADMIN"], script)?.ok()?;
    with_admin.stdout_has("2\nunshare ok\nmount EFAULT\nkeyctl EPERM\n")?.stdout_has("vsock EPERM")?;
    let unconfined = python(host, &["--security-opt", "seccomp=unconfined"], script)?.ok()?;
    unconfined
        .stdout_has("0\nunshare EPERM\n")?
        .stdout_has("no randomisation ok\n")?
        .stdout_has("vsock ok\n")?;
    // One's own profile, docker's way of writing it. What it does not know is refused in its own way.
    let profile = host.file(
        "profile.json",
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []}],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
                         {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_CHOWN"]}}]}"#,
    )?;
    let option = format!("seccomp={}", profile.display());
    let flags = ["--security-opt", &option];
    shell(host, &flags, "mkdir /tmp/x; mkdir -p /run/y; rmdir /opt/nothing")?
        .failed()?
        .stderr_has("Operation not supported")?
        .stderr_has("No such file")?;
    for (bad, words) in [
        ("seccomp=/no/such", "cannot read the profile"),
        ("seccomp=/etc/passwd", "no seccomp profile"),
        ("apparmor=x", "no such security module"),
        ("fly=1", "--security-opt fly=1"),
    ] {
        shell(host, &["--security-opt", bad], "true")?.failed()?.stderr_has(words)?;
    }
    Ok(())
}

test!(exec_is_bound_as_its_container_is, BUSYBOX.deadline(60));
fn exec_is_bound_as_its_container_is(host: &Host) -> Result<()> {
    let lines = "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status";
    let run =
        ["run", "-d", "--name", "box", "--security-opt", "no-new-privileges", "busybox", "sleep", "1000"];
    host.bulkhead(run)?.ok()?;
    for flags in [&[][..], &["-u", "1000"], &["--privileged"]] {
        host.bulkhead_program(["exec"])
            .args(flags)
            .args(["box", "sh", "-c", lines])
            .run()?
            .ok()?
            .stdout_is("NoNewPrivs:\t1\nSeccomp:\t2\n")?;
    }
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(privileged_has_its_guest_to_itself, BUSYBOX.deadline(90));
fn privileged_has_its_guest_to_itself(host: &Host) -> Result<()> {
    let script = "mount -t tmpfs t /tmp && touch /tmp/f && umount /tmp && echo mounted
        echo 5 >/proc/sys/vm/swappiness && echo written; mkdir /sys/fs/cgroup/below && echo cgroup
        test -c /dev/kmsg && test -c /dev/net/tun && test -c /dev/fuse && echo devices
        mount -o remount,rw /sys && echo sys; ls /sys/firmware >/dev/null && echo shown
        grep -E '^(CapEff|Seccomp):' /proc/self/status";
    shell(host, &["--privileged"], script)?.ok()?.stdout_is(
        "mounted\nwritten\ncgroup\ndevices\nsys\nshown\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n",
    )?;
    // Without, all of it is refused, and what docker masks is masked.
    let script = "echo 5 >/proc/sys/vm/swappiness; echo 1 >/sys/kernel/mm/ksm/run; mkdir /sys/fs/cgroup/x; ls /dev/kmsg;
        cat /proc/keys /proc/timer_list /proc/kcore | wc -c; echo h >/proc/sysrq-trigger; dmesg | wc -l; ls /sys/firmware | wc -l";
    shell(host, &[], script)?
        .ok()?
        .stdout_is("0\n0\n0\n")?
        .stderr_has("dmesg: klogctl: Operation not permitted")?;
    let shown = ["--security-opt", "systempaths=unconfined"];
    shell(host, &shown, "cat /proc/timer_list | wc -l; echo 60 >/proc/sys/vm/swappiness")?
        .ok()?
        .stdout_lacks("^0\n")?;
    Ok(())
}

test!(the_guests_kernel_is_hardened, BUSYBOX.deadline(60));
fn the_guests_kernel_is_hardened(host: &Host) -> Result<()> {
    let script = "cd /proc/sys; cat fs/protected_symlinks fs/protected_hardlinks fs/protected_fifos fs/protected_regular \
        kernel/dmesg_restrict kernel/kptr_restrict kernel/unprivileged_bpf_disabled kernel/panic_on_oops kernel/randomize_va_space \
        vm/unprivileged_userfaultfd kernel/perf_event_paranoid kernel/sysrq | tr '\\n' ' '; \
        ls /dev/mem /dev/kmem /dev/port /proc/kcore /proc/modules 2>/dev/null; cat /proc/cmdline | grep -c mitigations=; \
        head -3 /proc/kallsyms | cut -d' ' -f1 | sort -u; grep -h -c Vulnerable /sys/devices/system/cpu/vulnerabilities/*";
    let seen = shell(host, &["--security-opt", "systempaths=unconfined"], script)?.stdout();
    println!("{seen}");
    ensure!(seen.starts_with("1 1 1 1 1 1 2 1 2 0 2 0 "), "{seen}");
    Ok(())
}

test!(nobody_but_the_agent_is_the_agent, PYTHON.deadline(180));
fn nobody_but_the_agent_is_the_agent(host: &Host) -> Result<()> {
    // The container's root, with every capability and no filter, as an attacker who has taken over all but the kernel.
    let script = "
for cid in 1, 2, 3, 0xffffffff:
    for port in 1024, 1025, 1026, 1, 5000:
        vsock(f'connect {cid}:{port}', lambda s: s.connect((cid, port)))
for cid in 1, 3, 0xffffffff:
    for port in 1024, 1025:
        vsock(f'bind {cid}:{port}', lambda s: s.bind((cid, port)))
def flood(s):
    held = []
    for n in range(3000):
        t = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        t.settimeout(5)
        try: t.connect((2, 1024))
        except OSError: pass
        held.append(t)
vsock('flood', flood)
try: open('/proc/1/exe', 'ab'); print('agent open')
except OSError: pass
";
    let flags = ["--privileged", "--ulimit", "nofile=4000", "--name", "box"];
    let tried = python(host, &flags, script)?.ok()?;
    let lines: Vec<_> = tried.stdout().lines().map(str::to_owned).collect();
    ensure!(lines.iter().filter(|line| line.ends_with(" ok")).eq(["flood ok"].iter()), "{tried}");
    ensure!(
        lines.iter().filter(|line| line.starts_with("bind") && line.ends_with("EADDRINUSE")).count() >= 2,
        "{tried}"
    );
    // The agent still is who the host talks to, while the container tries.
    let script = format!("{CALLS}{script}\nimport time; print('tried', flush=True); time.sleep(1000)");
    let run =
        ["run", "-d", "--name", "busy", "--privileged", "--ulimit", "nofile=4000", "python", "python3", "-c"];
    host.bulkhead_program(run).args([script.as_str()]).run()?.ok()?;
    host.eventually("it has tried", std::time::Duration::from_secs(60), || {
        Ok(host.bulkhead(["logs", "busy"])?.stdout().contains("tried"))
    })?;
    host.bulkhead(["exec", "busy", "echo", "alive"])?.ok()?.stdout_is("alive\n")?;
    host.bulkhead(["rm", "-f", "busy"])?.ok()?;
    Ok(())
}
