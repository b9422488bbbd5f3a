//! What a monitor and a file server that a guest has taken over could reach.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::Program;
use bulkhead_tests::test;
use serde_json::Value;

use crate::BUSYBOX;

/// Capabilities that a file server needs: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP (`capability.h`).
const OF_FILES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

fn isolation(host: &Host, what: &str) -> Result<Value> {
    let text = host.bulkhead(["inspect", "--isolation", "--format", "json", what])?.ok()?.stdout();
    let seen: Vec<Value> = serde_json::from_str(&text)?;
    seen.into_iter().next().context("nothing is seen")
}

fn bits(process: &Value, set: &str) -> Result<u64> {
    let text = process["capabilities"][set].as_str().context("no such set")?;
    Ok(u64::from_str_radix(text, 16)?)
}

/// What is true of both.
fn check_both(process: &Value) -> Result<()> {
    ensure!(process["no_new_privs"] == true, "{process}");
    let threads = process["threads"].as_array().context("no threads")?;
    ensure!(!threads.is_empty(), "{process}");
    for kind in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        ensure!(process["namespaces"][kind]["own"] == true, "{kind}: {}", process["namespaces"]);
    }
    ensure!(process["limits"]["Max core file size"] == "0 0", "{}", process["limits"]);
    let pids = process["namespace_pids"].as_array().context("no pids")?;
    ensure!(pids.len() == 2 && pids[1] == 1, "{pids:?}");
    Ok(())
}

fn check_monitor(seen: &Value) -> Result<()> {
    let monitor = &seen["monitor"];
    check_both(monitor)?;
    for set in ["effective", "permitted", "inheritable", "bounding", "ambient"] {
        ensure!(bits(monitor, set)? == 0, "{set}: {}", monitor["capabilities"]);
    }
    ensure!(monitor["dumpable"] != true, "{monitor}");
    for thread in monitor["threads"].as_array().context("no threads")? {
        ensure!(thread["seccomp"] == "filter" && thread["filters"].as_u64() >= Some(1), "{thread}");
    }
    let says = &seen["monitor_says"];
    ensure!(says["missing"].as_array().is_none_or(Vec::is_empty), "{says}");
    ensure!(says["landlock"].is_string(), "{says}");
    let files = monitor["limits"]["Max open files"].as_str().context("no limit")?;
    ensure!(files.split(' ').all(|limit| limit.parse::<u64>().is_ok_and(|limit| limit <= 4096)), "{files}");
    // The root is an empty file system that cannot be written, and the directory of its sockets is in it.
    let mounts = monitor["mounts"].as_array().context("no mounts")?;
    let at_root = mounts.iter().find(|mount| mount["point"] == "/").context("no root")?;
    ensure!(mounts.len() == 2 && at_root["kind"] == "tmpfs", "{mounts:?}");
    for mount in mounts {
        let options = mount["options"].as_str().unwrap_or_default();
        ensure!(
            ["ro", "nosuid", "nodev", "noexec"].iter().all(|o| options.split(',').any(|is| is == *o)),
            "{mount}"
        );
    }
    let sockets =
        |mount: &Value| mount["point"].as_str().is_some_and(|point| point.starts_with("/run/bulkhead/"));
    ensure!(mounts.iter().any(sockets), "{mounts:?}");
    let root = format!("/proc/{}/root", monitor["pid"]);
    let names: Vec<_> =
        std::fs::read_dir(&root)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    ensure!(names == ["run"], "{names:?}");
    // Nothing that leads to other files: no directory, and no device but the ones it works on.
    let descriptors: BTreeMap<String, u64> = serde_json::from_value(monitor["descriptors"].clone())?;
    for target in descriptors.keys().filter(|target| target.starts_with('/')) {
        let path = std::path::Path::new(target);
        ensure!(!path.is_dir(), "it has the directory {target} open");
        ensure!(
            !target.starts_with("/dev/")
                || ["/dev/null", "/dev/kvm", "/dev/net/tun"].contains(&target.as_str()),
            "it has {target} open"
        );
    }
    println!("descriptors: {descriptors:?}");
    Ok(())
}

test!(a_monitor_and_its_file_server_can_reach_what_they_need_and_no_more, BUSYBOX.deadline(240));
fn a_monitor_and_its_file_server_can_reach_what_they_need_and_no_more(host: &Host) -> Result<()> {
    let shared = host.work().join("shared");
    std::fs::create_dir_all(&shared)?;
    let volume = format!("{}:/shared", shared.display());
    let run = |name: &str, more: &[&str]| -> Result<()> {
        let all = [&["run", "-d", "--name", name], more, &["busybox", "sleep", "1000"]].concat();
        host.bulkhead(all)?.ok().map(drop)
    };
    run("plain", &[])?;
    run("sharing", &["-v", &volume])?;
    let (plain, sharing) = (isolation(host, "plain")?, isolation(host, "sharing")?);
    for seen in [&plain, &sharing] {
        check_monitor(seen)?;
    }
    let uid = |seen: &Value| seen["monitor"]["uids"].clone();
    let uids: Vec<u32> = serde_json::from_value(uid(&plain))?;
    ensure!(uids.iter().all(|id| (1_900_000_000..1_900_065_536).contains(id)), "{uids:?}");
    ensure!(uid(&plain) != uid(&sharing), "two have the same user: {uids:?}");
    ensure!(plain["monitor"]["groups"].as_array().is_some_and(Vec::is_empty), "{plain}");
    // The same is to be seen by the number of the process, and by people.
    let pid = format!("pid:{}", plain["monitor"]["pid"]);
    ensure!(isolation(host, &pid)?["monitor"]["uids"] == plain["monitor"]["uids"]);
    let table = host.bulkhead(["inspect", "--isolation", "sharing"])?.ok()?;
    table.stdout_has("FILE SERVER")?.stdout_has("threads without a filter")?;

    let servers = sharing["file_servers"].as_array().context("no file server")?;
    ensure!(servers.len() == 1, "{servers:?}");
    check_both(&servers[0])?;
    for set in ["effective", "permitted", "bounding", "ambient"] {
        ensure!(bits(&servers[0], set)? & !OF_FILES == 0, "{set}: {}", servers[0]["capabilities"]);
    }
    ensure!(servers[0]["threads"].as_array().is_some_and(|all| all.iter().all(|t| t["seccomp"] == "filter")));
    println!("file server: {}", servers[0]);

    // What they work on works.
    host.bulkhead(["exec", "sharing", "sh", "-c", "echo in >/shared/file; cat /shared/file"])?
        .ok()?
        .stdout_is("in\n")?;
    // A request for all that they have when they are asked.
    host.bulkhead(["rm", "-f", "plain", "sharing"])?.ok()?;
    ensure!(!std::path::Path::new("/run/bulkhead/uids").exists(), "users are still claimed");

    // Without the jail all of that is otherwise: this test sees the difference.
    let line = "BULKHEAD_JAIL=off bulkhead run -d --name bare busybox sleep 1000";
    Program::new(["sh", "-c", line]).run()?.ok()?;
    let bare = isolation(host, "bare")?;
    ensure!(check_monitor(&bare).is_err() && bare["monitor"]["uids"][0] == 0, "{bare}");
    ensure!(
        bare["monitor"]["threads"].as_array().is_some_and(|all| all.iter().all(|t| t["seccomp"] == "off"))
    );
    host.bulkhead(["rm", "-f", "bare"])?.ok().map(drop)
}

test!(a_monitor_of_a_user_without_rights_is_jailed, BUSYBOX.deadline(240));
fn a_monitor_of_a_user_without_rights_is_jailed(host: &Host) -> Result<()> {
    let home = host.work().join("home");
    std::fs::create_dir_all(&home)?;
    let image = host.image("busybox").display().to_string();
    std::fs::set_permissions(host.work(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    std::os::unix::fs::chown(&home, Some(12345), Some(12345))?;
    // As a member of the group kvm.
    let as_user = |line: &str| {
        let line = format!("export HOME={0}; cd {0}; {line}", home.display());
        Program::new(["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "sh", "-c", &line])
    };
    let mode = std::fs::metadata("/dev/kvm")?.permissions();
    std::fs::set_permissions("/dev/kvm", std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let bulkhead = format!("bulkhead --root {}/b", home.display());
    as_user(&format!("{bulkhead} image load {image}")).run()?.ok()?;
    as_user(&format!("{bulkhead} run -d --name mine busybox sleep 1000")).run()?.ok()?;
    let text = as_user(&format!("{bulkhead} inspect --isolation --format json mine")).run()?.ok()?.stdout();
    let seen: Vec<Value> = serde_json::from_str(&text)?;
    let monitor = &seen[0]["monitor"];
    check_both(monitor)?;
    // Other than with root's, nothing of the host's is hidden from its user: it sees its own process.
    ensure!(monitor["uids"] == serde_json::json!([12345, 12345, 12345, 12345]), "{monitor}");
    ensure!(bits(monitor, "effective")? == 0 && bits(monitor, "bounding")? == 0, "{monitor}");
    ensure!(
        seen[0]["monitor_says"]["missing"].as_array().is_none_or(Vec::is_empty),
        "{}",
        seen[0]["monitor_says"]
    );
    ensure!(monitor["mounts"].as_array().is_some_and(|mounts| mounts.len() == 2), "{monitor}");
    as_user(&format!("{bulkhead} exec mine true")).run()?.ok()?;
    as_user(&format!("{bulkhead} rm -f mine")).run()?.ok()?;
    std::fs::set_permissions("/dev/kvm", mode)?;
    Ok(())
}

test!(roots_with_fewer_rights_have_it_too, BUSYBOX.deadline(120));
fn roots_with_fewer_rights_have_it_too(host: &Host) -> Result<()> {
    let shared = host.work().join("shared");
    std::fs::create_dir_all(&shared)?;
    let volume = format!("{}:/shared", shared.display());
    // Limits cannot be raised, and are low already.
    for wrapper in [
        &["setpriv", "--bounding-set=-sys_resource"][..],
        &["setpriv", "--bounding-set=-sys_resource", "prlimit", "--nofile=1024:1024", "--core=0:0"],
    ] {
        let program = Program::new(wrapper.iter().copied());
        let run = ["bulkhead", "run", "-d", "--name", "box", "-v", &volume, "busybox", "sleep", "1000"];
        program.args(run).run()?.ok()?;
        let seen = isolation(host, "box")?;
        check_monitor(&seen)?;
        let server = seen["file_servers"][0].clone();
        check_both(&server)?;
        let nofile = &seen["monitor"]["limits"]["Max open files"];
        if wrapper.len() > 2 {
            ensure!(nofile == "1024 1024", "{nofile}");
        }
        host.bulkhead(["exec", "box", "sh", "-c", "echo in >/shared/file"])?.ok()?;
        host.bulkhead(["rm", "-f", "box"])?.ok()?;
    }
    Ok(())
}
