//! x86-64: memory layout, boot tables, registers and processor identification.

pub mod boot;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod regs;
pub mod state;
