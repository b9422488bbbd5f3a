//! `containerd-shim-bulkhead-v2`, and `bulkhead-oci` behind containerd's own shim for runc (`BinaryName`), beside runc: the
//! same steps with the same daemon.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::process::{Finished, Program};
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use rustix::process::Signal;
use serde_json::json;

use crate::daemons::{Daemon, Step, lives, side_by_side};

const PATIENCE: Duration = Duration::from_secs(30);
pub const IMAGE: &str = "docker.io/library/busybox:latest";

/// The flags of a runtime.
type Runtime = &'static [&'static str];
pub const SHIM: Runtime = &["--runtime", "io.containerd.bulkhead.v2"];

/// containerd's command line, with a runtime.
pub struct Ctr<'a> {
    pub host: &'a Host,
    pub runtime: Runtime,
}

impl Ctr<'_> {
    pub fn program(host: &Host, words: &[&str]) -> Program {
        let socket = format!("{}/containerd.sock", host.work().display());
        Program::new(["ctr", "-a", &socket]).args(words.iter().copied())
    }

    pub fn call(&self, words: &[&str]) -> Result<Finished> {
        Self::program(self.host, words).run()
    }

    pub fn all(&self, calls: &[&[&str]]) -> Result<()> {
        calls.iter().try_for_each(|words| self.call(words)?.ok().map(drop))
    }

    /// `ctr run FLAGS IMAGE ID COMMAND`.
    pub fn run(&self, flags: &[&str], id: &str, command: &[&str]) -> Result<Finished> {
        self.call(&[&["run"], self.runtime, flags, &[IMAGE, id], command].concat())
    }

    /// Pid and status of a task; nothing when there is none.
    pub fn task(&self, id: &str) -> Result<(String, String)> {
        let list = self.call(&["task", "ls"])?.ok()?.stdout();
        let mut words =
            list.lines().find(|line| line.starts_with(id)).unwrap_or("").split_whitespace().skip(1);
        let mut next = || words.next().unwrap_or("").to_owned();
        Ok((next(), next()))
    }

    pub fn is(&self, id: &str, status: &str) -> Result<()> {
        self.host.eventually(status, PATIENCE, || Ok(self.task(id)?.1 == status))
    }
}

fn returns(ctr: &Ctr<'_>) -> Result<()> {
    ctr.run(&["--rm"], "quick", &["true"])?.ok().map(drop)
}

fn status_and_streams(ctr: &Ctr<'_>) -> Result<()> {
    let script = ["sh", "-c", "echo out; echo err >&2; exit 42"];
    ctr.run(&["--rm"], "streams", &script)?.status_is(42)?.stdout_is("out\n")?.stderr_is("err\n")?;
    let script = ["sh", "-c", "echo $A $PWD"];
    ctr.run(&["--rm", "--env", "A=b", "--cwd", "/tmp"], "place", &script)?.ok()?.stdout_is("b /tmp\n")?;
    Ok(())
}

fn no_such_program(ctr: &Ctr<'_>) -> Result<()> {
    ctr.run(&["--rm"], "missing", &["nosuch"])?
        .status_is(1)?
        .stderr_has("executable file not found in $PATH")?;
    ctr.run(&["--rm"], "none", &["/etc/passwd"])?.status_is(1)?.stderr_has("permission denied")?;
    // Of a program that is missed at `start` and not at `create`, ctr leaves the task, its --rm or not.
    for id in ["missing", "none"] {
        ctr.call(&["task", "delete", "-f", id])?;
        ctr.call(&["containers", "rm", id])?;
    }
    ctr.call(&["containers", "ls", "-q"])?.ok()?.stdout_is("").map(drop)
}

fn files(ctr: &Ctr<'_>) -> Result<()> {
    let dir = ctr.host.work().join("dir");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("given"), "given\n")?;
    let mount = format!("type=bind,src={},dst=/dir,options=rbind:rw", dir.display());
    let script = ["sh", "-c", "cp /dir/given /dir/new; touch /x 2>/dev/null || echo refused"];
    ctr.run(&["--rm", "--read-only", "--mount", &mount], "files", &script)?.ok()?.stdout_is("refused\n")?;
    ensure!(fs::read_to_string(dir.join("new"))? == "given\n");
    fs::remove_dir_all(dir)?;
    ctr.run(&["--rm", "--snapshotter", "native"], "native", &["echo", "native"])?
        .ok()?
        .stdout_is("native\n")?;
    Ok(())
}

/// The container of the steps that follow: `life`.
fn in_the_background(ctr: &Ctr<'_>) -> Result<()> {
    let script = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
    ctr.run(&["-d"], "life", &["sh", "-c", script])?.ok()?;
    let (pid, status) = ctr.task("life")?;
    ensure!(status == "RUNNING" && lives(&pid), "pid {pid:?}, {status}");
    ctr.call(&["task", "ps", "life"])?.ok()?.stdout_has(&pid)?;
    ctr.call(&["task", "metrics", "life"])?.ok()?.stdout_has("memory.usage")?;
    Ok(())
}

/// Where ctr looks for networks, of which it takes the first, and for what makes them. It cannot be told otherwise.
const NETWORKS: &str = "/etc/cni/net.d";
const PLUGINS: &str = "/opt/cni/bin";

/// What `--cni` needs, for the time of this.
struct Network<'a> {
    host: &'a Host,
}

impl<'a> Network<'a> {
    fn new(host: &'a Host) -> Result<Self> {
        let data = host.work().join("addresses").display().to_string();
        let ranges = json!({"type": "host-local", "subnet": "10.97.0.0/24", "dataDir": data, "routes": [{"dst": "0.0.0.0/0"}]});
        let bridge = json!({"type": "bridge", "bridge": "ctr0", "isGateway": true, "ipam": ranges});
        let list = json!({"cniVersion": "1.0.0", "name": "ctr", "plugins": [bridge]});
        fs::create_dir_all(NETWORKS)?;
        fs::write(Path::new(NETWORKS).join("00-ctr.conflist"), list.to_string())?;
        fs::create_dir_all("/opt/cni")?;
        symlink("/usr/lib/cni", PLUGINS)?;
        Ok(Self { host })
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        let _ = self.host.run(["ip", "link", "delete", "ctr0"]);
        let _ = fs::remove_file(PLUGINS);
        let _ = fs::remove_file(Path::new(NETWORKS).join("00-ctr.conflist"));
    }
}

/// The network is made between `create` and `start`.
fn cni(ctr: &Ctr<'_>) -> Result<()> {
    let _network = Network::new(ctr.host)?;
    let www = ctr.host.work().join("www");
    fs::create_dir_all(&www)?;
    fs::write(www.join("f"), "from the host\n")?;
    let server = Program::new(["busybox", "httpd", "-f", "-p", "8097", "-h"]).args([&www]).spawn()?;
    let script = "ip -4 -o address show eth0 | grep -o 'inet 10.97.0.'; wget -q -O - http://10.97.0.1:8097/f; \
                  ip route | grep -c default";
    let done = ctr.run(&["--rm", "--cni"], "cni", &["sh", "-c", script])?;
    server.signal(Signal::TERM)?;
    server.wait()?;
    done.ok()?.stdout_is("inet 10.97.0.\nfrom the host\n1\n")?;
    // And the address is given back.
    let held = fs::read_dir(ctr.host.work().join("addresses/ctr"))?.flatten();
    let held: Vec<_> = held.filter(|entry| entry.file_name().to_string_lossy().starts_with("10.")).collect();
    ensure!(held.is_empty(), "{held:?} are still given away");
    Ok(())
}

fn more_processes(ctr: &Ctr<'_>) -> Result<()> {
    let exec = ["task", "exec", "--exec-id", "e1"];
    let script = ["life", "sh", "-c", "echo in; exit 9"];
    ctr.call(&[&exec[..], &script].concat())?.status_is(9)?.stdout_is("in\n")?;
    let script = ["--user", "7", "--cwd", "/bin", "life", "sh", "-c", "echo $PWD $(id -u)"];
    ctr.call(&[&exec[..], &script].concat())?.ok()?.stdout_is("/bin 7\n")?;
    Ok(())
}

fn suspended(ctr: &Ctr<'_>) -> Result<()> {
    ctr.all(&[&["task", "pause", "life"]])?;
    ctr.is("life", "PAUSED")?;
    ctr.all(&[&["task", "resume", "life"]])?;
    ctr.is("life", "RUNNING")
}

fn its_end(ctr: &Ctr<'_>) -> Result<()> {
    ctr.all(&[&["task", "kill", "life"]])?;
    ctr.is("life", "STOPPED")?;
    // Tells how it ended by its own status.
    ctr.call(&["task", "delete", "life"])?.stderr_has("exit code 3")?;
    ctr.all(&[&["task", "start", "-d", "life"]])?;
    ctr.is("life", "RUNNING")?;
    ctr.all(&[&["task", "kill", "-a", "-s", "KILL", "life"]])?;
    ctr.is("life", "STOPPED")?;
    ctr.call(&["task", "delete", "life"])?.stderr_has("exit code 137")?;
    ctr.all(&[&["containers", "rm", "life"]])
}

fn steps<'a>() -> [Step<Ctr<'a>>; 10] {
    [
        ("the first `ctr run --rm … true`", returns),
        ("`ctr run --rm … true`", returns),
        ("run: status, streams, --env, --cwd", status_and_streams),
        ("run of what is missing, or no program", no_such_program),
        ("run --read-only, --mount, --snapshotter native", files),
        ("run --cni", cni),
        ("run -d, task ls, ps, metrics", in_the_background),
        ("task exec --user --cwd", more_processes),
        ("task pause, resume", suspended),
        ("task kill, delete, start, kill -a; containers rm", its_end),
    ]
}

/// containerd, with its files in the test's directory.
pub fn daemon(host: &Host) -> Result<Daemon> {
    let work = host.work().display();
    // What Kubernetes asks for is not tested here, and looks for networks.
    let settings =
        host.file("config.toml", "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")?;
    let command = format!(
        "containerd -c {} -a {work}/containerd.sock --root {work}/root --state {work}/state",
        settings.display()
    );
    Daemon::start(host, &command, || Ctr::program(host, &["version"]))
}

/// Ends containerd, with all that it keeps.
pub fn ended(daemon: Daemon) -> Result<()> {
    daemon.end(&["/run/containerd"])?;
    // The group of containerd's namespace, which no runtime removes.
    let _ = fs::remove_dir("/sys/fs/cgroup/default");
    Ok(())
}

test!(what_people_do, Needs::engines().deadline(200).shows_output());
fn what_people_do(host: &Host) -> Result<()> {
    let engine = |runtime| Ctr { host, runtime };
    let by_name = engine(&["--runc-binary", "/usr/local/bin/bulkhead-oci"]);
    // dockerd's test has the rest of it.
    let few: Vec<_> = steps().into_iter().take(3).collect();
    with_daemon(host, || {
        let done = side_by_side(&[("the shim", engine(SHIM))], &steps());
        done.and(side_by_side(&[("bulkhead-oci", by_name)], &few))
    })
}

test!(
    the_same_with_runc,
    Needs::engines()
        .deadline(200)
        .shows_output()
        .pending("shows that the script is right, and the figures side by side; two minutes")
);
fn the_same_with_runc(host: &Host) -> Result<()> {
    let engine = |runtime| Ctr { host, runtime };
    let engines = [("runc", engine(&["--runc-binary", "runc"])), ("the shim", engine(SHIM))];
    with_daemon(host, || side_by_side(&engines, &steps()))
}

/// containerd with the image, for the time of `work`.
fn with_daemon(host: &Host, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let daemon = daemon(host)?;
    let image = host.image("busybox-docker").display().to_string();
    Ctr::program(host, &["images", "import", &image]).run()?.ok()?;
    let done = work();
    ended(daemon)?;
    done
}
