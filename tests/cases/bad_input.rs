//! Whatever is wrong gives a clear error and a non-zero status at once, and leaves nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::initramfs;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::test;

use crate::BUSYBOX;

/// `bulkhead run --rm busybox true` with this artefact replaced.
fn with(host: &Host, variable: &str, file: &str) -> Result<Finished> {
    let run = host
        .bulkhead_program(["run", "--rm", "busybox", "true"])
        .env(variable, file)
        .run()?
        .status_is(125)?;
    ensure!(run.took < Duration::from_secs(70), "it took long to say so: {run}");
    ensure!(!run.stderr.is_empty(), "it says nothing: {run}");
    Ok(run)
}

test!(a_missing_kernel, BUSYBOX);
fn a_missing_kernel(host: &Host) -> Result<()> {
    with(host, "BULKHEAD_KERNEL", "/no/such/vmlinux")?.stderr_has("/no/such/vmlinux")?;
    with(host, "BULKHEAD_INITRAMFS", "/no/such/initramfs")?.stderr_has("/no/such/initramfs")?;
    with(host, "BULKHEAD_VMM", "/no/such/monitor")?.stderr_has("/no/such/monitor")?;
    Ok(())
}

test!(a_corrupt_kernel, BUSYBOX.deadline(60));
fn a_corrupt_kernel(host: &Host) -> Result<()> {
    let good = fs::read(host.kernel())?;
    let cut = host.file("cut", &good[..good.len() / 3])?.display().to_string();
    with(host, "BULKHEAD_KERNEL", &cut)?.stderr_has(&cut)?;
    let text = host.file("text", "this is not a kernel\n".repeat(500))?.display().to_string();
    with(host, "BULKHEAD_KERNEL", &text)?.stderr_has("kernel")?;
    let empty = host.file("empty", "")?.display().to_string();
    with(host, "BULKHEAD_KERNEL", &empty)?.stderr_has("kernel")?;
    // An ELF, but of a program.
    with(host, "BULKHEAD_KERNEL", "/usr/bin/busybox")?;
    // A kernel whose first instructions are rubbish: the crash is told.
    let mut broken = good.clone();
    if let Some(code) = broken.get_mut(0x20_0000..0x40_0000) {
        code.fill(0xff);
    }
    let broken = host.file("broken", &broken)?.display().to_string();
    with(host, "BULKHEAD_KERNEL", &broken)?;
    Ok(())
}

test!(an_agent_that_dies, BUSYBOX.deadline(60));
fn an_agent_that_dies(host: &Host) -> Result<()> {
    // The guest's first process ends at once, and Linux panics: any static program that is no agent.
    let mut archive = Vec::new();
    initramfs::write(&fs::read(host.monitor())?, &mut archive)?;
    let file = host.file("initramfs", &archive)?.display().to_string();
    with(host, "BULKHEAD_INITRAMFS", &file)?.stderr_has("panic")?;
    let rubbish = host.file("rubbish", "rubbish".repeat(1000))?.display().to_string();
    with(host, "BULKHEAD_INITRAMFS", &rubbish)?.stderr_has("panic")?;
    Ok(())
}

test!(an_agent_that_never_answers, BUSYBOX.deadline(120));
fn an_agent_that_never_answers(host: &Host) -> Result<()> {
    // busybox as the first process is an init that lives for ever and says nothing over vsock.
    let mut archive = Vec::new();
    initramfs::write(&fs::read("/usr/bin/busybox")?, &mut archive)?;
    let file = host.file("initramfs", &archive)?.display().to_string();
    with(host, "BULKHEAD_INITRAMFS", &file)?.stderr_has("agent")?;
    Ok(())
}

test!(an_image_that_is_not_there, BUSYBOX);
fn an_image_that_is_not_there(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--rm", "127.0.0.1:1/nothing", "true"])?.status_is(125)?.stderr_has("nothing")?;
    host.bulkhead(["run", "--rm", "Not A Name", "true"])?.status_is(125)?;
    Ok(())
}

test!(a_layer_that_was_damaged_later, BUSYBOX.deadline(60));
fn a_layer_that_was_damaged_later(host: &Host) -> Result<()> {
    let root = host.work().join("root").display().to_string();
    let file = host.image("busybox").display().to_string();
    host.bulkhead(["--root", &root, "image", "load", &file])?.ok()?;
    let layers = host.run(["find", &root, "-name", "*.erofs"])?.ok()?.stdout();
    for layer in layers.lines() {
        let mut permissions = fs::metadata(layer)?.permissions();
        permissions.set_mode(0o600);
        fs::set_permissions(layer, permissions)?;
        fs::write(layer, vec![0; 8192])?;
    }
    host.bulkhead(["--root", &root, "run", "--rm", "busybox", "true"])?.status_is(125)?;
    for layer in layers.lines() {
        fs::remove_file(layer)?;
    }
    host.bulkhead(["--root", &root, "run", "--rm", "busybox", "true"])?.status_is(125)?;
    Ok(())
}

test!(flags_that_make_no_sense, BUSYBOX);
fn flags_that_make_no_sense(host: &Host) -> Result<()> {
    let cases: [(&[&str], &str); 11] = [
        (&["--memory", "lots"], "lots"),
        (&["--memory", "1k"], "memory"),
        (&["--cpus=-1"], "cpus"),
        (&["--cpus", "many"], "many"),
        (&["--ulimit", "nothing=1"], "nothing"),
        (&["--cap-add", "FLY"], "FLY"),
        (&["--sysctl", "no-equals"], "no-equals"),
        (&["--tmpfs", "relative"], "relative"),
        (&["--env-file", "/no/such"], "/no/such"),
        (&["--pids-limit", "x"], "pids-limit"),
        (&["--name", "spaces are bad"], "name"),
    ];
    for (flags, word) in cases {
        let run = host.bulkhead_program(["run", "--rm"]).args(flags).args(["busybox", "true"]).run()?;
        run.status_is(125)?.stderr_has(word)?;
    }
    Ok(())
}

test!(memory_too_small_to_boot, BUSYBOX.deadline(60));
fn memory_too_small_to_boot(host: &Host) -> Result<()> {
    // It boots, for the guest gets what its kernel needs on top, or it is refused; it never hangs.
    let run = host.bulkhead(["run", "--rm", "--memory", "6m", "busybox", "true"])?;
    ensure!([0, 125, 137].contains(&run.status), "{run}");
    ensure!(run.status == 0 || !run.stderr.is_empty(), "it says nothing: {run}");
    Ok(())
}

/// Runs a shell line as nobody, or in a mount namespace.
fn without_kvm(host: &Host, line: &str) -> Result<Finished> {
    let root = host.work().join("without-kvm");
    fs::create_dir_all(&root)?;
    for dir in [host.work(), &root] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777))?;
    }
    let line = line.replace("ROOT", &root.display().to_string());
    let finished = Program::new(["sh", "-c", &line]).run()?;
    ensure!(finished.took < Duration::from_secs(5), "{finished}");
    Ok(finished)
}

test!(no_permission_on_kvm, BUSYBOX);
fn no_permission_on_kvm(host: &Host) -> Result<()> {
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    without_kvm(host, &format!("{nobody} bulkhead --root ROOT run --rm busybox true"))?
        .status_is(125)?
        .stderr_has("/dev/kvm")?
        .stderr_has("permi")?;
    without_kvm(host, &format!("{nobody} bulkhead --root ROOT doctor"))?.failed()?.stdout_has("/dev/kvm")?;
    Ok(())
}

test!(no_kvm_at_all, BUSYBOX);
fn no_kvm_at_all(host: &Host) -> Result<()> {
    let line =
        "unshare -m sh -c 'mount --bind /dev/null /dev/kvm; exec bulkhead --root ROOT run --rm busybox true'";
    without_kvm(host, line)?.status_is(125)?.stderr_has("kvm")?;
    let line =
        "unshare -m sh -c 'mount -t tmpfs dev /dev; mknod /dev/null c 1 3; exec bulkhead --root ROOT doctor'";
    without_kvm(host, line)?.failed()?.stdout_has("kvm")?;
    Ok(())
}

test!(a_damaged_record_does_not_stop_the_others, BUSYBOX.deadline(60));
fn a_damaged_record_does_not_stop_the_others(host: &Host) -> Result<()> {
    host.bulkhead(["run", "--name", "box", "busybox", "true"])?.ok()?;
    let records = host.run(["sh", "-c", "ls -d /var/lib/bulkhead/containers/*"])?.ok()?.stdout();
    for directory in records.lines() {
        for entry in fs::read_dir(directory)?.flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "json") {
                fs::write(entry.path(), "{ damaged")?;
            }
        }
    }
    host.bulkhead(["run", "--rm", "busybox", "echo", "fine"])?.ok()?.stdout_is("fine\n")?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}
