//! Directories and files of the host in a container (`-v`, `--mount`), by virtio-fs.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Finished;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use rustix::process::{Pid, Signal, kill_process};

use crate::{BUSYBOX, shell};

const PYTHON: Needs = Needs::images(Needs::bulkhead(), &["python"]);

/// A directory of the test, and `-v` for it on /data.
fn directory(host: &Host, name: &str, options: &str) -> Result<(PathBuf, String)> {
    let path = host.work().join(name);
    fs::create_dir_all(&path)?;
    let volume = format!("{}:/data{options}", path.display());
    Ok((path, volume))
}

/// The processes of the host that have `word` in their command line. They are not the test's descendants any more.
fn processes(word: &str) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if let (true, Ok(pid)) = (command.contains(word), entry.file_name().to_string_lossy().parse()) {
            found.extend(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

/// The only such process.
fn process(word: &str) -> Result<Pid> {
    let found = processes(word)?;
    ensure!(found.len() == 1, "not one {word} but {found:?}");
    Ok(found[0])
}

const SERVER: &str = "--shared-dir=";
const SLEEPER: &str = "echo started; while :; do sleep 0.1; done";

fn start(host: &Host, volume: &str, script: &str) -> Result<()> {
    let run = ["run", "-d", "--name", "box", "-v", volume, "busybox", "sh", "-c", script];
    host.bulkhead(run)?.ok()?;
    Ok(())
}

fn exec(host: &Host, script: &str) -> Result<Finished> {
    host.bulkhead(["exec", "box", "sh", "-c", script])
}

test!(a_directory_is_shared_both_ways, BUSYBOX.deadline(60));
fn a_directory_is_shared_both_ways(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    fs::write(path.join("in"), "from the host\n")?;
    let script = "cat /data/in; echo from the guest >/data/out; mkdir -p /data/a/b; mkfifo /data/fifo; \
        touch /data/owned; chown 1234:5678 /data/owned; chmod 4751 /data/owned; rm /data/in";
    shell(host, &["-v", &volume], script)?.ok()?.stdout_is("from the host\n")?;
    ensure!(fs::read_to_string(path.join("out"))? == "from the guest\n");
    let owned = fs::metadata(path.join("owned"))?;
    ensure!((owned.uid(), owned.gid(), owned.mode() & 0o7777) == (1234, 5678, 0o4751), "{owned:?}");
    ensure!(path.join("a/b").is_dir() && !path.join("in").exists());
    ensure!(fs::metadata(path.join("fifo"))?.file_type().is_fifo());
    Ok(())
}

test!(a_user_writes_as_itself_and_only_where_it_may, BUSYBOX.deadline(60));
fn a_user_writes_as_itself_and_only_where_it_may(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))?;
    fs::write(path.join("secret"), "secret")?;
    fs::set_permissions(path.join("secret"), fs::Permissions::from_mode(0o600))?;
    let script = "echo x >/data/mine; cat /data/secret; echo y >>/data/secret; rm -f /data/secret; stat -c %u:%g /data/mine";
    let user = ["-v", &volume, "-u", "1000:1000"];
    shell(host, &user, script)?.ok()?.stdout_is("1000:1000\n")?.stderr_has("denied")?;
    ensure!(fs::read_to_string(path.join("secret"))? == "secret");
    let mine = fs::metadata(path.join("mine"))?;
    ensure!((mine.uid(), mine.gid()) == (1000, 1000));
    Ok(())
}

test!(read_only_is_the_hosts_word, BUSYBOX.deadline(60));
fn read_only_is_the_hosts_word(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", ":ro")?;
    fs::write(path.join("file"), "as it was\n")?;
    let try_all = "echo x >/data/file; touch /data/new; rm /data/file; mkdir /data/d; chmod 777 /data/file; \
        mv /data/file /data/moved; ln /data/file /data/link; cat /data/file";
    let refused = |finished: Finished| -> Result<()> {
        finished.ok()?.stdout_is("as it was\n")?.stderr_has("Read-only file system")?;
        ensure!(fs::read_to_string(path.join("file"))? == "as it was\n");
        ensure!(fs::read_dir(&path)?.count() == 1, "something was made in {}", path.display());
        Ok(())
    };
    refused(shell(host, &["-v", &volume], try_all)?)?;
    // The guest's own flag is only for show: its root can take it away, and it makes no difference.
    let remount =
        format!("mount -o remount,bind,rw /data && grep -q '/data .* rw' /proc/mounts || exit 9; {try_all}");
    refused(shell(host, &["-v", &volume, "--cap-add", "SYS_ADMIN"], &remount)?)?;
    Ok(())
}

test!(what_is_mounted_below_comes_along_and_is_read_only_too, BUSYBOX.deadline(60));
fn what_is_mounted_below_comes_along_and_is_read_only_too(host: &Host) -> Result<()> {
    let disk = host.small_disk(256)?;
    fs::write(disk.path().join("below"), "below\n")?;
    let whole = format!("{}:/data", host.work().display());
    let script = "cat /data/small-disk/below; echo x >/data/small-disk/written && echo written; \
        test $(stat -c %d /data) != $(stat -c %d /data/small-disk)";
    shell(host, &["-v", &whole], script)?.ok()?.stdout_is("below\nwritten\n")?;
    fs::remove_file(disk.path().join("written"))?;
    shell(host, &["-v", &format!("{whole}:ro")], script)?.stdout_is("below\n")?.stderr_has("Read-only")?;
    ensure!(!disk.path().join("written").exists());
    Ok(())
}

test!(a_single_file_can_be_shared, BUSYBOX.deadline(60));
fn a_single_file_can_be_shared(host: &Host) -> Result<()> {
    let file = host.file("one", "line\n")?;
    let hosts = host.file("hosts", "10.0.0.1 other\n")?;
    let flags = [
        "-v",
        &format!("{}:/new/place", file.display()),
        "-v",
        &format!("{}:/etc/hosts:ro", hosts.display()),
        "-v",
        &format!("{}:/etc/readonly:ro", file.display()),
    ];
    let script = "cat /new/place /etc/hosts; echo more >>/new/place; echo x >>/etc/readonly; ls -A /new";
    shell(host, &flags, script)?.ok()?.stdout_is("line\n10.0.0.1 other\nplace\n")?.stderr_has("Read-only")?;
    ensure!(fs::read_to_string(&file)? == "line\nmore\n");
    ensure!(
        fs::read_to_string(&hosts)? == "10.0.0.1 other\n",
        "our own /etc/hosts went into the person's file"
    );
    Ok(())
}

test!(files_behave_as_files, BUSYBOX.deadline(60));
fn files_behave_as_files(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    let script = "set -e; cd /data; echo 1 >a; ln a b; test $(stat -c %h a) = 2; test $(stat -c %i a) = $(stat -c %i b); \
        echo 2 >>b; cat a; mv a c; test ! -e a; cat c; mkdir d; mv c d/c; ln -s d/c link; cat link; \
        exec 3<>b; rm b d/c; echo 3 >&3; test $(stat -Lc %h /proc/self/fd/3) = 0; exec 3>&-; \
        dd if=/dev/zero of=synced bs=64k count=4 conv=fsync 2>/dev/null; sync; truncate -s 100 synced; \
        touch -d '2001-02-03 04:05:06' synced; stat -c %Y synced; rmdir d; ls -A";
    shell(host, &["-v", &volume], script)?.ok()?.stdout_is("1\n2\n1\n2\n1\n2\n981173106\nlink\nsynced\n")?;
    let synced = fs::metadata(path.join("synced"))?;
    ensure!(synced.len() == 100 && synced.mtime() == 981_173_106);
    ensure!(fs::read_link(path.join("link"))? == Path::new("d/c"));
    Ok(())
}

test!(mappings_locks_and_attributes_work, PYTHON.deadline(120));
fn mappings_locks_and_attributes_work(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    fs::write(path.join("mapped"), [b'.'; 10_000])?;
    let script = "
import mmap, os, fcntl
f = open('/data/mapped', 'r+b')
m = mmap.mmap(f.fileno(), 0)
assert m[:3] == b'...'
m[5000:5005] = b'guest'
m.flush()
m[0:5] = b'later'
f2 = open('/data/mapped', 'rb'); f2.seek(5000); assert f2.read(5) == b'guest'
fcntl.flock(f, fcntl.LOCK_EX)
fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
cap = bytes.fromhex('0100000200040000000000000000000000000000')
os.setxattr('/data/mapped', 'security.capability', cap)
assert os.getxattr('/data/mapped', 'security.capability') == cap
assert 'security.capability' in os.listxattr('/data/mapped')
os.posix_fallocate(os.open('/data/big', os.O_CREAT | os.O_RDWR), 0, 1 << 20)
fd = os.open('/data/t', os.O_CREAT | os.O_RDWR)
os.pwrite(fd, b'x', 1 << 33); os.ftruncate(fd, 0); os.fsync(fd)
print(os.statvfs('/data').f_blocks > 0, sorted(os.listdir('/data')))
";
    host.bulkhead(["run", "--rm", "-v", &volume, "python", "python3", "-c", script])?
        .ok()?
        .stdout_is("True ['big', 'mapped', 't']\n")?;
    let mapped = fs::read(path.join("mapped"))?;
    ensure!(&mapped[5000..5005] == b"guest" && &mapped[..5] == b"later");
    let mut value = [0; 256];
    ensure!(rustix::fs::getxattr(path.join("mapped"), "security.capability", &mut value)? == 20);
    ensure!(fs::metadata(path.join("big"))?.len() == 1 << 20);
    Ok(())
}

test!(links_lead_nowhere_else, BUSYBOX.deadline(60));
fn links_lead_nowhere_else(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    let secret = host.file("secret", "the host's\n")?;
    symlink(&secret, path.join("absolute"))?;
    symlink("../secret", path.join("relative"))?;
    symlink("/", path.join("root"))?;
    symlink("../../../../../../../..", path.join("up"))?;
    // Links mean what they mean in the container, also for where something is mounted.
    let (other, _) = directory(host, "other", "")?;
    fs::write(other.join("here"), "other\n")?;
    let below = format!("{}:/data/root/made-through-a-link", other.display());
    let script = "cat /data/absolute /data/relative; ls /data/up/ | grep -c made-through; cat /made-through-a-link/here; \
        ls -d /data/up/data/up/work 2>/dev/null; cd /data; cat ../secret";
    let finished = shell(host, &["-v", &volume, "-v", &below], script)?;
    finished.failed()?.stdout_is("1\nother\n")?;
    ensure!(!Path::new("/made-through-a-link").exists(), "a directory was made on the host");
    ensure!(fs::read_to_string(secret)? == "the host's\n");
    Ok(())
}

test!(ten_megabytes_arrive_intact, BUSYBOX.deadline(120));
fn ten_megabytes_arrive_intact(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    let bytes: Vec<u8> = (0..10_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(path.join("in"), &bytes)?;
    let script = "cp /data/in /tmp/copy && cat /tmp/copy >/data/out && cmp /data/in /data/out && dd if=/data/in of=/data/blocks bs=4k 2>/dev/null";
    shell(host, &["-v", &volume], script)?.ok()?;
    ensure!(fs::read(path.join("out"))? == bytes && fs::read(path.join("blocks"))? == bytes, "bytes differ");
    Ok(())
}

test!(a_thousand_files, BUSYBOX.deadline(120));
fn a_thousand_files(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    for i in 0..1000 {
        fs::write(path.join(format!("h{i}")), i.to_string())?;
    }
    let script = "cd /data; ls | wc -l; cat h* | wc -c; i=0; while [ $i -lt 1000 ]; do echo $i >g$i; i=$((i+1)); done; ls | wc -l; rm h*";
    shell(host, &["-v", &volume], script)?.ok()?.stdout_is("1000\n2890\n2000\n")?;
    ensure!(fs::read_dir(&path)?.count() == 1000);
    ensure!(fs::read_to_string(path.join("g999"))? == "999\n");
    Ok(())
}

test!(the_hosts_changes_are_seen, BUSYBOX.deadline(60));
fn the_hosts_changes_are_seen(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    fs::write(path.join("file"), "before\n")?;
    start(host, &volume, SLEEPER)?;
    exec(host, "cat /data/file; ls /data")?.ok()?.stdout_is("before\nfile\n")?;
    fs::write(path.join("file"), "after, and longer\n")?;
    fs::write(path.join("new"), "new\n")?;
    // Names and attributes are cached for a second.
    host.eventually("the guest sees what the host did", Duration::from_secs(5), || {
        Ok(exec(host, "cat /data/file /data/new")?.stdout() == "after, and longer\nnew\n")
    })?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(many_shares_need_one_server, BUSYBOX.deadline(60));
fn many_shares_need_one_server(host: &Host) -> Result<()> {
    let mut flags = Vec::new();
    for i in 0..20 {
        let file = host.file(&format!("many/d{i}/file"), format!("{i}\n"))?;
        let source = if i % 2 == 0 { file.as_path() } else { file.parent().context("no parent")? };
        flags.extend(["-v".to_owned(), format!("{}:/many/{i}:ro", source.display())]);
    }
    host.bulkhead_program(["run", "-d", "--name", "box"])
        .args(&flags)
        .args(["busybox", "sh", "-c", SLEEPER])
        .run()?
        .ok()?;
    process(SERVER)?;
    let seen = exec(
        host,
        "for i in $(seq 0 2 18); do cat /many/$i; done; for i in $(seq 1 2 19); do cat /many/$i/file; done",
    )?;
    ensure!(seen.ok()?.stdout().lines().count() == 20);
    // Nothing of it is in the host's own mount table.
    ensure!(
        !fs::read_to_string("/proc/self/mounts")?.contains("/shares"),
        "mounts of a sandbox are the host's"
    );
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}

test!(a_killed_server_ends_the_container_and_says_so, BUSYBOX.deadline(60));
fn a_killed_server_ends_the_container_and_says_so(host: &Host) -> Result<()> {
    let (_, volume) = directory(host, "dir", "")?;
    for script in [SLEEPER, "while :; do date >/data/x; cat /data/x >/dev/null; done"] {
        start(host, &volume, script)?;
        kill_process(process(SERVER)?, Signal::KILL)?;
        let wait = host.bulkhead(["wait", "box"])?.ok()?.stdout_is("137\n")?;
        ensure!(wait.took < Duration::from_secs(5), "{wait}");
        host.bulkhead(["inspect", "box"])?.ok()?.stdout_has("shared file system")?.stdout_has("is lost")?;
        host.bulkhead(["rm", "box"])?.ok()?;
    }
    Ok(())
}

test!(a_server_that_cannot_start_is_named, BUSYBOX.deadline(60));
fn a_server_that_cannot_start_is_named(host: &Host) -> Result<()> {
    let (_, volume) = directory(host, "dir", "")?;
    let with = |program: &str| {
        let words = ["run", "--rm", "-v", &volume, "busybox", "true"];
        host.bulkhead_program(words).env("BULKHEAD_VIRTIOFSD", program).run()
    };
    with("/no/such")?.status_is(125)?.stderr_has("BULKHEAD_VIRTIOFSD")?;
    let broken = host.file("broken", "#!/bin/sh\necho it is broken >&2\nexit 1\n")?;
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755))?;
    with(&broken.display().to_string())?.status_is(125)?.stderr_has("it is broken")?;
    // Without PATH it is still found where distributions have it; without any of it the package is named.
    shell(host, &["-v", &volume], "true")?.ok()?;
    Ok(())
}

test!(whatever_is_killed_nothing_stays, BUSYBOX.deadline(90));
fn whatever_is_killed_nothing_stays(host: &Host) -> Result<()> {
    let (_, volume) = directory(host, "dir", "")?;
    for victim in ["bulkhead-vmm", "bulkhead run"] {
        start(host, &volume, SLEEPER)?;
        kill_process(process(victim)?, Signal::KILL)?;
        host.eventually("everything has ended", Duration::from_secs(5), || {
            Ok(processes(SERVER)?.is_empty() && processes("bulkhead-vmm")?.is_empty())
        })?;
        host.bulkhead(["rm", "-f", "box"])?.ok()?;
    }
    // That nothing else is left is what the framework looks for.
    Ok(())
}

test!(wishes_are_dockers, BUSYBOX.deadline(90));
fn wishes_are_dockers(host: &Host) -> Result<()> {
    let run = |flags: &[&str], script: &str| {
        host.bulkhead_program(["run", "--rm"])
            .args(flags)
            .args(["busybox", "sh", "-c", script])
            .dir(host.work())
            .run()
    };
    let made = host.work().join("made/deep");
    run(&["-v", &format!("{}:/x", made.display())], "echo 1 >/x/f")?.ok()?;
    ensure!(fs::read_to_string(made.join("f"))? == "1\n");
    run(&["-v", "./relative:/x"], "echo 2 >/x/f")?.ok()?;
    ensure!(fs::read_to_string(host.work().join("relative/f"))? == "2\n");
    let mount = format!("type=bind,source={},target=/x,readonly", made.display());
    run(&["--mount", &mount, "--mount", "type=tmpfs,target=/x/f2"], "cat /x/f")?.failed()?;
    run(
        &["--mount", &mount, "--mount", "type=tmpfs,target=/t,tmpfs-size=1m"],
        "cat /x/f; df -k /t | tail -1 | awk '{print $2}'",
    )?
    .ok()?
    .stdout_is("1\n1024\n")?;
    // Deeper ones later, in whatever order.
    let (inner, outer) = (host.file("inner/i", "inner\n")?, host.file("outer/o", "outer\n")?);
    let volume = |file: &Path, to: &str| format!("{}:{to}", file.parent().unwrap_or(file).display());
    run(&["-v", &volume(&inner, "/a/b"), "-v", &volume(&outer, "/a")], "cat /a/o /a/b/i")?
        .ok()?
        .stdout_is("outer\ninner\n")?;
    for (flags, words) in [
        (["-v", "name:/x"], "named volume"),
        (["-v", "/x"], "anonymous"),
        (["-v", "/tmp:x"], "not absolute"),
        (["-v", "/tmp:/x:rshared"], "kernel"),
        (["--mount", "type=bind,source=/no/such,target=/x"], "does not exist: /no/such"),
        (["--mount", "type=volume,source=v,target=/x"], "volume"),
    ] {
        run(&flags, "true")?.status_is(125)?.stderr_has(words)?;
    }
    run(&["-v", "/tmp:/x", "-v", "/run:/x/"], "true")?
        .status_is(125)?
        .stderr_has("duplicate mount point: /x")?;
    Ok(())
}

test!(figures_of_shares, BUSYBOX.deadline(120).shows_output());
fn figures_of_shares(host: &Host) -> Result<()> {
    let (path, volume) = directory(host, "dir", "")?;
    let middle = |flags: &[&str]| -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..6 {
            times.push(shell(host, flags, "true")?.ok()?.took);
        }
        times.sort();
        Ok(times[3].as_secs_f64() * 1e3)
    };
    let (without, with) = (middle(&[])?, middle(&["-v", &volume])?);
    println!("run true: {without:.0} ms, with a shared directory {with:.0} ms");
    start(host, &volume, SLEEPER)?;
    let status = |name: &str, word: &str| -> Result<String> {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process(word)?.as_raw_nonzero()))?;
        Ok(rollup.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned())
    };
    for name in ["Pss_Anon:", "Pss_File:", "Pss_Shmem:", "Private_Dirty:"] {
        println!("virtiofsd {}; monitor {}", status(name, SERVER)?, status(name, "bulkhead-vmm")?);
    }
    fs::write(path.join("big"), vec![1; 16 << 20])?;
    for script in [
        "dd if=/data/big of=/dev/null bs=1M",
        "dd if=/dev/zero of=/data/out bs=1M count=16",
        "dd if=/dev/zero of=/data/out bs=4k count=256",
        "i=0; while [ $i -lt 100 ]; do : >/data/f$i; i=$((i+1)); done",
        "ls -l /data >/dev/null",
    ] {
        println!("{:.0} ms: {script}", exec(host, script)?.ok()?.took.as_secs_f64() * 1e3);
    }
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    Ok(())
}
