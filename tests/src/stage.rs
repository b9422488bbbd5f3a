//! What is under test, built and laid out as an installation would be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{initramfs, workspace};

/// Images loaded into the store while the host is prepared.
const LOADED: &[&str] = &["busybox", "python", "redis"];

/// Files to be put under a prefix like /usr/local.
#[derive(Debug, Default)]
pub struct Layout {
    files: Vec<(PathBuf, String)>,
    /// What `make install` puts there.
    install: Option<Install>,
}

/// What `make install` takes, besides the release binaries.
#[derive(Debug)]
struct Install {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Layout {
    /// Builds what is under test, as far as it is not built, and says where it goes.
    ///
    /// With BULKHEAD_TEST_NO_BUILD set, takes what is there.
    pub fn product() -> Result<Self> {
        let release = workspace::release_dir();
        if std::env::var_os("BULKHEAD_TEST_NO_BUILD").is_none() {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let built = Command::new(cargo)
                .args([
                    "build",
                    "--quiet",
                    "--release",
                    "-p",
                    "bulkhead",
                    "-p",
                    "bulkhead-oci",
                    "-p",
                    "bulkhead-shim",
                ])
                .args(["-p", "vmm", "-p", "guest-agent"])
                .current_dir(workspace::root())
                .stdin(Stdio::null())
                .status()
                .context("run cargo")?;
            if !built.success() {
                bail!("what is under test does not build; see cargo's messages above");
            }
        }
        let agent = release.join("guest-agent");
        let archive = release.join("bulkhead-initramfs.cpio");
        let agent = fs::read(&agent).with_context(|| format!("read {}", agent.display()))?;
        initramfs::write_file(&agent, &archive)?;
        let kernel =
            workspace::path_from_script(&workspace::root().join("kernel-config/build"))?.join("vmlinux");
        let images = workspace::path_from_script(&workspace::root().join("tests/images/build"))?;

        let install = Some(Install { kernel, initramfs: archive });
        let mut layout = Self { files: Vec::new(), install };
        for image in LOADED.iter().chain(&["busybox-docker"]) {
            layout.add(
                images.join(format!("{image}.tar")),
                &format!("share/bulkhead-tests/images/{image}.tar"),
            );
        }
        Ok(layout)
    }

    /// This program, to run inside the host.
    pub fn tests() -> Result<Self> {
        let mut layout = Self::default();
        layout.add(std::env::current_exe()?, "bin/whole-system");
        Ok(layout)
    }

    fn add(&mut self, file: PathBuf, to: &str) {
        self.files.push((file, to.to_string()));
    }

    /// All that it is made of.
    fn sources(&self) -> Vec<PathBuf> {
        let mut sources: Vec<_> = self.files.iter().map(|(file, _)| file.clone()).collect();
        if let Some(Install { kernel, initramfs }) = &self.install {
            let programs = ["bulkhead", "bulkhead-oci", "bulkhead-vmm", "containerd-shim-bulkhead-v2"];
            sources.extend(programs.map(|name| workspace::release_dir().join(name)));
            sources.extend(["Makefile", "runtime/config.toml"].map(|name| workspace::root().join(name)));
            sources.extend([kernel.clone(), initramfs.clone()]);
        }
        sources
    }

    /// A name for these files as they are now.
    pub fn key(&self) -> Result<String> {
        let prints: Vec<String> =
            self.sources().iter().map(|file| workspace::fingerprint(file)).collect::<Result<_>>()?;
        Ok(workspace::key(prints.iter().map(String::as_str)))
    }

    /// Copies them under `prefix`.
    pub fn lay(&self, prefix: &Path) -> Result<()> {
        if let Some(Install { kernel, initramfs }) = &self.install {
            let set = |name: &str, value: &Path| format!("{name}={}", value.display());
            // Everything is built already.
            let installed = Command::new("make")
                .args(["--silent", "-o", "all", "install", "PREFIX="])
                .args([set("DESTDIR", prefix), set("RELEASE", &workspace::release_dir())])
                .args([set("KERNEL", kernel), set("INITRAMFS", initramfs)])
                .current_dir(workspace::root())
                .stdin(Stdio::null())
                .status()
                .context("run make")?;
            if !installed.success() {
                bail!("make install failed with {installed}");
            }
        }
        for (file, to) in &self.files {
            let to = prefix.join(to);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::copy(file, &to).with_context(|| format!("copy {} to {}", file.display(), to.display()))?;
        }
        Ok(())
    }
}

/// One line of shell that loads the images of the installation at `prefix` into its store. It succeeds whatever comes
/// of that: a test that needs an image looks at its log first.
pub fn load_images(prefix: &str) -> String {
    let share = format!("{prefix}/share/bulkhead-tests");
    let images = LOADED.join(" ");
    // What is installed and loaded is read once here, and not again in every test.
    let verified = format!("{prefix}/bin/bulkhead image verify; {prefix}/bin/bulkhead doctor");
    format!(
        "mkdir -p {share}/loaded; for image in {images}; do \
         {{ timeout 300 {prefix}/bin/bulkhead image load {share}/images/$image.tar; echo status $?; }} \
         >{share}/loaded/$image 2>&1; done; {{ {verified}; }} >{share}/loaded/verified 2>&1; true"
    )
}
