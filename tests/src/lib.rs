//! Whole-system tests and the emulated KVM host they run on.
