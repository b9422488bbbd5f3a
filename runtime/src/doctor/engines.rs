//! Do this host's container engines know of Bulkhead, and if not, which lines are to be added where?

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use toml::{Table, Value};

use super::{Check, Verdict};

/// Where services find programs: what systemd gives them when a unit says nothing else.
const SERVICE_PATH: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
const SHIM: &str = "containerd-shim-bulkhead-v2";
const RUNTIME: &str = "io.containerd.bulkhead.v2";
const OCI: &str = "bulkhead-oci";
/// Where containerd's CRI plugin has its settings: in files of version 2, and of version 3.
const CRI: [(i64, &str); 2] = [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")];

/// Looks at containerd, docker and podman below `root`, which is `/` but for tests.
#[must_use]
pub fn examine(root: &Path) -> Vec<Check> {
    vec![
        program("shim", root, SHIM),
        program("runtime", root, OCI),
        containerd(root),
        docker(root),
        podman(root),
    ]
}

fn find(root: &Path, program: &str) -> Option<PathBuf> {
    let mut places = SERVICE_PATH.iter().map(|dir| Path::new(dir).join(program));
    places.find(|path| below(root, path).is_file())
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn program(name: &'static str, root: &Path, program: &str) -> Check {
    match find(root, program) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::bad(
            name,
            Verdict::Failed,
            format!("{program} is in no directory where a service looks for programs"),
            "install it with `make install`, or link it into /usr/local/bin",
        ),
    }
}

/// What a file says; nothing when it is not there.
fn read(root: &Path, path: &str) -> Result<Option<String>, String> {
    match fs::read_to_string(below(root, Path::new(path))) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

/// The check of one engine: not installed, as it should be, or what is missing.
fn engine(
    name: &'static str,
    root: &Path,
    program: &str,
    look: impl FnOnce() -> Result<Result<String, String>, String>,
) -> Check {
    if find(root, program).is_none() {
        return Check::ok(name, "not installed");
    }
    match look() {
        Ok(Ok(found)) => Check::ok(name, found),
        Ok(Err(lines)) => Check::bad(name, Verdict::Warning, "it does not know of Bulkhead", lines),
        Err(error) => {
            Check::bad(name, Verdict::Failed, error, "correct the file: the engine cannot read it either")
        }
    }
}

fn containerd(root: &Path) -> Check {
    const FILE: &str = "/etc/containerd/config.toml";
    engine("containerd", root, "containerd", || {
        let text = read(root, FILE)?.unwrap_or_default();
        let settings: Table = text.parse().map_err(|error| format!("{FILE}: {error}"))?;
        let version = settings.get("version").and_then(Value::as_integer).unwrap_or(2);
        for (_, plugin) in CRI {
            let path = ["plugins", plugin, "containerd", "runtimes"];
            for (handler, runtime) in table(&settings, &path).into_iter().flatten() {
                if runtime.get("runtime_type").and_then(Value::as_str) == Some(RUNTIME) {
                    return Ok(Ok(format!(
                        "`ctr run --runtime {RUNTIME}`, and pods by the handler {handler}"
                    )));
                }
            }
        }
        let plugin = CRI.iter().find(|(known, _)| *known == version).map_or(CRI[0].1, |(_, plugin)| plugin);
        let version = if text.trim().is_empty() { "version = 2\n" } else { "" };
        Ok(Err(format!(
            "`ctr run --runtime {RUNTIME}` needs nothing; for pods add to {FILE} and restart containerd:\n{version}\
             [plugins.\"{plugin}\".containerd.runtimes.bulkhead]\nruntime_type = \"{RUNTIME}\"\n\
             pod_annotations = [\"dev.bulkhead.*\"]"
        )))
    })
}

fn table<'a>(settings: &'a Table, path: &[&str]) -> Option<&'a Table> {
    path.iter().try_fold(settings, |table, key| table.get(*key)?.as_table())
}

fn docker(root: &Path) -> Check {
    const FILE: &str = "/etc/docker/daemon.json";
    engine("docker", root, "dockerd", || {
        let text = read(root, FILE)?.unwrap_or_else(|| "{}".into());
        let settings: Json = serde_json::from_str(&text).map_err(|error| format!("{FILE}: {error}"))?;
        let runtimes = settings.get("runtimes").and_then(Json::as_object);
        for (name, runtime) in runtimes.into_iter().flatten() {
            let text = |key: &str| runtime.get(key).and_then(Json::as_str).unwrap_or_default();
            if text("path").ends_with(OCI) || text("runtimeType") == RUNTIME {
                return Ok(Ok(format!("`docker run --runtime {name}`")));
            }
        }
        let path = find(root, OCI).unwrap_or_else(|| Path::new("/usr/local/bin").join(OCI));
        Ok(Err(format!(
            "add to {FILE} and restart dockerd:\n\"runtimes\": {{\"bulkhead\": {{\"path\": \"{}\"}}}}",
            path.display()
        )))
    })
}

fn podman(root: &Path) -> Check {
    const FILES: [&str; 2] = ["/etc/containers/containers.conf", "/usr/share/containers/containers.conf"];
    engine("podman", root, "podman", || {
        for file in FILES {
            let text = read(root, file)?.unwrap_or_default();
            let settings: Table = text.parse().map_err(|error| format!("{file}: {error}"))?;
            for (name, paths) in table(&settings, &["engine", "runtimes"]).into_iter().flatten() {
                let mut paths = paths.as_array().into_iter().flatten().filter_map(Value::as_str);
                if paths.any(|path| path.ends_with(OCI)) {
                    return Ok(Ok(format!("`podman --runtime {name} run`")));
                }
            }
        }
        let path = find(root, OCI).unwrap_or_else(|| Path::new("/usr/local/bin").join(OCI));
        let path = path.display();
        Ok(Err(format!(
            "`podman --runtime {path} run` needs nothing; for a name add to {}:\n[engine.runtimes]\nbulkhead = [\"{path}\"]",
            FILES[0]
        )))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = below(dir.path(), Path::new(path));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    const PROGRAMS: [(&str, &str); 5] = [
        ("/usr/local/bin/bulkhead-oci", ""),
        ("/usr/local/bin/containerd-shim-bulkhead-v2", ""),
        ("/usr/bin/containerd", ""),
        ("/usr/sbin/dockerd", ""),
        ("/usr/bin/podman", ""),
    ];

    #[test]
    fn an_empty_host_lacks_the_programs_alone() {
        let checks = examine(host(&[]).path());
        let verdicts: Vec<_> = checks.iter().map(|check| check.verdict).collect();
        assert_eq!(verdicts, [Verdict::Failed, Verdict::Failed, Verdict::Ok, Verdict::Ok, Verdict::Ok]);
    }

    #[test]
    fn the_lines_that_it_prints_are_the_lines_that_it_wants() {
        let checks = examine(host(&PROGRAMS).path());
        let lines = |index: usize| checks[index].advice.split_once('\n').unwrap().1.to_owned();
        assert!(checks[2..].iter().all(|check| check.verdict == Verdict::Warning), "{checks:?}");
        let docker = format!("{{{}}}", lines(3));
        let (containerd, podman) = (lines(2), lines(4));
        let more = [
            ("/etc/containerd/config.toml", containerd.as_str()),
            ("/etc/docker/daemon.json", &docker),
            ("/etc/containers/containers.conf", &podman),
        ];
        let checks = examine(host(&[&PROGRAMS[..], &more[..]].concat()).path());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
        // A file of containerd 2, which has another place for them.
        let newer = [("/etc/containerd/config.toml", "version = 3\n[plugins]\n")];
        let checks = examine(host(&[&PROGRAMS[..], &newer[..]].concat()).path());
        assert!(checks[2].advice.contains("io.containerd.cri.v1.runtime"), "{checks:?}");
    }

    #[test]
    fn a_file_that_does_not_parse_is_named() {
        for (file, index) in [
            ("/etc/containerd/config.toml", 2),
            ("/etc/docker/daemon.json", 3),
            ("/etc/containers/containers.conf", 4),
        ] {
            let bad = [(file, "[[{")];
            let checks = examine(host(&[&PROGRAMS[..], &bad[..]].concat()).path());
            assert_eq!(checks[index].verdict, Verdict::Failed);
            assert!(checks[index].found.contains(file), "{checks:?}");
        }
    }
}
