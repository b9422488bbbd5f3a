//! Directories and files of the host in a container: `-v` and `--mount`, as docker writes them and means them.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::options::{RunOptions, Tmpfs};
use crate::{Context, Error, Result};

/// One directory or file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path in the container, without `.`, `..` and superfluous slashes.
    pub target: String,
    /// Whether the container may only read it.
    pub read_only: bool,
    /// Whether a directory is made on the host where nothing is: `-v` does so, `--mount` does not.
    pub create: bool,
}

/// What `--mount` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mounting {
    /// `type=bind`.
    Bind(Bind),
    /// `type=tmpfs`.
    Tmpfs(Tmpfs),
}

impl Bind {
    /// Parses `HOST:CONTAINER[:OPTIONS]` of `-v`.
    ///
    /// # Errors
    /// Not of that form, a relative path, an option that is not known or cannot be had.
    pub fn parse_volume(text: &str) -> Result<Self> {
        let bad = |why: String| Error::Usage(format!("-v {text}: {why}"));
        let mut parts = text.split(':');
        let (source, target, options) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(source), Some(target), options, None) if !source.is_empty() && !target.is_empty() => {
                (source, target, options.unwrap_or_default())
            }
            (Some(_), None, ..) => {
                return Err(bad("there are no anonymous volumes: write HOST:CONTAINER, or --tmpfs".into()));
            }
            _ => return Err(bad("write it as HOST:CONTAINER[:ro]".into())),
        };
        let mut bind = Self {
            source: host_path(source).map_err(&bad)?,
            target: target_path(target).map_err(&bad)?,
            read_only: false,
            create: true,
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                "ro" | "readonly" => bind.read_only = true,
                "rw" => bind.read_only = false,
                // Labels of SELinux and hints for Docker Desktop: nothing to do.
                "z" | "Z" | "nocopy" | "consistent" | "cached" | "delegated" => {}
                other => propagation(other).map_err(&bad)?,
            }
        }
        Ok(bind)
    }

    /// Sees to it that there is something to be bound.
    ///
    /// # Errors
    /// There is not, and it cannot be made.
    pub fn prepare(&self) -> Result<()> {
        let path = self.source.display();
        match fs::metadata(&self.source) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.create => {
                fs::create_dir_all(&self.source).context(|| format!("cannot create {path} for -v"))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::Usage(format!(
                "bind source path does not exist: {path}; make it, or use -v, which makes a directory"
            ))),
            Err(source) => Err(Error::Io { what: format!("cannot use {path} of the host"), source }),
        }
    }
}

impl Mounting {
    /// Parses `key=value,…` of `--mount`.
    ///
    /// # Errors
    /// An unknown key or type, a missing path.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: String| Error::Usage(format!("--mount {text}: {why}"));
        let (mut kind, mut source, mut target, mut read_only) = ("volume".to_owned(), None, None, false);
        let mut tmpfs = Vec::new();
        for field in fields(text).map_err(&bad)? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_ascii_lowercase(), Some(value)),
                None => (field.to_ascii_lowercase(), None),
            };
            let needed = || value.ok_or_else(|| bad(format!("{key} needs a value")));
            let flag = || match value {
                None | Some("true" | "1") => Ok(true),
                Some("false" | "0") => Ok(false),
                Some(other) => Err(bad(format!("{key} is true or false, not {other:?}"))),
            };
            match key.as_str() {
                "type" => kind = needed()?.to_ascii_lowercase(),
                "source" | "src" => source = Some(needed()?.to_owned()),
                "target" | "destination" | "dst" => target = Some(needed()?.to_owned()),
                "readonly" | "ro" => read_only = flag()?,
                "bind-propagation" => propagation(needed()?).map_err(&bad)?,
                "consistency" => {}
                "tmpfs-size" => tmpfs.push(format!("size={}", crate::options::parse_size(needed()?)?)),
                "tmpfs-mode" => tmpfs.push(format!("mode={}", needed()?)),
                _ => {
                    return Err(bad(format!(
                        "{key:?} is not known; there are type, source, target, readonly, tmpfs-size and tmpfs-mode"
                    )));
                }
            }
        }
        let target = target.ok_or_else(|| bad("the target is missing".into()))?;
        let target = target_path(&target).map_err(&bad)?;
        match (kind.as_str(), source) {
            ("bind", Some(source)) => {
                let source = host_path(&source).map_err(&bad)?;
                Ok(Self::Bind(Bind { source, target, read_only, create: false }))
            }
            ("bind", None) => Err(bad("the source is missing".into())),
            ("tmpfs", None) => {
                tmpfs.extend(read_only.then(|| "ro".to_owned()));
                Ok(Self::Tmpfs(Tmpfs { path: target, options: tmpfs }))
            }
            ("tmpfs", Some(_)) => Err(bad("a tmpfs has no source".into())),
            (other, _) => Err(bad(format!("type {other:?} is not supported; there are bind and tmpfs"))),
        }
    }
}

/// Checks that no two mounts are on the same place.
pub(crate) fn check(options: &RunOptions) -> Result<()> {
    let mut targets: Vec<_> = options.binds.iter().map(|bind| bind.target.as_str()).collect();
    targets.extend(options.tmpfs.iter().map(|tmpfs| tmpfs.path.as_str()));
    targets.sort_unstable();
    match targets.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(twice) if !options.binds.is_empty() => {
            let target = twice.first().copied().unwrap_or_default();
            Err(Error::Usage(format!("duplicate mount point: {target}")))
        }
        _ => Ok(()),
    }
}

/// Fields of a line of comma-separated values: one in double quotes may have commas, and two double quotes for one.
fn fields(text: &str) -> Result<Vec<String>, String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                field.push('"');
                chars.next();
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field)),
            other => field.push(other),
        }
    }
    if quoted {
        return Err("a double quote is not closed".into());
    }
    fields.push(field);
    Ok(fields)
}

/// A path of the host: absolute, or relative to the working directory if it says so by `./` or `../`.
fn host_path(text: &str) -> Result<PathBuf, String> {
    let relative = [".", ".."].contains(&text) || text.starts_with("./") || text.starts_with("../");
    if !text.starts_with('/') && !relative {
        return Err(format!(
            "{text:?} would be a named volume, which there are none of: write an absolute path, or ./{text}"
        ));
    }
    std::path::absolute(text).map_err(|error| format!("cannot use {text:?}: {error}"))
}

/// A path of the container, made plain.
fn target_path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err(format!("the container's path {text:?} is not absolute"));
    }
    let mut parts = Vec::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy()),
            Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    if parts.is_empty() {
        return Err("the container's path cannot be its root".into());
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Mounts made later stay where they are made: guest and host have kernels of their own.
fn propagation(text: &str) -> Result<(), String> {
    match text {
        "private" | "rprivate" => Ok(()),
        "shared" | "rshared" | "slave" | "rslave" => Err(format!(
            "{text} is not possible: a mount made later cannot cross between the host's kernel and the container's"
        )),
        other => Err(format!("{other:?} is not an option; there are ro and rw")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn volumes() {
        let bind = Bind::parse_volume("/a/b:/c//d/../e/:ro,z").unwrap();
        assert_eq!(bind.source, Path::new("/a/b"));
        assert_eq!((bind.target.as_str(), bind.read_only, bind.create), ("/c/e", true, true));
        assert!(!Bind::parse_volume("/a:/b").unwrap().read_only);
        assert!(Bind::parse_volume("./x:/b").unwrap().source.is_absolute());
        for (bad, word) in [
            ("name:/b", "./name"),
            ("/only", "anonymous"),
            ("/a:b", "not absolute"),
            ("/a:/", "root"),
            ("/a:/b:rx", "rx"),
            ("/a:/b:rshared", "kernel"),
            ("/a:/b:ro:x", "HOST:CONTAINER"),
            (":/b", "HOST:CONTAINER"),
        ] {
            let error = Bind::parse_volume(bad).unwrap_err().to_string();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn mounts() {
        let Mounting::Bind(bind) = Mounting::parse("type=bind,\"src=/a,b\",dst=/c,readonly").unwrap() else {
            panic!()
        };
        assert_eq!(bind.source, Path::new("/a,b"));
        assert_eq!((bind.target.as_str(), bind.read_only, bind.create), ("/c", true, false));
        let tmpfs = Mounting::parse("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1777").unwrap();
        let options = vec!["size=1048576".to_owned(), "mode=1777".to_owned()];
        assert_eq!(tmpfs, Mounting::Tmpfs(Tmpfs { path: "/t".into(), options }));
        for (bad, word) in [
            ("type=bind,source=/a", "target"),
            ("type=bind,target=/a", "source"),
            ("type=volume,source=x,target=/a", "volume"),
            ("target=/a", "volume"),
            ("type=bind,source=a,target=/a", "./a"),
            ("type=bind,source=/a,target=/a,readonly=maybe", "maybe"),
            ("type=bind,sauce=/a,target=/a", "sauce"),
            ("type=bind,\"source=/a", "quote"),
        ] {
            let error = Mounting::parse(bad).unwrap_err().to_string();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn two_mounts_on_one_place_are_refused() {
        let binds = vec![Bind::parse_volume("/a:/c").unwrap(), Bind::parse_volume("/b:/c/").unwrap()];
        assert!(check(&RunOptions { binds, ..RunOptions::default() }).is_err());
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "[a-z/:.,=\"]{0,24}") {
            let _ = (Bind::parse_volume(&text), Mounting::parse(&text));
        }
    }
}
