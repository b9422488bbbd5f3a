//! What is looked at before anything is made: what the agent would refuse only in a machine that has been booted for it,
//! and what it never sees.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

/// What every config.json has.
pub(super) fn head(spec: &Value) -> Result<(), String> {
    let fields = spec.as_object().ok_or("it is no JSON object")?;
    let version = fields.get("ociVersion").ok_or("ociVersion is missing")?;
    match version.as_str() {
        Some(version) if version.starts_with("1.") => Ok(()),
        _ => Err(format!("ociVersion is {version}, 1.x is known")),
    }
}

/// `process`, as far as it can be told without the container's files.
pub(super) fn process(process: &Value) -> Result<(), String> {
    let fields = process.as_object().ok_or("process is no object")?;
    let words = |name: &str| -> Result<Vec<&str>, String> {
        let wrong = || format!("process.{name} is no list of strings");
        let Some(list) = fields.get(name) else { return Ok(Vec::new()) };
        let list = list.as_array().ok_or_else(wrong)?;
        let words: Vec<_> =
            list.iter().map(|word| word.as_str().ok_or_else(wrong)).collect::<Result<_, _>>()?;
        if let Some(word) = words.iter().find(|word| word.contains('\0')) {
            return Err(format!("process.{name}: {word:?} has a NUL byte in it"));
        }
        Ok(words)
    };
    if words("args")?.first().is_none_or(|program| program.is_empty()) {
        return Err("process.args names no program".into());
    }
    words("env")?;
    let cwd = fields.get("cwd").ok_or("process.cwd is missing")?;
    match cwd.as_str() {
        Some(cwd) if cwd.contains('\0') => Err(format!("process.cwd {cwd:?} has a NUL byte in it")),
        Some(cwd) if cwd.starts_with('/') => Ok(()),
        _ => Err(format!("process.cwd {cwd} is not an absolute path")),
    }
}

/// Fields for the host alone. Those that are for the guest are checked there.
pub(super) fn of_host(spec: &Value) -> Result<(), String> {
    for pointer in
        ["/linux/cgroupsPath", "/linux/resources/cpu/cpus", "/linux/resources/cpu/mems", "/hostname"]
    {
        if let Some(value) = spec.pointer(pointer)
            && value.as_str().is_none_or(|text| text.contains('\0'))
        {
            return Err(format!("{} is {value}, no plain text", name(pointer)));
        }
    }
    let Some(block) = spec.pointer("/linux/resources/blockIO") else { return Ok(()) };
    let fields = block.as_object().ok_or("linux.resources.blockIO is no object")?;
    for (key, value) in fields {
        let good = match value {
            Value::Array(list) => list.iter().all(|entry| {
                entry.as_object().is_some_and(|entry| entry.values().all(|number| number.as_u64().is_some()))
            }),
            number => number.as_u64().is_some(),
        };
        if !good {
            return Err(format!(
                "linux.resources.blockIO.{key} is {value}, which is not what is expected there"
            ));
        }
    }
    Ok(())
}

fn name(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// A member that is null is one that is not there: so it is for runc.
pub(super) fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// An absolute path without `.` and `..`, links not looked at.
pub(super) fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

/// The host's memory in bytes, and its processors.
pub(super) fn host() -> (u64, u64) {
    let about = rustix::system::sysinfo();
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    (about.totalram.saturating_mul(u64::from(about.mem_unit).max(1)), cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_process_is_looked_at_before_a_machine_is_made() {
        assert_eq!(process(&json!({"args": ["a"], "cwd": "/", "env": ["A=b"]})), Ok(()));
        for (bad, word) in [
            (json!([]), "no object"),
            (json!({"cwd": "/"}), "process.args"),
            (json!({"args": [], "cwd": "/"}), "process.args"),
            (json!({"args": [""], "cwd": "/"}), "process.args"),
            (json!({"args": "a", "cwd": "/"}), "process.args"),
            (json!({"args": ["a", 1], "cwd": "/"}), "process.args"),
            (json!({"args": ["a\0"], "cwd": "/"}), "NUL"),
            (json!({"args": ["a"], "cwd": "/", "env": {"A": "b"}}), "process.env"),
            (json!({"args": ["a"], "cwd": "/", "env": ["A=\0"]}), "NUL"),
            (json!({"args": ["a"]}), "process.cwd"),
            (json!({"args": ["a"], "cwd": "tmp"}), "absolute"),
            (json!({"args": ["a"], "cwd": "/\0"}), "NUL"),
            (json!({"args": ["a"], "cwd": 5}), "process.cwd"),
        ] {
            let error = process(&bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn what_only_the_host_sees_is_of_its_type() {
        let with = |resources: Value| of_host(&json!({"linux": {"resources": resources}}));
        let throttle = json!([{"major": 8, "minor": 0, "rate": 1}]);
        let good = json!({"cpu": {"cpus": "0"}, "blockIO": {"weight": 5, "throttleReadBpsDevice": throttle}});
        assert_eq!(with(good), Ok(()));
        for (bad, word) in [
            (json!({"cpu": {"cpus": 1}}), "cpu.cpus"),
            (json!({"cpu": {"mems": ["0"]}}), "cpu.mems"),
            (json!({"blockIO": 3}), "blockIO"),
            (json!({"blockIO": {"weight": "high"}}), "blockIO.weight"),
            (json!({"blockIO": {"throttleReadBpsDevice": [{"major": -1}]}}), "throttleReadBpsDevice"),
            (json!({"blockIO": {"throttleReadBpsDevice": [7]}}), "throttleReadBpsDevice"),
        ] {
            let error = with(bad.clone()).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn paths_lose_their_dots_and_nulls_are_gone() {
        assert_eq!(without_dots(Path::new("/a/./b/../c/")), Path::new("/a/c"));
        let mut value = json!({"a": null, "b": [{"c": null, "d": 1}]});
        drop_nulls(&mut value);
        assert_eq!(value, json!({"b": [{"d": 1}]}));
    }
}
