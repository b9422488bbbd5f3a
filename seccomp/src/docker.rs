//! Profiles as docker and podman keep them in files: rules may depend on capabilities, machine and kernel.

use std::borrow::Cow;

use serde::Deserialize;

use crate::{Error, Profile, Rule};

/// What the guest is to rules that depend on it.
const MACHINE: &str = "amd64";
/// Oldest kernel that Bulkhead's guests have.
const KERNEL: (u32, u32) = (6, 12);

/// A profile with rules that may not apply. One of the runtime-spec is one, too.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(flatten)]
    profile: Profile,
    #[serde(default)]
    arch_map: Vec<Machine>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Machine {
    architecture: String,
    #[serde(default)]
    sub_architectures: Vec<String>,
}

/// `includes` and `excludes` of a rule.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Condition {
    caps: Vec<String>,
    arches: Vec<String>,
    min_kernel: String,
}

#[derive(Deserialize)]
struct Conditional {
    #[serde(flatten)]
    rule: Rule,
    /// Before there were several.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

impl Profile {
    /// Reads a profile of docker's, podman's or the runtime-spec's, for a container whose bounding set has `capabilities`.
    ///
    /// # Errors
    /// It is none.
    pub fn from_json(json: &str, capabilities: &[&str]) -> Result<Self, Error> {
        let wrong = |error: serde_json::Error| Error(format!("it is no seccomp profile: {error}"));
        let mut value: serde_json::Value = serde_json::from_str(json).map_err(wrong)?;
        drop_nulls(&mut value);
        let fields = value.as_object_mut().ok_or_else(|| Error("it is no JSON object".into()))?;
        if !fields.contains_key("defaultAction") {
            return Err(Error("it has no defaultAction, which every seccomp profile has".into()));
        }
        let rules = fields.remove("syscalls").unwrap_or_else(|| serde_json::json!([]));
        let File { mut profile, arch_map } = serde_json::from_value(value).map_err(wrong)?;
        let syscalls: Vec<Conditional> = serde_json::from_value(rules).map_err(wrong)?;
        if let Some(machine) = arch_map.into_iter().find(|machine| machine.architecture == "SCMP_ARCH_X86_64")
        {
            let all = std::iter::once(machine.architecture).chain(machine.sub_architectures);
            profile.architectures.extend(all.map(Cow::from));
        }
        for Conditional { mut rule, name, includes, excludes } in syscalls {
            rule.names.extend(name.map(Cow::from));
            let included = match &includes {
                Some(wanted) => wanted.holds(capabilities)?,
                None => true,
            };
            let excluded = match &excludes {
                Some(unwanted) => unwanted.any_holds(capabilities)?,
                None => false,
            };
            if included && !excluded {
                profile.syscalls.push(rule);
            }
        }
        Ok(profile)
    }
}

/// Docker writes null for what is empty.
fn drop_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(entries) => entries.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

impl Condition {
    /// `includes`: all of it.
    fn holds(&self, capabilities: &[&str]) -> Result<bool, Error> {
        let caps = self.caps.iter().all(|cap| capabilities.contains(&cap.as_str()));
        Ok(caps && (self.arches.is_empty() || self.has_machine()) && self.kernel()? != Some(false))
    }

    /// `excludes`: any of it.
    fn any_holds(&self, capabilities: &[&str]) -> Result<bool, Error> {
        let caps = self.caps.iter().any(|cap| capabilities.contains(&cap.as_str()));
        Ok(caps || self.has_machine() || self.kernel()? == Some(true))
    }

    fn has_machine(&self) -> bool {
        self.arches.iter().any(|machine| machine == MACHINE)
    }

    /// Whether the guest's kernel is as new, if that is asked.
    fn kernel(&self) -> Result<Option<bool>, Error> {
        if self.min_kernel.is_empty() {
            return Ok(None);
        }
        let wrong = || Error(format!("minKernel {:?} is no version of a kernel", self.min_kernel));
        let (major, minor) = self.min_kernel.split_once('.').ok_or_else(wrong)?;
        let wanted: (u32, u32) = (major.parse().map_err(|_| wrong())?, minor.parse().map_err(|_| wrong())?);
        Ok(Some(KERNEL >= wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
                    {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": null}],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": {}, "excludes": {}},
            {"name": "write", "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390"]}},
            {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
            {"names": ["arm_sync"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
            {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}}]}"#;

    #[test]
    fn rules_that_do_not_apply_are_left_out() {
        let names = |capabilities: &[&str]| -> Vec<String> {
            let profile = Profile::from_json(FILE, capabilities).unwrap();
            assert_eq!(profile.architectures.len(), 3);
            profile.syscalls.iter().flat_map(|rule| rule.names.iter().map(|name| name.to_string())).collect()
        };
        assert_eq!(names(&[]), ["read", "write", "clone", "ptrace", "arch_prctl"]);
        assert_eq!(names(&["CAP_SYS_ADMIN"]), ["read", "write", "mount", "ptrace", "arch_prctl"]);
    }

    #[test]
    fn what_is_no_profile_is_told() {
        for (json, words) in [
            ("", "no seccomp profile"),
            ("[]", "no JSON object"),
            ("{}", "no defaultAction"),
            (r#"{"defaultAction": 1}"#, "no seccomp profile"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": 5}]}"#, "no seccomp profile"),
            (r#"{"defaultAction": "A", "syscalls": [{"includes": {"minKernel": "x"}}]}"#, "minKernel"),
        ] {
            let error = Profile::from_json(json, &[]).unwrap_err().to_string();
            assert!(error.contains(words), "{json}: {error}");
        }
    }

    proptest! {
        #[test]
        fn noise_is_an_error(text in "\\PC{0,60}") {
            let _ = Profile::from_json(&text, &[]);
        }
    }
}
