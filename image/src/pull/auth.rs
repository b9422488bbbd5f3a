//! Credentials from where docker and podman keep them.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::PullOptions;
use crate::{Error, Reference, Result};

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: HashMap<String, Auth>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// User and password for a reference; none to try without.
pub(super) fn credentials(reference: &Reference, options: &PullOptions) -> Result<Option<(String, String)>> {
    if options.credentials.is_some() {
        return Ok(options.credentials.clone());
    }
    let files = match &options.auth_file {
        Some(path) => vec![path.clone()],
        None => usual_files(&|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)),
    };
    for path in files {
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && options.auth_file.is_none() => continue,
            Err(error) => return Err(Error::io("read credentials from", &path)(error)),
        };
        let file: AuthFile = serde_json::from_slice(&bytes).map_err(|source| Error::BadJson {
            what: format!("credentials file {}", path.display()),
            source,
        })?;
        if let Some(found) = look_up(&file, reference, &path)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Podman's places first, then docker's.
fn usual_files(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(path) = variable("REGISTRY_AUTH_FILE") {
        return vec![path];
    }
    let home = variable("HOME");
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let docker = variable("DOCKER_CONFIG").or_else(|| below_home(".docker"));
    let files = [
        variable("XDG_RUNTIME_DIR").map(|directory| directory.join("containers/auth.json")),
        variable("XDG_CONFIG_HOME")
            .or_else(|| below_home(".config"))
            .map(|home| home.join("containers/auth.json")),
        docker.map(|directory| directory.join("config.json")),
    ];
    files.into_iter().flatten().collect()
}

fn look_up(file: &AuthFile, reference: &Reference, path: &Path) -> Result<Option<(String, String)>> {
    let keys = keys(reference);
    for key in &keys {
        if let Some(helper) = file.cred_helpers.get(key)
            && let Some(found) = ask_helper(helper, key)
        {
            return Ok(Some(found));
        }
        let entry = file.auths.iter().find(|(name, _)| normalise(name) == *key);
        if let Some(text) = entry.and_then(|(_, entry)| entry.auth.as_deref()).filter(|text| !text.is_empty())
        {
            let broken = || Error::Registry {
                action: "log in to",
                reference: reference.domain().to_owned(),
                why: format!("the entry `{key}` in {} is not base64 of user:password", path.display()),
            };
            let decoded = STANDARD.decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let decoded = decoded.ok_or_else(broken)?;
            let (user, password) = decoded.split_once(':').ok_or_else(broken)?;
            return Ok(Some((user.to_owned(), password.trim_end_matches('\0').to_owned())));
        }
    }
    let store = file.creds_store.as_deref();
    Ok(store.and_then(|helper| ask_helper(helper, &server_name(reference))))
}

/// The most particular first: podman allows credentials for a namespace.
fn keys(reference: &Reference) -> Vec<String> {
    let mut keys = Vec::new();
    let mut key = format!("{}/{}", reference.domain(), reference.repository());
    loop {
        keys.push(key.clone());
        match key.rfind('/') {
            Some(slash) => key.truncate(slash),
            None => return keys,
        }
    }
}

/// Docker writes `https://index.docker.io/v1/` and the like.
fn normalise(key: &str) -> String {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = match rest {
        Some(rest) => rest.split('/').next().unwrap_or(rest),
        None => key.trim_end_matches('/'),
    };
    match key {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

fn server_name(reference: &Reference) -> String {
    match reference.domain() {
        "docker.io" => "https://index.docker.io/v1/".to_owned(),
        other => other.to_owned(),
    }
}

/// Runs `docker-credential-NAME get`. No answer means no credentials: the registry will say what it wants.
fn ask_helper(name: &str, server: &str) -> Option<(String, String)> {
    if name.is_empty() || name.contains('/') {
        return None;
    }
    let mut child = Command::new(format!("docker-credential-{name}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    // Dropped at once, so that the helper sees the end.
    let sent = child.stdin.take().map(|mut stdin| stdin.write_all(server.as_bytes()));
    let output = child.wait_with_output().ok()?;
    if !matches!(sent, Some(Ok(()))) || !output.status.success() {
        return None;
    }
    let answer: HelperAnswer = serde_json::from_slice(&output.stdout).ok()?;
    Some((answer.username, answer.secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(json: &str, reference: &str) -> Result<Option<(String, String)>> {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("auth.json");
        fs::write(&path, json).unwrap();
        let options = PullOptions { auth_file: Some(path), ..PullOptions::default() };
        credentials(&Reference::parse(reference).unwrap(), &options)
    }

    #[test]
    fn the_most_particular_entry_wins() {
        let json = r#"{"auths":{"quay.io":{"auth":"YTpi"},"quay.io/team":{"auth":"YzpkOmU="},
            "https://index.docker.io/v1/":{"auth":"ZjpnAAA="},"empty.io":{}}}"#;
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(ask(json, "quay.io/other/app").unwrap(), pair("a", "b"));
        assert_eq!(ask(json, "quay.io/team/app").unwrap(), pair("c", "d:e"));
        assert_eq!(ask(json, "busybox").unwrap(), pair("f", "g"));
        assert_eq!(ask(json, "empty.io/a").unwrap(), None);
        assert_eq!(ask(json, "elsewhere.io/a").unwrap(), None);
    }

    #[test]
    fn broken_files_are_errors() {
        assert!(ask("{", "a.io/b").is_err());
        assert!(ask(r#"{"auths":{"a.io":{"auth":"%%"}}}"#, "a.io/b").is_err());
        let options =
            PullOptions { auth_file: Some("/nonexistent/auth.json".into()), ..PullOptions::default() };
        assert!(credentials(&Reference::parse("a").unwrap(), &options).is_err());
    }

    #[test]
    fn the_usual_files() {
        let files = usual_files(&|name| (name == "HOME").then(|| "/h".into()));
        assert_eq!(
            files,
            [PathBuf::from("/h/.config/containers/auth.json"), "/h/.docker/config.json".into()]
        );
    }
}
