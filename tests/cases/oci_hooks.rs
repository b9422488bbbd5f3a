//! Hooks of `bulkhead-oci`: when and where they run and what they are told, and what becomes of a container whose hooks
//! fail. Beside runc, which (Debian's 1.1) runs poststart hooks before the process instead of after it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use serde_json::{Value, json};

use crate::network::prepare;
use crate::oci::{Bundle, NEEDS, both, pid_in};

const KINDS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// What a hook has left in the file `seen/log`.
struct Seen {
    kind: String,
    words: String,
    network: String,
    state: Value,
}

/// A hook that runs a script; $0 is its kind.
fn hook(kind: &str, script: &str) -> Value {
    let env = ["A=b c", "PATH=/usr/bin:/bin"];
    json!({"path": "/bin/sh", "args": ["sh", "-c", script, kind, "x  y"], "env": env})
}

fn set(bundle: &Bundle, hooks: Value) -> Result<()> {
    bundle.change(|config| config["hooks"] = hooks)
}

/// Hooks of all kinds that note how they find themselves; the directory for that is in the container at the same path.
fn observed(bundle: &Bundle) -> Result<()> {
    let dir = bundle.dir.join("seen");
    fs::create_dir(&dir)?;
    bundle.applets(&["readlink", "echo"])?;
    let note = format!(
        "state=$(cat); echo \"$0|$1 $A ${{HOME-none}}|$(readlink /proc/self/ns/net)|$state\" >>{}/log",
        dir.display()
    );
    bundle.change(|config| {
        let hooks = KINDS.iter().map(|kind| ((*kind).to_owned(), json!([hook(kind, &note)])));
        config["hooks"] = hooks.collect::<serde_json::Map<_, _>>().into();
        config["annotations"] = json!({"some.key": "some value"});
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts
                .push(json!({"destination": dir, "type": "bind", "source": dir, "options": ["rbind", "rw"]}));
        }
    })
}

fn seen(bundle: &Bundle) -> Result<Vec<Seen>> {
    let log = fs::read_to_string(bundle.dir.join("seen/log"))?;
    let parse = |line: &str| {
        let mut parts = line.splitn(4, '|').map(str::to_owned);
        let mut next = || parts.next().with_context(|| format!("a hook said {line:?}"));
        let (kind, words, network) = (next()?, next()?, next()?);
        Ok(Seen { kind, words, network, state: serde_json::from_str(&next()?)? })
    };
    log.lines().map(parse).collect()
}

/// The kinds that have run, but for poststart with runc.
fn order(bundle: &Bundle) -> Result<Vec<String>> {
    let kinds = seen(bundle)?.into_iter().map(|seen| seen.kind);
    Ok(kinds.filter(|kind| bundle.is_ours() || kind != "poststart").collect())
}

test!(each_kind_runs_once_when_and_where_it_should, NEEDS);
fn each_kind_runs_once_when_and_where_it_should(host: &Host) -> Result<()> {
    both(host, |bundle| {
        observed(bundle)?;
        bundle.runs("while :; do sleep 1; done")?;
        let pid_file = bundle.dir.join("pid");
        bundle.apart(&["create", "--pid-file", &pid_file.display().to_string(), "c1"])?;
        let expected = |count: usize| -> Vec<_> {
            KINDS[..count].iter().filter(|kind| bundle.is_ours() || **kind != "poststart").copied().collect()
        };
        let ran = order(bundle)?;
        ensure!(ran == expected(3), "by the end of create: {ran:?}");
        let pid = pid_in(&pid_file)?;
        let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
        let (mine, its) = (network("self")?, network(&pid.to_string())?);
        bundle.call(&["start", "c1"])?.ok()?;
        let ran = order(bundle)?;
        ensure!(ran == expected(5), "by the end of start: {ran:?}");
        bundle.call(&["delete", "--force", "c1"])?.ok()?;
        let ran = order(bundle)?;
        ensure!(ran == expected(6), "by the end of delete: {ran:?}");

        for Seen { kind, words, network, state } in seen(bundle)? {
            ensure!(
                words == "x  y b c none" || (!bundle.is_ours() && words.starts_with("x  y b c")),
                "{kind}: {words}"
            );
            let inside = kind.ends_with("Container");
            let expected = if inside { &its } else { &mine };
            ensure!(Path::new(&network) == expected, "{kind} ran in {network}, not {}", expected.display());
            ensure!(state["id"] == "c1" && state["ociVersion"].is_string(), "{kind}: {state}");
            ensure!(state["bundle"] == bundle.dir.display().to_string(), "{kind}: {state}");
            ensure!(state["annotations"]["some.key"] == "some value", "{kind}: {state}");
            let status = match kind.as_str() {
                "startContainer" => "created",
                "poststart" if bundle.is_ours() => "running",
                "poststart" => continue,
                "poststop" => "stopped",
                _ => "creating",
            };
            ensure!(state["status"] == status, "{kind}: {state}");
            // runc's hooks inside are told the pid of the pid namespace that they are in.
            let told = state["pid"].as_i64().unwrap_or(0);
            let known = if kind == "poststop" { 0 } else { pid.into() };
            ensure!(told == known || (inside && !bundle.is_ours()), "{kind}, pid {known}: {state}");
        }
        bundle.nothing_left()
    })
}

test!(a_hook_that_fails_ends_what_it_belongs_to, NEEDS.deadline(120));
fn a_hook_that_fails_ends_what_it_belongs_to(host: &Host) -> Result<()> {
    both(host, |bundle| {
        bundle.runs("while :; do sleep 1; done")?;
        let marks = bundle.dir.join("marks");
        let mark = hook("poststop", &format!("echo x >>{}", marks.display()));
        for kind in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart"] {
            let second = hook(kind, &format!("echo second >>{}", marks.display()));
            set(bundle, json!({kind: [hook(kind, "echo why >&2; exit 37"), second], "poststop": [mark]}))?;
            let verb = if kind.starts_with("create") { ["create", "c1"] } else { ["run", "c1"] };
            let end = bundle.call(&verb)?.status_is(1).context(kind)?;
            // runc's hook inside fails where its words get lost.
            if bundle.is_ours() || kind != "startContainer" {
                end.stderr_has("hook #0")?.stderr_has("37")?.stderr_has("why")?;
            }
            bundle.call(&["state", "c1"])?.failed()?.stderr_has("does not exist").context(kind)?;
            if bundle.is_ours() {
                let marked = fs::read_to_string(&marks).unwrap_or_default();
                ensure!(marked == "x\n", "after {kind} failed, poststop and others have run: {marked:?}");
            }
            let _ = fs::remove_file(&marks);
        }
        // A namespace that was there before is entered too.
        let namespace = prepare(host, 1500)?;
        let told = bundle.dir.join("told");
        let script = format!("readlink /proc/self/ns/net >{}; exit 1", told.display());
        set(bundle, json!({"createContainer": [hook("createContainer", &script)]}))?;
        let path = |path: &str| {
            bundle.change(|config| {
                let namespaces = config["linux"]["namespaces"].as_array_mut().into_iter().flatten();
                for namespace in namespaces.filter(|namespace| namespace["type"] == "network") {
                    namespace["path"] = path.into();
                }
            })
        };
        path("/run/netns/box")?;
        bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has("hook #0")?;
        let inside = ["ip", "netns", "exec", "box", "readlink", "/proc/self/ns/net"];
        host.run(inside)?.ok()?.stdout_is(&fs::read_to_string(told)?)?;
        drop(namespace);
        path("")?;

        set(bundle, json!({"prestart": [{"path": "/no/such/hook"}]}))?;
        bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has("/no/such/hook")?;
        if bundle.is_ours() {
            // What fails after the end is told; those that follow run all the same.
            bundle.runs("true")?;
            let last = hook("poststop", &format!("echo last >{}", marks.display()));
            set(bundle, json!({"poststop": [hook("poststop", "echo why >&2; exit 37"), last]}))?;
            bundle.call(&["run", "c1"])?.ok()?.stderr_has("poststop hook #0")?.stderr_has("why")?;
            ensure!(fs::read_to_string(&marks)? == "last\n");
        }
        bundle.nothing_left()
    })
}

test!(a_hook_that_hangs_is_killed_with_its_children, NEEDS);
fn a_hook_that_hangs_is_killed_with_its_children(host: &Host) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("true")?;
    for (kind, verb) in
        [("createRuntime", "create"), ("createContainer", "create"), ("startContainer", "run")]
    {
        let mut hook = hook(kind, "sleep 7654 & sleep 7654");
        hook["timeout"] = 1.into();
        set(&bundle, json!({kind: [hook]}))?;
        let call = bundle.call(&[verb, "c1"])?;
        ensure!(call.took < Duration::from_secs(60), "{kind}: it took {:?}", call.took);
        call.status_is(1)?.stderr_has("hook #0")?.stderr_has("timeout of 1 second")?;
        bundle.nothing_left()?;
        host.eventually("its children end", Duration::from_secs(5), || {
            Ok(host.run(["pgrep", "-f", "sleep 7654"])?.status == 1)
        })?;
    }
    for (hook, word) in [
        (json!({"path": "bin/sh"}), "absolute"),
        (json!({"path": "/bin/sh", "timeout": 0}), "timeout"),
        (json!({"path": "/bin/sh", "timeout": "long"}), "hooks"),
        (json!({"path": "/bin/sh", "env": ["A"]}), "KEY=value"),
        (json!({"args": ["sh"]}), "path"),
    ] {
        set(&bundle, json!({"poststop": [hook]}))?;
        bundle.call(&["create", "c1"])?.status_is(1)?.stderr_has(word)?;
    }
    bundle.nothing_left()
}
