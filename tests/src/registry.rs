//! What a test is and what it says it needs.

use anyhow::Result;

use crate::emulated::Clock;
use crate::host::Host;
use crate::runner::Runner;

/// What a test needs. Built from [`Needs::host`] or [`Needs::bulkhead`] in a `const`.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    pub(crate) product: bool,
    pub(crate) engines: bool,
    pub(crate) cgroups: bool,
    pub(crate) images: &'static [&'static str],
    pub(crate) deadline_seconds: u64,
    pub(crate) clock: Clock,
    pub(crate) may_leave: bool,
    pub(crate) shows_output: bool,
    pub(crate) pending: Option<&'static str>,
    pub(crate) hidden: bool,
}

impl Needs {
    /// A KVM host with nothing of Bulkhead on it.
    pub const fn host() -> Self {
        Self {
            product: false,
            engines: false,
            cgroups: true,
            images: &[],
            deadline_seconds: 30,
            clock: Clock::Leaping,
            may_leave: false,
            shows_output: false,
            pending: None,
            hidden: false,
        }
    }

    /// A KVM host with `bulkhead`, `bulkhead-vmm`, the guest kernel and the initramfs of this source tree.
    pub const fn bulkhead() -> Self {
        Self { product: true, ..Self::host() }
    }

    /// Bulkhead, and podman, dockerd and containerd; no images loaded. Only on the emulated host: these would
    /// find what they keep on this machine.
    pub const fn engines() -> Self {
        Self { engines: true, ..Self::bulkhead() }
    }

    /// Bulkhead on a host where no cgroup hierarchy is mounted, so that the test can mount those of v1; no images loaded.
    /// Only on the emulated host: another one's hierarchies are in use.
    pub const fn no_cgroups() -> Self {
        Self { cgroups: false, ..Self::bulkhead() }
    }

    /// These images loaded (`busybox`, `python`, `redis`).
    pub const fn images(self, images: &'static [&'static str]) -> Self {
        Self { images, product: true, ..self }
    }

    /// Seconds of the host's own time after which the test is ended and has failed; 30 when not said.
    pub const fn deadline(self, seconds: u64) -> Self {
        Self { deadline_seconds: seconds, ..self }
    }

    /// An emulated host whose clock does not skip idle time.
    pub const fn steady_clock(self) -> Self {
        Self { clock: Clock::Steady, ..self }
    }

    /// Leaving things behind is not a failure.
    pub const fn may_leave_things(self) -> Self {
        Self { may_leave: true, ..self }
    }

    /// What it prints is a result: shown also when it passes.
    pub const fn shows_output(self) -> Self {
        Self { shows_output: true, ..self }
    }

    /// Not run unless asked for with `--ignored`: what it tests is not there yet, for this reason.
    pub const fn pending(self, why: &'static str) -> Self {
        Self { pending: Some(why), ..self }
    }

    /// Run by another test only, see [`Runner::run_hidden`].
    pub const fn hidden(self) -> Self {
        Self { hidden: true, ..self }
    }
}

/// A test's function.
#[derive(Debug, Clone, Copy)]
pub enum Body {
    /// Runs in the KVM host.
    Inside(fn(&Host) -> Result<()>),
    /// Runs on this machine, about the framework itself.
    Outside(fn(&Runner) -> Result<()>),
}

/// A registered test; made by [`test!`](crate::test).
#[derive(Debug)]
pub struct Test {
    #[doc(hidden)]
    pub module: &'static str,
    #[doc(hidden)]
    pub function: &'static str,
    /// What it needs.
    pub needs: Needs,
    /// What it does.
    pub body: Body,
}

inventory::collect!(Test);

impl Test {
    /// File and function, `run::exit_codes`.
    pub fn name(&self) -> String {
        let module = self.module.rsplit("::").next().unwrap_or(self.module);
        format!("{module}::{}", self.function)
    }

    /// All tests, by name.
    pub fn all() -> Vec<&'static Self> {
        let mut tests: Vec<_> = inventory::iter::<Self>.into_iter().collect();
        tests.sort_by_key(|test| test.name());
        tests
    }

    /// The test of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        inventory::iter::<Self>.into_iter().find(|test| test.name() == name)
    }
}

/// Registers a function as a test.
///
/// ```text
/// test!(uname_differs, Needs::bulkhead().images(&["busybox"]));
/// fn uname_differs(host: &Host) -> Result<()> { … }
/// ```
#[macro_export]
macro_rules! test {
    ($function:ident, $needs:expr) => {
        $crate::test!(@ $function, $needs, $crate::registry::Body::Inside($function));
    };
    (outside $function:ident) => {
        $crate::test!(@ $function, $crate::registry::Needs::host(), $crate::registry::Body::Outside($function));
    };
    (@ $function:ident, $needs:expr, $body:expr) => {
        $crate::inventory::submit! {
            $crate::registry::Test {
                module: module_path!(),
                function: stringify!($function),
                needs: $needs,
                body: $body,
            }
        }
    };
}
