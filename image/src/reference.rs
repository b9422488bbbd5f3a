//! Image names, read the way docker reads them.
//!
//! Not by a general crate, because every `run` comes through here and those compile a large regular expression first.

use std::fmt;
use std::str::FromStr;

use crate::{Digest, Error, Result};

const DEFAULT_DOMAIN: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";

/// A full image name: `registry/repository` with a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    domain: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
    short: bool,
}

impl Reference {
    /// Reads `[registry[:port]/]repository[:tag][@sha256:…]`.
    ///
    /// Without a registry it is on `docker.io`, where a repository without a slash is below `library/`. Without a tag
    /// and digest the tag is `latest`.
    ///
    /// # Errors
    /// [`Error::BadName`] says which rule was broken.
    pub fn parse(name: &str) -> Result<Self> {
        let bad = |why| Error::BadName { name: name.chars().take(300).collect(), why };
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => {
                let digest =
                    digest.parse().map_err(|_| bad("after @ there must be sha256:<64 hex digits>"))?;
                (rest, Some(digest))
            }
            None => (name, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag).map_err(bad)?;
        }
        let (domain, repository, short) = match path.split_once('/') {
            Some((first, rest)) if is_domain(first) => (first, rest.to_owned(), false),
            Some(_) => (DEFAULT_DOMAIN, path.to_owned(), true),
            None => (DEFAULT_DOMAIN, format!("library/{path}"), true),
        };
        let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN } else { domain };
        check_domain(domain).map_err(bad)?;
        let repository = match repository.split_once('/') {
            None if domain == DEFAULT_DOMAIN => format!("library/{repository}"),
            _ => repository,
        };
        if domain.len() + 1 + repository.len() > 255 {
            return Err(bad("registry and repository are longer than 255 characters"));
        }
        repository.split('/').try_for_each(check_component).map_err(bad)?;
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self { domain: domain.to_owned(), repository, tag, digest, short })
    }

    /// The registry's host name and port.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository on the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, `latest` where neither tag nor digest was given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest's digest.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The name as the store keeps it: a digest beats a tag.
    pub(crate) fn stored_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{}/{}@{digest}", self.domain, self.repository),
            (None, Some(tag)) => format!("{}/{}:{tag}", self.domain, self.repository),
            (None, None) => format!("{}/{}", self.domain, self.repository),
        }
    }

    /// For a name given without a registry: what it would be as a locally built image.
    pub(crate) fn local_name(&self) -> Option<String> {
        if !self.short {
            return None;
        }
        let repository = self.repository.strip_prefix("library/").unwrap_or(&self.repository).to_owned();
        Some(Self { domain: "localhost".to_owned(), repository, ..self.clone() }.stored_name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.stored_name())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::parse(name)
    }
}

/// Docker's rule: the first part is a registry if it could not be a repository.
fn is_domain(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':', '['])
        || first.chars().any(|character| character.is_ascii_uppercase())
}

fn check_domain(domain: &str) -> Result<(), &'static str> {
    let (host, port) = match domain.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (domain, None),
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err("the registry's port must be a number up to 65535");
    }
    let good = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        }),
    };
    if good { Ok(()) } else { Err("the registry is not a host name") }
}

fn check_component(component: &str) -> Result<(), &'static str> {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if component.is_empty() {
        return Err("a part of the repository is empty");
    }
    if !component.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'_' | b'-')) {
        return Err("the repository may only have lower-case letters, digits and . _ - /");
    }
    if !component.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !component.ends_with(|c: char| c.is_ascii_alphanumeric())
    {
        return Err("each part of the repository must begin and end with a letter or digit");
    }
    let separators = component.split(|c: char| c.is_ascii_alphanumeric()).filter(|run| !run.is_empty());
    for run in separators {
        if !matches!(run, "." | "_" | "__") && run.bytes().any(|byte| byte != b'-') {
            return Err("separators in the repository are one . or _, two __, or any number of -");
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    if tag.is_empty() || tag.len() > 128 {
        return Err("a tag has 1 to 128 characters");
    }
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let first = tag.bytes().next().is_some_and(word);
    if !first || !tag.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-')) {
        return Err("a tag may only have letters, digits and _ . -, and begins with none of . -");
    }
    Ok(())
}

/// What an image was built for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Such as `linux`.
    pub os: String,
    /// In Go's words: `amd64`, `arm64`, …
    pub architecture: String,
    /// Such as `v8`; absent means any.
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this machine's architecture.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Whether an image for `os`, `architecture` and `variant` will do.
    pub(crate) fn accepts(&self, os: &str, architecture: &str, variant: Option<&str>) -> bool {
        os == self.os
            && architecture == self.architecture
            && (self.variant.is_none() || variant.is_none() || self.variant.as_deref() == variant)
    }
}

impl Default for Platform {
    fn default() -> Self {
        Self::host()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => {
                return Err(Error::BadName {
                    name: text.to_owned(),
                    why: "a platform is os/architecture or os/architecture/variant",
                });
            }
        };
        let own = |text: &&str| (*text).to_owned();
        Ok(Self { os: own(os), architecture: own(architecture), variant: variant.map(own) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn names_are_completed_as_docker_does() {
        let cases = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("user/app", "docker.io/user/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("localhost:5000/a/b/c:T.1-x", "localhost:5000/a/b/c:T.1-x"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("quay.io/a__b/c--d.e", "quay.io/a__b/c--d.e:latest"),
            ("UPPER/app", "UPPER/app:latest"),
        ];
        for (given, full) in cases {
            assert_eq!(Reference::parse(given).unwrap().stored_name(), full, "{given}");
        }
        let pinned = Reference::parse(&format!("busybox:1@{DIGEST}")).unwrap();
        assert_eq!(pinned.stored_name(), format!("docker.io/library/busybox@{DIGEST}"));
    }

    #[test]
    fn short_names_may_be_local() {
        let local = |name: &str| Reference::parse(name).unwrap().local_name();
        assert_eq!(local("busybox").as_deref(), Some("localhost/busybox:latest"));
        assert_eq!(local("a/b:1").as_deref(), Some("localhost/a/b:1"));
        assert_eq!(local("quay.io/b"), None);
    }

    #[test]
    fn broken_names_are_refused() {
        for name in [
            "",
            ":",
            "@",
            "/",
            "a//b",
            "Busybox",
            "a b",
            "-a",
            "a-",
            "a..b",
            "a/../b",
            "a_.b",
            "a:",
            "a:-x",
            "a@b",
            "a@sha256:12",
            "é",
            "host:99999/a",
            "bad_host.io/a",
            "../etc/passwd",
            "a\0b",
            "a%2fb",
            "x.y/",
        ] {
            assert!(Reference::parse(name).is_err(), "{name:?}");
        }
        assert!(Reference::parse(&"a".repeat(300)).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_is_stable(name in "\\PC{0,60}|[a-z0-9:@/._-]{0,40}") {
            if let Ok(reference) = Reference::parse(&name) {
                let stored = reference.stored_name();
                prop_assert_eq!(Reference::parse(&stored).unwrap().stored_name(), stored);
            }
        }
    }
}
