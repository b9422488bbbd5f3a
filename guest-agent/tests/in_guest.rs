//! The whole agent against a real kernel: runs inside a small QEMU machine that `tests/run-in-guest` starts, because
//! it mounts, makes cgroups and ends up as root of everything. Elsewhere every test here is ignored.

#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only test functions themselves")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use bulkhead_protocol::agent::stream_hello::Kind;
use bulkhead_protocol::agent::*;
use bulkhead_protocol::client::{CallError, Client};
use bulkhead_protocol::stream::{read_message, write_message};
use bulkhead_protocol::wire::Code;
use bulkhead_seccomp::{Profile, Program};
use prost::Message;

const SERVICE: &str = "bulkhead.agent.v1.Agent";

fn agent() -> Client<UnixStream> {
    Client::new(UnixStream::connect("/run/agent/agent").unwrap(), SERVICE)
}

fn call<R: Message + Default>(method: &'static str, request: &impl Message) -> Result<R, CallError> {
    agent().call(method, request)
}

fn stream(container: &str, exec: &str, kind: Kind, path: &str) -> Result<UnixStream, String> {
    let mut socket = UnixStream::connect("/run/agent/streams").unwrap();
    let (container, exec, path) = (container.into(), exec.into(), path.into());
    let hello = StreamHello { container, exec, kind: kind.into(), path, ..StreamHello::default() };
    write_message(&mut socket, &hello).unwrap();
    let reply: StreamReply = read_message(&mut socket).unwrap();
    if reply.error.is_empty() { Ok(socket) } else { Err(reply.error) }
}

/// What docker asks for, near enough.
fn spec(process: &str, more: &str) -> String {
    format!(
        r#"{{"ociVersion":"1.0.2","hostname":"box","process":{process},"root":{{"path":"rootfs"}},
        "mounts":[
          {{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]}},
          {{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}},
          {{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]}},
          {{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]}},
          {{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]}},
          {{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]}},
          {{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro","nosuid","noexec","nodev"]}}],
        "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"network"}},{{"type":"ipc"}},{{"type":"uts"}},{{"type":"mount"}},{{"type":"cgroup"}}],
          "maskedPaths":["/proc/kcore","/proc/timer_list","/sys/firmware"],"readonlyPaths":["/proc/sys","/proc/bus"]
          {more}}}}}"#
    )
}

const CAPS: &str = r#"["CAP_CHOWN","CAP_DAC_OVERRIDE","CAP_FOWNER","CAP_KILL","CAP_SETGID","CAP_SETUID","CAP_SETPCAP","CAP_NET_BIND_SERVICE","CAP_SYS_CHROOT","CAP_MKNOD"]"#;

fn process(args: &[&str], more: &str) -> String {
    let args = serde_json::to_string(args).unwrap();
    format!(
        r#"{{"args":{args},"cwd":"/","env":["PATH=/bin","A=b c"],"noNewPrivileges":true,
        "capabilities":{{"bounding":{CAPS},"effective":{CAPS},"permitted":{CAPS}}}{more}}}"#
    )
}

fn shell(script: &str) -> String {
    process(&["sh", "-c", script], "")
}

fn rootfs() -> Rootfs {
    let layer = Filesystem { fstype: "erofs".into(), source: "/dev/vda".into(), options: vec![] };
    let writable =
        Filesystem { fstype: "tmpfs".into(), source: "tmpfs".into(), options: vec!["size=64m".into()] };
    Rootfs { layers: vec![layer], writable: Some(writable), ..Rootfs::default() }
}

fn create(id: &str, spec: String, stdio: Stdio) -> Result<CreateContainerResponse, CallError> {
    create_with(id, spec, stdio, None)
}

fn create_with(
    id: &str,
    spec: String,
    stdio: Stdio,
    seccomp: Option<Seccomp>,
) -> Result<CreateContainerResponse, CallError> {
    let request = CreateContainerRequest {
        id: id.into(),
        spec,
        rootfs: Some(rootfs()),
        stdio: Some(stdio),
        seccomp,
        ..CreateContainerRequest::default()
    };
    call("CreateContainer", &request)
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container: id.into() }
}

fn start(id: &str) {
    call::<Empty>("StartContainer", &container(id)).unwrap();
}

fn wait(id: &str, exec: &str) -> WaitProcessResponse {
    call("WaitProcess", &ProcessRequest { container: id.into(), exec: exec.into(), bound: false }).unwrap()
}

fn delete(id: &str) {
    call::<Empty>("DeleteContainer", &container(id)).unwrap();
    assert!(!std::path::Path::new("/sys/fs/cgroup").join(id).exists());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(&format!("/run/containers/{id}")), "{mounts}");
}

const OUT: Stdio = Stdio { stdin: false, stdout: true, stderr: false };

fn text(mut socket: UnixStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

/// Runs to the end: exit and output.
fn run_spec(id: &str, spec: String) -> (WaitProcessResponse, String) {
    run_with(id, spec, None)
}

fn run_with(id: &str, spec: String, seccomp: Option<Seccomp>) -> (WaitProcessResponse, String) {
    create_with(id, spec, OUT, seccomp).unwrap();
    let out = stream(id, "", Kind::Stdout, "").unwrap();
    start(id);
    let output = text(out);
    let exit = wait(id, "");
    delete(id);
    (exit, output)
}

fn run(id: &str, script: &str) -> (WaitProcessResponse, String) {
    run_spec(id, spec(&shell(script), ""))
}

fn exec(id: &str, exec: &str, process: &str, stdio: Stdio) -> Result<ExecProcessResponse, CallError> {
    let request = ExecProcessRequest {
        container: id.into(),
        exec: exec.into(),
        process: process.into(),
        stdio: Some(stdio),
        hold: false,
    };
    call("ExecProcess", &request)
}

fn kill(id: &str, signal: u32, all: bool) {
    let request = SignalProcessRequest { container: id.into(), exec: String::new(), signal, all };
    call::<Empty>("SignalProcess", &request).unwrap();
}

/// A container that sleeps.
fn sleeper(id: &str, more: &str) {
    create(id, spec(&shell("trap 'exit 7' TERM; while :; do sleep 0.1; done"), more), Stdio::default())
        .unwrap();
    start(id);
}

fn end(id: &str) {
    kill(id, 9, true);
    wait(id, "");
    delete(id);
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn a_container_is_a_world_of_its_own() {
    let (exit, output) = run(
        "world",
        r#"echo $$; hostname; id -u; pwd; echo $A $HOME; ls /dev; cat /proc/sys/kernel/hostname; ls / ; mount | wc -l
        ls -l /proc/self/fd/ | wc -l; ip addr | grep -c 127.0.0.1; cat /proc/self/cgroup; grep -i cap /proc/self/status; cat /proc/kcore | wc -c; echo x > /proc/sys/kernel/hostname || echo readonly
        cat /sys/fs/cgroup/memory.max; cat /proc/self/oom_score_adj; grep NoNewPrivs /proc/self/status; umask; echo done; exit 3"#,
    );
    println!("{output}");
    assert_eq!((exit.exit_code, exit.signal), (3, 0));
    assert!(output.starts_with("1\nbox\n0\n/\nb c /root\n"), "{output}");
    for word in
        ["null", "ptmx", "readonly", "0::/\n", "CapBnd:\t00000000080405eb", "NoNewPrivs:\t1", "0022", "done"]
    {
        assert!(output.contains(word), "{word} in {output}");
    }
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn not_a_byte_is_lost_at_an_immediate_exit() {
    let (exit, output) = run("bytes", "dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\\0' x; echo end");
    assert_eq!(exit.exit_code, 0);
    assert_eq!(output.len(), 100 * 1024 * 1024 + 4);
    assert!(output.ends_with("xend\n"));
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn stdin_ends_when_the_host_says_so() {
    create(
        "stdin",
        spec(&process(&["wc", "-c"], ""), ""),
        Stdio { stdin: true, stdout: true, stderr: false },
    )
    .unwrap();
    let error = call::<Empty>("StartContainer", &container("stdin")).unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition));
    let mut stdin = stream("stdin", "", Kind::Stdin, "").unwrap();
    let out = stream("stdin", "", Kind::Stdout, "").unwrap();
    assert!(stream("stdin", "", Kind::Stdout, "").unwrap_err().contains("already"));
    assert!(stream("stdin", "", Kind::Stderr, "").unwrap_err().contains("not asked for"));
    start("stdin");
    stdin.write_all(&vec![b'x'; 1_000_000]).unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(text(out).trim(), "1000000");
    assert_eq!(wait("stdin", "").exit_code, 0);
    delete("stdin");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn stdin_left_open_does_not_keep_anything_alive() {
    create("open", spec(&shell("echo hi"), ""), Stdio { stdin: true, stdout: true, stderr: true }).unwrap();
    let _stdin = stream("open", "", Kind::Stdin, "").unwrap();
    let out = stream("open", "", Kind::Stdout, "").unwrap();
    let err = stream("open", "", Kind::Stderr, "").unwrap();
    start("open");
    assert_eq!(text(out), "hi\n");
    assert_eq!(text(err), "");
    assert_eq!(wait("open", "").exit_code, 0);
    delete("open");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn errors_of_exec_have_their_own_codes() {
    for (args, code, words) in [
        (&["nonesuch"][..], Code::NotFound, "exec: \"nonesuch\": executable file not found in $PATH"),
        (&["/etc"], Code::PermissionDenied, "permission denied"),
        (&["/nonesuch"], Code::NotFound, "no such file or directory"),
    ] {
        create("bad", spec(&process(args, ""), ""), Stdio::default()).unwrap();
        let error = call::<Empty>("StartContainer", &container("bad")).unwrap_err();
        assert_eq!(error.code(), Some(code), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        delete("bad");
        sleeper("good", "");
        let error = exec("good", "e", &process(args, ""), Stdio::default()).unwrap_err();
        assert_eq!(error.code(), Some(code), "{error}");
        end("good");
    }
    let error =
        create("bad", spec(&process(&["a"], r#","user":{"username":"nobody2"}"#), ""), OUT).unwrap_err();
    assert!(error.to_string().contains("no matching entries in passwd file"), "{error}");
    let (exit, _) = run("bad", "exit 4");
    assert_eq!(exit.exit_code, 4);
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn exec_joins_the_container() {
    sleeper("host", "");
    let both = Stdio { stdin: false, stdout: true, stderr: true };
    let response = exec(
        "host",
        "one",
        &shell("hostname; echo $$; cat /proc/self/cgroup; ps | grep -c sleep; echo err >&2; exit 5"),
        both,
    );
    assert!(response.unwrap().pid > 1);
    let out = stream("host", "one", Kind::Stdout, "").unwrap();
    let err = stream("host", "one", Kind::Stderr, "").unwrap();
    let output = text(out);
    assert!(output.starts_with("box\n") && output.contains("0::/\n"), "{output}");
    assert_eq!(text(err), "err\n");
    let exit = wait("host", "one");
    assert_eq!(exit.exit_code, 5);
    assert_eq!(wait("host", "one"), exit);
    // A background child that keeps the pipe does not keep the stream.
    exec("host", "two", &shell("sleep 1000 & echo bg"), OUT).unwrap();
    assert_eq!(text(stream("host", "two", Kind::Stdout, "").unwrap()), "bg\n");
    assert_eq!(wait("host", "two").exit_code, 0);
    let list: ListProcessesResponse = call("ListProcesses", &container("host")).unwrap();
    assert!(list.processes.iter().any(|p| p.container_pid == 1), "{list:?}");
    assert!(list.processes.iter().any(|p| p.command == "sleep 1000"), "{list:?}");
    let stats: StatsResponse = call("Stats", &container("host")).unwrap();
    assert!(stats.memory_usage_bytes > 0 && stats.cpu_usage_ns > 0 && stats.pids_current >= 2, "{stats:?}");
    kill("host", 15, false);
    assert_eq!(wait("host", "").exit_code, 7);
    let error = exec("host", "three", &shell("true"), OUT).unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition));
    delete("host");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn a_terminal_is_one() {
    let process = process(
        &["sh", "-c", "tty; stty size; read x; echo got $x; ls -l /dev/console"],
        r#","terminal":true,"consoleSize":{"height":30,"width":100}"#,
    );
    create("tty", spec(&process, ""), Stdio { stdin: true, stdout: true, stderr: false }).unwrap();
    let mut terminal = stream("tty", "", Kind::Terminal, "").unwrap();
    let size = ResizeTerminalRequest { container: "tty".into(), exec: String::new(), rows: 41, columns: 120 };
    call::<Empty>("ResizeTerminal", &size).unwrap();
    start("tty");
    terminal.write_all(b"word\n").unwrap();
    let output = text(terminal);
    assert!(
        output.contains("/dev/pts/0") && output.contains("41 120") && output.contains("got word"),
        "{output}"
    );
    assert_eq!(wait("tty", "").exit_code, 0);
    delete("tty");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn limits_hold_and_the_agent_lives() {
    let (exit, _) =
        run_spec("hog", spec(&shell("tail /dev/zero"), r#","resources":{"memory":{"limit":33554432}}"#));
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (137, 9, true));
    let (exit, _) = run("hog2", "tail /dev/zero");
    assert_eq!((exit.exit_code, exit.oom_killed), (137, true));
    let (exit, output) = run_spec(
        "fork",
        spec(
            &shell("i=0; while [ $i -lt 30 ]; do sleep 5 & i=$((i+1)); done; echo never"),
            r#","resources":{"pids":{"limit":10}}"#,
        ),
    );
    assert!(exit.exit_code != 0 && !output.contains("never"), "{exit:?} {output}");
    let rules = r#","resources":{"devices":[{"allow":false,"access":"rwm"}]},"devices":[{"path":"/dev/disk","type":"b","major":254,"minor":0}]"#;
    let (_, output) =
        run_spec("devices", spec(&shell("echo a > /dev/null && echo null; head -c1 /dev/disk 2>&1"), rules));
    assert!(output.starts_with("null\n") && output.contains("not permitted"), "{output}");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn freezes_updates_and_kills() {
    sleeper("ice", "");
    call::<Empty>("PauseContainer", &container("ice")).unwrap();
    call::<Empty>("ResumeContainer", &container("ice")).unwrap();
    let limits = r#"{"memory":{"limit":50331648},"cpu":{"quota":50000,"period":100000}}"#;
    let update = UpdateContainerRequest { container: "ice".into(), resources: limits.into() };
    call::<Empty>("UpdateContainer", &update).unwrap();
    let stats: StatsResponse = call("Stats", &container("ice")).unwrap();
    assert_eq!(stats.memory_limit_bytes, 50331648);
    let error = call::<Empty>("DeleteContainer", &container("ice")).unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition));
    call::<Empty>("PauseContainer", &container("ice")).unwrap();
    kill("ice", 9, true);
    let exit = wait("ice", "");
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (137, 9, false));
    delete("ice");
    create("never", spec(&shell("true"), ""), OUT).unwrap();
    delete("never");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn a_user_is_one_and_seccomp_binds() {
    let user = r#","user":{"uid":1000,"gid":1001,"additionalGids":[5,6],"umask":63}"#;
    let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
        "syscalls":[{"names":["mkdir","mkdirat","nonesuch"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#;
    let program = Profile::from_json(profile, &[]).and_then(|profile| Program::compile(&profile)).unwrap();
    let filter = Seccomp { program: program.to_bytes(), flags: program.flags };
    let script = "id; umask; echo hi > /dev/stdout; mkdir /tmp/x 2>&1; grep -i -E 'seccomp:|CapEff' /proc/self/status; touch /x 2>&1";
    let (_, output) = run_with("user", spec(&process(&["sh", "-c", script], user), ""), Some(filter));
    for word in [
        "uid=1000 gid=1001",
        "groups=5,6",
        "0077",
        "hi",
        "not implemented",
        "Seccomp:\t2",
        "CapEff:\t0000000000000000",
    ] {
        assert!(output.contains(word), "{word} in {output}");
    }
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn a_user_namespace_works() {
    let maps = r#""uidMappings":[{"containerID":0,"hostID":0,"size":65536}],"gidMappings":[{"containerID":0,"hostID":0,"size":65536}]"#;
    let spec = spec(&shell("cat /proc/self/uid_map; id -u; echo ok > /dev/null; ls -l /dev/null; cat /sys/fs/cgroup/cgroup.procs | wc -l"), &format!(",{maps}"))
        .replace(r#"{"type":"pid"}"#, r#"{"type":"pid"},{"type":"user"}"#);
    let (exit, output) = run_spec("userns", spec);
    assert_eq!(exit.exit_code, 0, "{output}");
    assert!(output.contains("65536\n0\n"), "{output}");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn archives_go_in_and_out() {
    sleeper("cp", "");
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o640);
    header.set_uid(12);
    header.set_gid(13);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, "dir/file", &b"hello"[..]).unwrap();
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    link.set_uid(0);
    link.set_gid(0);
    link.set_mode(0o777);
    archive.append_link(&mut link, "dir/link", "/etc/passwd").unwrap();
    let bytes = archive.into_inner().unwrap();
    let mut socket = stream("cp", "", Kind::ArchiveIn, "/tmp").unwrap();
    socket.write_all(&bytes).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let reply: StreamReply = read_message(&mut socket).unwrap();
    assert_eq!(reply.error, "");
    exec("cp", "look", &shell("ls -ln /tmp/dir; cat /tmp/dir/file"), OUT).unwrap();
    let output = text(stream("cp", "look", Kind::Stdout, "").unwrap());
    assert!(
        output.contains("-rw-r-----    1 12       13")
            && output.contains("link -> /etc/passwd")
            && output.ends_with("hello"),
        "{output}"
    );
    kill("cp", 9, true);
    wait("cp", "");
    // Stopped, but not deleted.
    let mut bytes = Vec::new();
    stream("cp", "", Kind::ArchiveOut, "/tmp/dir").unwrap().read_to_end(&mut bytes).unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let names: Vec<_> =
        archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
    assert!(names.contains(&"dir/file".to_owned()) && names.contains(&"dir/link".to_owned()), "{names:?}");
    assert!(stream("cp", "", Kind::ArchiveOut, "/nonesuch").unwrap_err().contains("No such file"));
    delete("cp");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn bad_requests_harm_nobody() {
    let mut noise = UnixStream::connect("/run/agent/agent").unwrap();
    noise.write_all(&[0xff; 64]).unwrap();
    assert_eq!(noise.read(&mut [0; 8]).unwrap_or(0), 0);
    let error = call::<Empty>("Nonesuch", &Empty {}).unwrap_err();
    assert_eq!(error.code(), Some(Code::Unimplemented));
    let error = create("../x", spec(&shell("true"), ""), OUT).unwrap_err();
    assert_eq!(error.code(), Some(Code::InvalidArgument));
    let missing = CreateContainerRequest {
        id: "missing".into(),
        spec: spec(&shell("true"), ""),
        rootfs: Some(Rootfs {
            layers: vec![Filesystem { fstype: "erofs".into(), source: "/dev/vdz".into(), options: vec![] }],
            ..Rootfs::default()
        }),
        ..Default::default()
    };
    let error = call::<CreateContainerResponse>("CreateContainer", &missing).unwrap_err();
    assert!(error.to_string().contains("/dev/vdz"), "{error}");
    let info: GuestInfo = call(
        "Configure",
        &ConfigureRequest {
            hostname: "guest".into(),
            entropy: vec![7; 64],
            realtime_ns: 1_800_000_000_000_000_000,
            ..ConfigureRequest::default()
        },
    )
    .unwrap();
    assert!(info.memory_bytes > 0 && info.kernel_release.starts_with("6."), "{info:?}");
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), "guest\n");
}

#[test]
#[ignore = "see tests/run-in-guest"]
fn many_at_a_time_leave_nothing() {
    let threads: Vec<_> = (0..8)
        .map(|n| {
            std::thread::spawn(move || {
                for round in 0..3 {
                    let (exit, output) = run(&format!("many-{n}-{round}"), &format!("echo {n}; exit {n}"));
                    assert_eq!((exit.exit_code, output), (n, format!("{n}\n")));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains("/run/layers"), "{mounts}");
}

/// With QEMU's -icount shift=1 a nanosecond is half an instruction.
#[test]
#[ignore = "see tests/run-in-guest"]
fn what_it_costs() {
    let time = |what: &str, since: &mut std::time::Instant| {
        println!("{what}: {} us", since.elapsed().as_micros());
        *since = std::time::Instant::now();
    };
    for round in 0..20 {
        let id = format!("cost-{round}");
        let mut since = std::time::Instant::now();
        create(&id, spec(&process(&["true"], ""), ""), OUT).unwrap();
        time("create", &mut since);
        let out = stream(&id, "", Kind::Stdout, "").unwrap();
        time("connect", &mut since);
        start(&id);
        time("start", &mut since);
        wait(&id, "");
        time("run", &mut since);
        assert_eq!(text(out), "");
        time("read", &mut since);
        delete(&id);
        time("delete", &mut since);
    }
}
