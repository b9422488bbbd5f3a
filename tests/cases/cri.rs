//! Pods as kubelet makes them: containerd's CRI plugin with CNI's bridge, and a handler that is a microVM, beside runc's.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::cri::{
    Container, ContainerMetadata, Cri, Dns, EXITED, Image, LinuxContainer, LinuxPod, Pod, PodMetadata,
    Resources,
};
use bulkhead_tests::host::Host;
use bulkhead_tests::oci_image;
use bulkhead_tests::process::Program;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;
use serde_json::json;

use crate::containerd::IMAGE;
use crate::cri_streams::{exec_and_attach, port_forward};
use crate::cri_volumes::{comings_and_goings, volumes};
use crate::daemons::{Daemon, Step, side_by_side};

pub const PATIENCE: Duration = Duration::from_secs(20);
/// An image that does nothing for long, which holds a pod together.
const PAUSE: &str = "docker.io/library/pause:latest";
const MIB: i64 = 1 << 20;

/// A node with one runtime.
pub struct Node<'a> {
    pub host: &'a Host,
    pub cri: Cri,
    containerd: String,
    pub handler: &'static str,
}

impl Node<'_> {
    pub fn pod(&self, name: &str) -> Pod {
        let metadata = PodMetadata {
            name: name.into(),
            uid: format!("{}-{name}", self.handler),
            namespace: "test".into(),
        };
        let resources = Some(Resources { memory_limit: 300 * MIB });
        Pod {
            metadata: Some(metadata),
            hostname: name.into(),
            log_directory: self
                .host
                .work()
                .join(format!("logs-{}-{}-{name}", self.containerd, self.handler))
                .display()
                .to_string(),
            dns: Some(Dns { servers: vec!["10.99.0.1".into()] }),
            linux: Some(LinuxPod { resources }),
        }
    }

    /// A container that runs a script.
    pub fn container(&self, name: &str, attempt: u32, script: &str) -> Container {
        let image = Image { image: IMAGE.into(), ..Image::default() };
        let linux = LinuxContainer {
            resources: Some(Resources { memory_limit: 64 * MIB }),
            ..LinuxContainer::default()
        };
        Container {
            metadata: Some(ContainerMetadata { name: name.into(), attempt }),
            image: Some(image),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(linux),
            ..Container::default()
        }
    }

    /// Makes and starts it.
    pub fn start(&self, pod: (&str, &Pod), name: &str, attempt: u32, script: &str) -> Result<String> {
        self.start_this(pod, self.container(name, attempt, script))
    }

    /// Makes and starts a container.
    pub fn start_this(&self, pod: (&str, &Pod), container: Container) -> Result<String> {
        let id = self.cri.create(pod.0, pod.1, container)?;
        self.cri.on("StartContainer", &id, 0)?;
        Ok(id)
    }

    /// Waits for a container's end; answers its status and the reason.
    pub fn ended(&self, id: &str) -> Result<(i32, String)> {
        let mut status = self.cri.status(id)?;
        self.host.eventually("its end", PATIENCE, || {
            status = self.cri.status(id)?;
            Ok(status.state == EXITED)
        })?;
        Ok((status.exit_code, status.reason))
    }

    pub fn remove(&self, pod: &str) -> Result<()> {
        self.cri.on("StopPodSandbox", pod, 0)?;
        self.cri.on("RemovePodSandbox", pod, 0)
    }
}

const SERVER: &str = "mkdir /www; echo served >/www/f; echo up; exec httpd -f -p 80 -h /www";

fn comes_and_goes(node: &Node<'_>) -> Result<()> {
    let pod = node.cri.run_pod(&node.pod("empty"), node.handler)?;
    node.remove(&pod)
}

fn containers_of_a_pod(node: &Node<'_>) -> Result<()> {
    let config = node.pod("web");
    let pod = node.cri.run_pod(&config, node.handler)?;
    let here = (pod.as_str(), &config);
    let web = node.start(here, "web", 0, SERVER)?;
    let address = node.cri.address(&pod)?;
    let url = format!("http://{address}/f");
    node.host.eventually("the pod's server", PATIENCE, || {
        Ok(node.host.run(["wget", "-q", "-O", "-", &url])?.stdout() == "served\n")
    })?;
    let log = fs::read_to_string(format!("{}/web.log", config.log_directory))?;
    ensure!(log.ends_with(" stdout F up\n"), "the log says {log:?}");

    // An init container, or any other that ends: beside it, in its network, with a root and limits of its own.
    let script = "hostname; wget -q -O - http://127.0.0.1/f; test -e /www || echo alone; exit 4";
    let second = node.start(here, "second", 0, script)?;
    ensure!(node.ended(&second)? == (4, "Error".into()));
    let log = fs::read_to_string(format!("{}/second.log", config.log_directory))?;
    let words: Vec<_> = log.lines().filter_map(|line| line.split(' ').nth(3)).collect();
    ensure!(words == ["web", "served", "alone"], "{words:?}");
    node.cri.on("RemoveContainer", &second, 0)?;
    let again = node.start(here, "second", 1, "sleep 1000")?;
    let limit = node.cri.exec(&again, &["cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(limit == ((64 * MIB).to_string() + "\n", String::new(), 0), "{limit:?}");
    let failed = node.cri.exec(&again, &["sh", "-c", "echo bad >&2; exit 7"])?;
    ensure!(failed == (String::new(), "bad\n".into(), 7), "{failed:?}");

    let hungry = node.start(here, "hungry", 0, "tail /dev/zero")?;
    ensure!(node.ended(&hungry)? == (137, "OOMKilled".into()), "{:?}", node.ended(&hungry)?);
    ensure!(node.cri.memory(&web)? > 0);
    if node.handler != "runc" {
        let count =
            |program: &str| Ok(node.host.run(["pgrep", "-c", "-f", program])?.stdout().trim().to_owned());
        let counts: Result<Vec<String>> =
            ["bulkhead-vmm", "containerd-shim-bulkhead"].into_iter().map(count).collect();
        ensure!(counts? == ["1", "1"], "the pod has more than one machine and one shim");
    }
    node.cri.on("StopContainer", &web, 1)?;
    node.ended(&web)?;
    node.remove(&pod)
}

fn two_pods(node: &Node<'_>) -> Result<()> {
    let (one, two) = (node.pod("one"), node.pod("two"));
    let (first, second) = (node.cri.run_pod(&one, node.handler)?, node.cri.run_pod(&two, node.handler)?);
    let server = node.start((&first, &one), "server", 0, SERVER)?;
    let client = node.start((&second, &two), "client", 0, "sleep 1000")?;
    let url = format!("http://{}/f", node.cri.address(&first)?);
    node.host.eventually("the other pod's server", PATIENCE, || {
        Ok(node.cri.exec(&client, &["wget", "-q", "-O", "-", &url])?.0 == "served\n")
    })?;
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let same = node.cri.exec(&server, &boot)?.0 == node.cri.exec(&client, &boot)?.0;
    ensure!(same == (node.handler == "runc"), "pods and kernels");
    node.remove(&first)?;
    node.remove(&second)
}

/// What the pause container stands for where there is one: the pod's files, its shared memory, its end.
fn without_a_pause_container(node: &Node<'_>) -> Result<()> {
    let config = node.pod("alone");
    let pod = node.cri.run_pod(&config, node.handler)?;
    let here = (pod.as_str(), &config);
    let (one, two) = (node.start(here, "one", 0, "sleep 1000")?, node.start(here, "two", 0, "sleep 1000")?);
    let files = "cat /etc/hostname /etc/resolv.conf; grep -c localhost /etc/hosts; echo shared >/dev/shm/f";
    let said = node.cri.exec(&one, &["sh", "-c", files])?;
    ensure!(said.0 == "alone\nnameserver 10.99.0.1\n1\n", "{said:?}");
    let look =
        "cat /dev/shm/f /proc/sys/net/ipv4/ip_unprivileged_port_start; hostname; df -k /dev/shm | tail -1";
    let said = node.cri.exec(&two, &["sh", "-c", look])?;
    ensure!(said.0.starts_with("shared\n0\nalone\n") && said.0.contains(" 65536 "), "{said:?}");
    ensure!(node.cri.is_ready(&pod)?);
    ensure!(node.host.run(["pgrep", "-f", "pause"])?.stdout().is_empty(), "there is a pause container");
    // Who kills the machine ends the pod, and containerd learns it.
    node.host.run(["pkill", "-KILL", "-f", "bulkhead-vmm"])?.ok()?;
    node.host.eventually("the pod's end to be told", PATIENCE, || Ok(!node.cri.is_ready(&pod)?))?;
    for container in [&one, &two] {
        ensure!(node.ended(container)?.0 == 137);
    }
    node.remove(&pod)?;
    // Who kills the shim, too; nothing of the pod goes on.
    let pod = node.cri.run_pod(&config, node.handler)?;
    let one = node.start((&pod, &config), "one", 1, "sleep 1000")?;
    node.host.run(["pkill", "-KILL", "-f", "containerd-shim-bulkhead"])?.ok()?;
    // Until containerd has noticed, it asks in vain.
    let gone = || Ok(node.cri.is_ready(&pod).is_ok_and(|ready| !ready));
    node.host.eventually("the pod's end to be told", PATIENCE, gone)?;
    node.ended(&one)?;
    node.remove(&pod)
}

fn steps<'a>() -> [Step<Node<'a>>; 8] {
    [
        ("a pod comes and goes", comes_and_goes),
        ("once more", comes_and_goes),
        ("containers of a pod: network, log, exec, limits, OOM, again", containers_of_a_pod),
        ("two pods, one asks the other", two_pods),
        ("exec and attach, with input and a terminal", exec_and_attach),
        ("port-forward", port_forward),
        ("volumes: read-write, read-only, a file, in memory", volumes),
        ("an ephemeral container, a container started anew", comings_and_goings),
    ]
}

/// A containerd with its CRI plugin, and what that needs.
fn daemon(host: &Host, program: &str) -> Result<Daemon> {
    let work = host.work().display();
    let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {
        "type": "host-local", "subnet": "10.99.0.0/24", "dataDir": format!("{work}/addresses"),
    }});
    let network = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]});
    host.file("net.d/pods.conflist", network.to_string())?;
    let settings = format!(
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{work}/net.d\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.bulkhead]\n\
         runtime_type = \"io.containerd.bulkhead.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.sandbox]\n\
         runtime_type = \"io.containerd.bulkhead.v2\"\nsandboxer = \"shim\"\n{}",
        crate::disks::settings(host, program)?
    );
    let settings = host.file("config.toml", &settings)?;
    let command = format!(
        "{program} -c {} -a {work}/containerd.sock --root {work}/{program} --state {work}/state",
        settings.display()
    );
    let ctr = || Program::new(["ctr", "-a", &format!("{work}/containerd.sock"), "-n", "k8s.io"]);
    let fresh = !host.work().join(program).exists();
    let daemon = Daemon::start(host, &command, || ctr().args(["version"]))?;
    if !fresh {
        return Ok(daemon);
    }
    let bin = host.work().join("pause/bin");
    fs::create_dir_all(&bin)?;
    fs::copy("/usr/bin/busybox", bin.join("busybox"))?;
    if !bin.join("sleep").exists() {
        symlink("busybox", bin.join("sleep"))?;
    }
    let layer = oci_image::Layer::stored(&host.work().join("pause"), &oci_image::Owners::default())?;
    let config = json!({"Entrypoint": ["sleep", "1000000"], "Env": ["PATH=/bin"]});
    let pause = oci_image::Image { name: "pause:latest".into(), layers: vec![layer], config };
    let file = host.work().join("pause.tar");
    pause.write_oci(fs::File::create(&file)?)?;
    for image in [file, host.image("busybox-docker")] {
        ctr().args(["images", "import", &image.display().to_string()]).run()?.ok()?;
    }
    Ok(daemon)
}

test!(pods_are_as_with_runc, Needs::engines().deadline(300).shows_output().may_leave_things());
fn pods_are_as_with_runc(host: &Host) -> Result<()> {
    with_containerd(host, "containerd", || {
        let [quick, _, whole, rest @ ..] = steps();
        let nodes = [node(host, "containerd", "runc")?, node(host, "containerd", "bulkhead")?];
        let done = side_by_side(&nodes, &[quick, whole]);
        let [_, bulkhead] = nodes;
        done.and(side_by_side(&[bulkhead], &rest))
    })
}

test!(
    all_steps_beside_runc,
    Needs::engines()
        .deadline(300)
        .shows_output()
        .may_leave_things()
        .pending("figures for docs/kubernetes.md, and that runc does the same: two minutes")
);
fn all_steps_beside_runc(host: &Host) -> Result<()> {
    with_containerd(host, "containerd", || {
        let nodes = [node(host, "containerd", "runc")?, node(host, "containerd", "bulkhead")?];
        side_by_side(&nodes, &steps())
    })
}

test!(newer_containerds_take_the_shim, Needs::engines().deadline(300).shows_output().may_leave_things());
fn newer_containerds_take_the_shim(host: &Host) -> Result<()> {
    let [_, _, whole, _, streams, ports, ..] = steps();
    // One of Debian's next release, one of the one after that, whatever their versions are by now.
    let names = fs::read_dir("/usr/bin")?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let is_newer = |name: &String| {
        let version = name.strip_prefix("containerd-").unwrap_or_default();
        version.starts_with(|first: char| first.is_ascii_digit())
    };
    let programs: Vec<_> = names.filter(is_newer).collect();
    ensure!(programs.len() == 2, "the host has {programs:?}");
    for program in &programs {
        let done = if program.starts_with("containerd-1") {
            with_containerd(host, program, || {
                side_by_side(
                    &[(program.as_str(), node(host, program, "bulkhead")?.1)],
                    &[whole, streams, ports],
                )
            })
        } else {
            by_both_ways(host, program)
        };
        done.with_context(|| program.clone())?;
    }
    Ok(())
}

/// containerd 2 and later: with a pause container, and by the sandbox API.
fn by_both_ways(host: &Host, program: &str) -> Result<()> {
    let [quick, _, whole, _, streams, ports, ..] = steps();
    let first = daemon(host, program)?;
    side_by_side(&[(program, node(host, program, "bulkhead")?.1)], &[quick])?;
    // A pod that outlives its containerd.
    let (_, old) = node(host, program, "sandbox")?;
    let config = old.pod("stays");
    let pod = old.cri.run_pod(&config, old.handler)?;
    let container = old.start((&pod, &config), "stays", 0, "sleep 1000")?;
    first.end(&[])?;
    with_containerd(host, program, || {
        let (_, node) = node(host, program, "sandbox")?;
        ensure!(node.cri.is_ready(&pod)?, "containerd has lost the pod");
        ensure!(node.cri.exec(&container, &["hostname"])?.0 == "stays\n");
        node.remove(&pod)?;
        let alone: Step<_> = ("no pause container", without_a_pause_container);
        side_by_side(&[("sandbox API", node)], &[quick, whole, streams, ports, alone])?;
        crate::disks::roots_on_disks(host).context("disks")?;
        crate::erofs::roots_of_layers(host, program).context("erofs")
    })
}

pub fn node<'a>(host: &'a Host, containerd: &str, handler: &'static str) -> Result<(&'static str, Node<'a>)> {
    let cri = Cri::connect(&host.work().join("containerd.sock"))?;
    Ok((handler, Node { host, cri, containerd: containerd.to_owned(), handler }))
}

/// Does something while a containerd runs, and sees to it that nothing that runs is left.
pub fn with_containerd(host: &Host, program: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let daemon = daemon(host, program)?;
    let done = work();
    // The bridge and the pods' addresses stay, as on any node.
    for program in ["bulkhead-vmm", "bulkhead-oci", "virtiofsd", "containerd-shim"] {
        let left = host.run(["pgrep", "-a", "-f", program])?;
        ensure!(done.is_err() || left.status == 1, "{program} is still there: {}", left.stdout());
    }
    daemon.end(&["/run/containerd"])?;
    done
}
