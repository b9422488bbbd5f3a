//! Steps of `cri.rs`: what kubelet mounts into containers, and containers that come and go while a pod lives.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::{Container, LinuxContainer, Mount, NamespaceOptions, Security};

use crate::cri::{Node, PATIENCE};

fn mount(host: &Path, container: &str, readonly: bool) -> Mount {
    Mount { container_path: container.into(), host_path: host.display().to_string(), readonly }
}

/// A container whose pids are its own (1), as kubelet asks, or those of `target` (3).
fn with_pids(container: Container, pid: i32, target: &str) -> Container {
    let namespaces = Some(NamespaceOptions { pid, target: target.into() });
    let linux = container.linux.unwrap_or_default();
    let linux = LinuxContainer { security: Some(Security { namespaces }), ..linux };
    Container { linux: Some(linux), ..container }
}

/// What a container has logged.
fn log(directory: &str, name: &str) -> Result<Vec<String>> {
    let path = format!("{directory}/{name}.log");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    Ok(text.lines().filter_map(|line| Some(line.splitn(4, ' ').nth(3)?.to_owned())).collect())
}

const WRITER: &str = "cat /ro/given /file /rw/before; echo changed >>/file; echo new >/rw/made; chmod 640 /rw/made; \
    touch /ro/x 2>/dev/null || echo refused; touch /etc/hosts 2>/dev/null || echo 'refused, too'; \
    dd if=/dev/zero of=/mem/big bs=64k count=64 2>/dev/null || echo full; rm /mem/big; echo kept >/mem/small; \
    grep -c given-by-kubelet /etc/hosts; cat /etc/resolv.conf; echo last words >/dev/termination-log; exit 3";

pub fn volumes(node: &Node<'_>) -> Result<()> {
    let config = node.pod("volumes");
    let base = node.host.work().join(format!("volumes-{}", node.handler));
    let [rw, ro, mem] = ["rw", "ro", "mem"].map(|name| base.join(name));
    for dir in [&rw, &ro, &mem] {
        fs::create_dir_all(dir)?;
    }
    // An emptyDir of `medium: Memory` is a tmpfs of the host's.
    let options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", &mem.display().to_string()];
    node.host.run(options)?.ok()?;
    let words = [("ro/given", "given\n"), ("rw/before", "before\n"), ("file", "single\n"), ("why", "")];
    for (name, text) in words {
        fs::write(base.join(name), text)?;
    }
    fs::write(base.join("hosts"), "127.0.0.1 localhost given-by-kubelet\n")?;
    let mounts = vec![
        mount(&rw, "/rw", false),
        mount(&ro, "/ro", true),
        mount(&mem, "/mem", false),
        mount(&base.join("file"), "/file", false),
        mount(&base.join("hosts"), "/etc/hosts", true),
        mount(&base.join("why"), "/dev/termination-log", false),
    ];
    let pod = node.cri.run_pod(&config, node.handler)?;
    let here = (pod.as_str(), &config);

    // An init container: it has ended before the next one is made.
    let init = Container { mounts: mounts.clone(), ..node.container("init", 0, WRITER) };
    let init = node.start_this(here, with_pids(init, 1, ""))?;
    ensure!(node.ended(&init)? == (3, "Error".into()), "{:?}", node.ended(&init)?);
    let said = log(&config.log_directory, "init")?;
    let expected =
        ["given", "single", "before", "refused", "refused, too", "full", "1", "nameserver 10.99.0.1"];
    ensure!(said == expected, "{said:?}");
    let kept = |path: &str| fs::read_to_string(base.join(path)).with_context(|| path.to_owned());
    ensure!(kept("rw/made")? == "new\n" && kept("file")? == "single\nchanged\n");
    ensure!(kept("mem/small")? == "kept\n" && kept("why")? == "last words\n");
    ensure!(fs::metadata(rw.join("made"))?.permissions().mode() & 0o777 == 0o640);

    // What the host puts there later is seen, a file that takes another's place too.
    let script = "cat /mem/small /rw/made; until test -e /rw/later; do sleep 0.1; done; cat /rw/later; exec sleep 1000";
    let main = Container { mounts, ..node.container("main", 0, script) };
    let main = node.start_this(here, with_pids(main, 1, ""))?;
    fs::write(base.join("new"), "later\n")?;
    fs::rename(base.join("new"), rw.join("later"))?;
    node.host.eventually("what was put there later", PATIENCE, || {
        Ok(log(&config.log_directory, "main")? == ["kept", "new", "later"])
    })?;
    node.cri.on("StopContainer", &main, 0)?;
    node.remove(&pod)?;
    // Nobody holds what was mounted.
    node.host.run(["umount", &mem.display().to_string()])?.ok()?;
    Ok(fs::remove_dir_all(base)?)
}

pub fn comings_and_goings(node: &Node<'_>) -> Result<()> {
    let config = node.pod("changes");
    let pod = node.cri.run_pod(&config, node.handler)?;
    let here = (pod.as_str(), &config);
    let script = "echo $$ started; echo inside >/made; exec sleep 4321";
    let main = node.start_this(here, with_pids(node.container("main", 0, script), 1, ""))?;
    node.host.eventually("it runs", PATIENCE, || Ok(log(&config.log_directory, "main")? == ["1 started"]))?;

    // An ephemeral container: it comes later, and sees the processes and the files of the one that it is for.
    let script = "tr '\\0' ' ' </proc/1/cmdline; echo; cat /proc/1/root/made; test -e /made || echo apart; \
                  kill -STOP 1 && echo signalled; hostname";
    let debugger = node.start_this(here, with_pids(node.container("debugger", 0, script), 3, &main))?;
    ensure!(node.ended(&debugger)? == (0, "Completed".into()));
    let said = log(&config.log_directory, "debugger")?;
    ensure!(said == ["sleep 4321 ", "inside", "apart", "signalled", "changes"], "{said:?}");

    // The main one is killed and made anew under its name, in the living pod: with a root and pids of its own.
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let before = node.cri.exec(&main, &boot)?.0;
    node.cri.on("StopContainer", &main, 0)?;
    ensure!(node.ended(&main)? == (137, "Error".into()), "{:?}", node.ended(&main)?);
    let script = "test -e /made || echo fresh; echo $$ again; exec sleep 1000";
    let again = node.start_this(here, with_pids(node.container("main", 1, script), 1, ""))?;
    node.cri.on("RemoveContainer", &main, 0)?;
    let expected = ["1 started", "fresh", "1 again"];
    node.host.eventually(
        "it runs again",
        PATIENCE,
        || Ok(log(&config.log_directory, "main")? == expected),
    )?;
    ensure!(!before.is_empty() && node.cri.exec(&again, &boot)?.0 == before, "another kernel");
    node.remove(&pod)
}
