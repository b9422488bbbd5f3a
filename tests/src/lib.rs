//! Whole-system tests and the emulated KVM host they run on. `tests/README.md` says how to use it.
//!
//! | module | what it does |
//! |---|---|
//! | [`registry`] | what a test is and what it says it needs; [`test!`] registers one |
//! | [`host`], [`process`], [`console`] | what a test works with: the KVM host from inside, programs, terminals |
//! | [`cri`] | what kubelet says to a container runtime |
//! | [`leak`] | what a test left behind |
//! | [`runner`], [`inside`] | the outside (`cargo test`'s arguments) and the inside (one test, watched over) |
//! | [`stage`] | what is under test, built and laid out as an installation would be |
//! | [`emulated`] | the KVM host in QEMU: boots once, saves its state, resumes in a fraction of a second |
//! | [`initramfs`] | writes the guest's initramfs |
//! | [`oci_image`] | writes container images as archives |
//! | [`workspace`] | where things are in the source tree, and how to build cached things once |

pub mod console;
pub mod cri;
pub mod emulated;
pub mod host;
pub mod initramfs;
pub mod inside;
pub mod leak;
pub mod oci_image;
pub mod process;
pub mod registry;
pub mod runner;
pub mod stage;
pub mod workspace;

#[doc(hidden)]
pub use inventory;
