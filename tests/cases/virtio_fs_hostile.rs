//! What a guest whose root is an attacker's makes of the host's files: nothing that lies outside what it was given.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

use crate::BUSYBOX;

const PYTHON: Needs = Needs::images(Needs::bulkhead(), &["busybox", "python"]);

/// Every way of changing something that a file system has, through the directory `/ro` and its file `file`.
const CHANGES: &str = "
import ctypes, errno, os, struct, fcntl
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, work):
    try:
        work()
        print(name, 'DONE')
    except OSError as e:
        print(name, errno.errorcode[e.errno])
os.system('mount -o remount,bind,rw /ro 2>/dev/null')
attempt('open', lambda: os.open('/ro/file', os.O_WRONLY))
attempt('append', lambda: os.open('/ro/file', os.O_WRONLY | os.O_APPEND))
attempt('read and truncate', lambda: os.open('/ro/file', os.O_RDONLY | os.O_TRUNC))
attempt('truncate', lambda: os.truncate('/ro/file', 0))
attempt('create', lambda: os.open('/ro/new', os.O_CREAT | os.O_WRONLY))
attempt('tmpfile', lambda: os.open('/ro', os.O_TMPFILE | os.O_RDWR))
attempt('mknod', lambda: os.mknod('/ro/disk', 0o60666, os.makedev(8, 0)))
attempt('fifo', lambda: os.mkfifo('/ro/fifo'))
attempt('mkdir', lambda: os.mkdir('/ro/d'))
attempt('symlink', lambda: os.symlink('/', '/ro/l'))
attempt('link', lambda: os.link('/ro/file', '/ro/link'))
attempt('link to another share', lambda: os.link('/ro/file', '/rw/link'))
attempt('link from another share', lambda: os.link('/rw/own', '/ro/own'))
attempt('rename', lambda: os.rename('/ro/file', '/ro/moved'))
attempt('rename to another share', lambda: os.rename('/ro/file', '/rw/moved'))
attempt('unlink', lambda: os.unlink('/ro/file'))
attempt('chmod', lambda: os.chmod('/ro/file', 0o777))
attempt('chown', lambda: os.chown('/ro/file', 1, 1))
attempt('utime', lambda: os.utime('/ro/file', (1, 1)))
attempt('setxattr', lambda: os.setxattr('/ro/file', 'user.x', b'x'))
attempt('removexattr', lambda: os.removexattr('/ro/file', 'user.kept'))
fd = os.open('/ro/file', os.O_RDONLY)
attempt('chmod by descriptor', lambda: os.fchmod(fd, 0o777))
attempt('fallocate', lambda: os.posix_fallocate(fd, 0, 1))
attempt('write', lambda: os.write(fd, b'x'))
attempt('flags', lambda: fcntl.ioctl(fd, 0x40086602, struct.pack('l', 0x10)))
attempt('by way of /proc', lambda: os.open(f'/proc/self/fd/{fd}', os.O_WRONLY))
";

test!(a_read_only_share_withstands_root, PYTHON.deadline(120));
fn a_read_only_share_withstands_root(host: &Host) -> Result<()> {
    // Both on one file system of the host, so that only mounts stand between them.
    let (ro, rw) = (host.work().join("ro"), host.work().join("rw"));
    fs::create_dir_all(&ro)?;
    fs::create_dir_all(&rw)?;
    fs::write(ro.join("file"), "as it was\n")?;
    fs::write(rw.join("own"), "own\n")?;
    let before = fs::metadata(ro.join("file"))?;
    let volumes = [format!("{}:/ro:ro", ro.display()), format!("{}:/rw", rw.display())];
    let tried = host
        .bulkhead_program(["run", "--rm", "--privileged", "-v", &volumes[0], "-v", &volumes[1]])
        .args(["python", "python3", "-c", CHANGES])
        .run()?
        .ok()?;
    ensure!(!tried.stdout().contains("DONE") && tried.stdout().lines().count() == 26, "{tried}");
    let after = fs::metadata(ro.join("file"))?;
    ensure!(fs::read_to_string(ro.join("file"))? == "as it was\n");
    let same = before.permissions() == after.permissions() && before.modified()? == after.modified()?;
    ensure!(
        same && fs::read_dir(&ro)?.count() == 1 && fs::read_dir(&rw)?.count() == 1,
        "something has changed"
    );
    Ok(())
}

test!(what_the_host_moves_and_replaces_leads_nowhere, PYTHON.deadline(180));
fn what_the_host_moves_and_replaces_leads_nowhere(host: &Host) -> Result<()> {
    let work = host.work();
    let share = work.join("share");
    fs::create_dir_all(share.join("a/b"))?;
    fs::create_dir_all(share.join("below"))?;
    fs::create_dir_all(work.join("outside/deep"))?;
    fs::write(work.join("outside/secret"), "secret\n")?;
    fs::write(share.join("a/b/inside"), "inside\n")?;
    fs::write(share.join("below/plain"), "plain\n")?;
    let one = host.file("one", "one\n")?;
    symlink("/proc/1/root/work", share.join("magic"))?;
    symlink("/proc/self/cwd/../../outside", share.join("magic2"))?;
    let waits = "
import os, time, errno, ctypes
libc = ctypes.CDLL(None, use_errno=True)
b = os.open('/data/a/b', os.O_RDONLY)
class Handle(ctypes.Structure):
    _fields_ = [('bytes', ctypes.c_uint), ('type', ctypes.c_int), ('data', ctypes.c_ubyte * 128)]
def handle(path, fd=-100, flags=0):
    h, m = Handle(bytes=128), ctypes.c_int()
    return h if libc.name_to_handle_at(fd, path.encode(), ctypes.byref(h), ctypes.byref(m), flags) == 0 else None
handles = [h for h in (handle('/data/a/b'), handle('/data'), handle('/data/a')) if h]
print('ready', flush=True)
while not os.path.exists('/data/go'): time.sleep(0.1)
seen = set()
def look(name, work):
    try: seen.update(work())
    except OSError as e: print(name, errno.errorcode[e.errno])
    except FileNotFoundError: pass
look('descriptor', lambda: os.listdir(b))
for ups in range(1, 6):
    look('up', lambda: os.listdir(os.open('/'.join(['..'] * ups), os.O_RDONLY, dir_fd=b)))
    look('path up', lambda: os.listdir('/data/' + '/'.join(['..'] * ups)))
mount = os.open('/data', os.O_RDONLY)
for h in handles:
    # By a handle the guest's kernel asks the host for the parents.
    fd = libc.open_by_handle_at(mount, ctypes.byref(h), os.O_RDONLY)
    if fd < 0: continue
    look('handle', lambda: os.listdir(fd))
    for ups in range(1, 6):
        look('handle up', lambda: os.listdir(os.open('/'.join(['..'] * ups), os.O_RDONLY, dir_fd=fd)))
# Handles of its own making: any inode that the server knows, and none that it does not.
for node in range(1, 300):
    if not handles: break
    h = Handle.from_buffer_copy(handles[0])
    for i in range(8): h.data[i] = (node >> (8 * i)) & 255
    fd = libc.open_by_handle_at(mount, ctypes.byref(h), os.O_RDONLY)
    if fd < 0: continue
    try:
        entries = os.listdir(fd)
        seen.update(entries)
        for ups in range(1, 4): look('made up', lambda: os.listdir(os.open('/'.join(['..'] * ups), os.O_RDONLY, dir_fd=fd)))
    except NotADirectoryError: pass
for path in '/data/magic/outside/secret', '/data/magic2/secret', '/data/below/plain', '/one':
    try: print(path, open(path).read().strip())
    except OSError as e: print(path, errno.errorcode[e.errno])
print('SEEN', 'secret' in seen, 'deep' in seen, sorted(seen), flush=True)
";
    let volumes = [format!("{}:/data", share.display()), format!("{}:/one", one.display())];
    host.bulkhead_program([
        "run",
        "-d",
        "--name",
        "box",
        "--privileged",
        "-v",
        &volumes[0],
        "-v",
        &volumes[1],
    ])
    .args(["python", "python3", "-c", waits])
    .run()?
    .ok()?;
    let logged =
        |words: &str| -> Result<bool> { Ok(host.bulkhead(["logs", "box"])?.stdout().contains(words)) };
    host.eventually("it is ready", Duration::from_secs(30), || logged("ready"))?;
    // A directory that the guest has open goes elsewhere, a mount comes, the single file becomes a link.
    fs::rename(share.join("a/b"), work.join("outside/deep/b"))?;
    let mounted = Command::new("mount").args(["-t", "tmpfs", "later"]).arg(share.join("below")).status()?;
    ensure!(mounted.success());
    fs::write(share.join("below/later"), "later\n")?;
    fs::remove_file(&one)?;
    symlink(work.join("outside/secret"), &one)?;
    fs::write(share.join("go"), "")?;
    let seen = host.eventually("it has looked", Duration::from_secs(60), || logged("SEEN"));
    let said = host.bulkhead(["logs", "box"])?.stdout();
    host.run(["umount"].into_iter().map(str::to_owned).chain([share.join("below").display().to_string()]))?
        .ok()?;
    host.bulkhead(["rm", "-f", "box"])?.ok()?;
    println!("{said}");
    seen?;
    ensure!(
        said.contains("SEEN False False") && !said.contains("later") && !said.contains("secret\n"),
        "{said}"
    );
    ensure!(said.contains("/data/below/plain plain\n") && said.contains("/one one\n"), "{said}");
    ensure!(!said.contains("/data/magic/outside/secret secret"), "{said}");
    Ok(())
}

test!(nodes_in_a_share_are_the_guests, BUSYBOX.deadline(90));
fn nodes_in_a_share_are_the_guests(host: &Host) -> Result<()> {
    let share = host.work().join("share");
    fs::create_dir_all(&share)?;
    // A device, a fifo and a socket of the host's: names that the guest sees, and nothing behind them.
    let copied = Command::new("cp").args(["-a", "/dev/kvm"]).arg(share.join("kvm")).status()?;
    ensure!(copied.success() && fs::metadata(share.join("kvm"))?.file_type().is_char_device());
    let _listener = std::os::unix::net::UnixListener::bind(share.join("socket"))?;
    ensure!(Command::new("mkfifo").arg(share.join("fifo")).status()?.success());
    let volume = format!("{}:/data", share.display());
    let script = "sh -c 'exec 3<>/data/kvm' && echo opened; \
        nc local:/data/socket </dev/null && echo connected; timeout 1 sh -c 'echo x >/data/fifo' && echo piped; echo end";
    // Not even with every right in the guest: its kernel takes the numbers for its own, and has no such device.
    let tried = crate::shell(host, &["--privileged", "-v", &volume], script)?.ok()?;
    ensure!(tried.stdout() == "end\n", "{tried}");
    Ok(())
}
