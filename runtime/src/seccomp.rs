//! Which system calls a container may make: what was wished for, or what its bundle says, compiled for the agent.

use bulkhead_protocol::agent;
use bulkhead_seccomp::{Profile, Program};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::options::RunOptions;
use crate::{Context, Error, Result, spec};

/// Docker's own has 13 KiB.
const MAX_PROFILE: u64 = 1 << 20;

/// `--security-opt seccomp=…`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// The one that comes with Bulkhead.
    #[default]
    Default,
    /// None.
    Unconfined,
    /// A profile in docker's notation, as it was in its file.
    Profile(String),
}

impl Seccomp {
    /// Parses `unconfined`, `builtin` or the path of a profile, which is read.
    ///
    /// # Errors
    /// The file cannot be read, or is no profile.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "unconfined" => return Ok(Self::Unconfined),
            "builtin" => return Ok(Self::Default),
            _ => {}
        }
        let what = || format!("--security-opt seccomp={text}: cannot read the profile");
        let about = std::fs::metadata(text).context(what)?;
        if !about.is_file() || about.len() > MAX_PROFILE {
            return Err(Error::Usage(format!(
                "--security-opt seccomp={text}: that is no file of at most {MAX_PROFILE} bytes"
            )));
        }
        let json = std::fs::read_to_string(text).context(what)?;
        let checked = Profile::from_json(&json, &[]).and_then(|profile| Program::compile(&profile));
        checked.map_err(|why| Error::Usage(format!("--security-opt seccomp={text}: {why}")))?;
        Ok(Self::Profile(json))
    }
}

/// The filter for a container with these wishes; none for one that has none.
///
/// # Errors
/// With its capabilities the profile asks for what a guest cannot do.
pub(crate) fn filter(options: &RunOptions) -> Result<Option<agent::Seccomp>> {
    let capabilities = spec::capabilities(options);
    let bad = |why: bulkhead_seccomp::Error| Error::Usage(format!("--security-opt seccomp: {why}"));
    let profile = match &options.security.seccomp {
        Seccomp::Unconfined => return Ok(None),
        // As docker: who asks for a profile gets it, privileged or not.
        Seccomp::Default if options.privileged => return Ok(None),
        Seccomp::Default => Profile::default_with(&capabilities),
        Seccomp::Profile(json) => Profile::from_json(json, &capabilities).map_err(bad)?,
    };
    Program::compile(&profile).map(message).map(Some).map_err(bad)
}

/// Takes `linux.seccomp` out of a runtime-spec configuration, for the agent.
///
/// # Errors
/// What is wrong with it, and where.
pub fn take(spec: &mut Value) -> std::result::Result<Option<agent::Seccomp>, String> {
    let taken =
        spec.get_mut("linux").and_then(Value::as_object_mut).and_then(|linux| linux.remove("seccomp"));
    let Some(profile) = taken.filter(|profile| !profile.is_null()) else { return Ok(None) };
    let profile: Profile = serde_json::from_value(profile).map_err(|why| format!("linux.seccomp: {why}"))?;
    Program::compile(&profile).map(message).map(Some).map_err(|why| format!("linux.seccomp: {why}"))
}

fn message(program: Program) -> agent::Seccomp {
    agent::Seccomp { program: program.to_bytes(), flags: program.flags }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Security;

    fn with(seccomp: Seccomp, privileged: bool) -> Option<agent::Seccomp> {
        let security = Security { seccomp, ..Security::default() };
        filter(&RunOptions { security, privileged, ..RunOptions::default() }).unwrap()
    }

    #[test]
    fn privileged_is_unconfined_unless_a_profile_is_asked_for() {
        let profile = || Seccomp::Profile(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#.into());
        assert!(with(Seccomp::Default, false).is_some());
        assert!(with(Seccomp::Default, true).is_none() && with(Seccomp::Unconfined, false).is_none());
        assert!(with(profile(), true).is_some() && with(profile(), false).is_some());
    }

    #[test]
    fn a_bundles_profile_is_taken_and_checked() {
        let mut spec = serde_json::json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls":
            [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": []}]}}});
        let filter = take(&mut spec).unwrap().unwrap();
        assert!(filter.program.len().is_multiple_of(8) && spec.pointer("/linux/seccomp").is_none());
        assert_eq!(take(&mut spec), Ok(None));
        let mut bad = serde_json::json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}});
        assert!(take(&mut bad).unwrap_err().starts_with("linux.seccomp: not supported"));
    }
}
