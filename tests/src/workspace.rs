//! Where things are in the source tree, and how to build cached things once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// Top of the source tree.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Everything that is made once and kept, outside git: `.cache`.
pub fn cache() -> PathBuf {
    root().join(".cache")
}

/// States and images of the emulated host: `.cache/host`.
pub fn host_cache() -> PathBuf {
    cache().join("host")
}

/// Directory of the release binaries, as cargo lays them out with this workspace's `build.target`.
pub fn release_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    root().join(target).join("x86_64-unknown-linux-gnu/release")
}

/// The directory `parent/name`, filled by `build` when it is not there yet.
///
/// It appears at once and whole (temporary directory, then rename), and two processes that ask for it at the same
/// time build it once.
pub fn cached_dir(parent: &Path, name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let wanted = parent.join(name);
    if wanted.is_dir() {
        return Ok(wanted);
    }
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let lock = File::create(parent.join("lock")).with_context(|| format!("lock {}", parent.display()))?;
    lock.lock().with_context(|| format!("lock {}", parent.display()))?;
    if wanted.is_dir() {
        return Ok(wanted);
    }
    let temporary = tempfile::Builder::new().prefix(".building-").tempdir_in(parent)?;
    build(temporary.path())?;
    fs::rename(temporary.keep(), &wanted).with_context(|| format!("publish {}", wanted.display()))?;
    Ok(wanted)
}

/// Runs a script of ours that prints, as the last line of its stdout, the path it made. Its stderr is shown.
pub fn path_from_script(script: &Path) -> Result<PathBuf> {
    let output = Command::new(script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("run {}", script.display()))?;
    if !output.status.success() {
        bail!("{} failed with {}; see its messages above", script.display(), output.status);
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    let path = stdout.lines().last().map(PathBuf::from).filter(|path| path.exists());
    path.with_context(|| format!("{} printed no existing path but '{}'", script.display(), stdout.trim_end()))
}

/// The first 16 hex digits of the SHA-256 of some words: a name for what they describe.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Name, size and modification time of a file, as words for [`key`]: cheaper than its contents and as good, since
/// whatever writes these files does so by creating them anew.
pub fn fingerprint(path: &Path) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let about = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok(format!("{} {} {}.{:09}", path.display(), about.size(), about.mtime(), about.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_directory_is_built_once_and_only_whole() {
        let parent = tempfile::tempdir().unwrap();
        let failed = cached_dir(parent.path(), "x", |dir| {
            fs::write(dir.join("half"), "")?;
            bail!("stopped half-way")
        });
        assert!(failed.is_err());
        assert!(!parent.path().join("x").exists());

        let mut builds = 0;
        for _ in 0..2 {
            let dir = cached_dir(parent.path(), "x", |dir| {
                builds += 1;
                Ok(fs::write(dir.join("whole"), "")?)
            });
            assert!(dir.unwrap().join("whole").exists());
        }
        assert_eq!(builds, 1);
        let left: Vec<_> = fs::read_dir(parent.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "only the lock and the directory: {left:?}");
    }

    #[test]
    fn keys_depend_on_where_words_end() {
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
        assert_eq!(key(["ab", "c"]).len(), 16);
    }
}
