//! Whole-system tests and the emulated KVM host they run on. `tests/README.md` says how to use it.
//!
//! | module | what it does |
//! |---|---|
//! | [`emulated`] | the KVM host in QEMU: boots once, saves its state, resumes in a fraction of a second |
//! | [`initramfs`] | writes the guest's initramfs |
//! | [`oci_image`] | writes container images as archives |
//! | [`workspace`] | where things are in the source tree, and how to build cached things once |

pub mod emulated;
pub mod initramfs;
pub mod oci_image;
pub mod workspace;
