//! What system calls a container may make: profiles as the runtime-spec and docker write them, Bulkhead's own default, and
//! a compiler to the kernel's filter language.
//!
//! Profiles are compiled on the host. The guest gets the finished program, which is a quarter of the profile's size and costs
//! it nothing to read.

mod compile;
mod default;
mod docker;

use std::borrow::Cow;

use serde::Deserialize;

pub use self::compile::{Instruction, MAX_PROGRAM, Program};

/// Why a profile is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// `linux.seccomp` of the runtime-spec.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Profile {
    /// What happens with calls that no rule decides about: `SCMP_ACT_…`.
    pub default_action: Cow<'static, str>,
    /// With `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE`.
    pub default_errno_ret: Option<u32>,
    /// `SCMP_ARCH_…`; empty is the machine's own.
    pub architectures: Vec<Cow<'static, str>>,
    /// `SECCOMP_FILTER_FLAG_…`.
    pub flags: Vec<String>,
    /// Of an agent that decides; not supported.
    pub listener_path: String,
    /// The rules. What has conditions goes before what has none.
    pub syscalls: Vec<Rule>,
}

/// One of `linux.seccomp.syscalls`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Names of system calls.
    pub names: Vec<Cow<'static, str>>,
    /// `SCMP_ACT_…`.
    pub action: Cow<'static, str>,
    /// With `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE`.
    pub errno_ret: Option<u32>,
    /// All must hold.
    pub args: Vec<Argument>,
}

/// One condition of `linux.seccomp.syscalls[].args`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Argument {
    /// Which argument, from 0.
    pub index: u32,
    /// To compare with; with `SCMP_CMP_MASKED_EQ` the mask.
    pub value: u64,
    /// With `SCMP_CMP_MASKED_EQ`: to compare with.
    pub value_two: u64,
    /// `SCMP_CMP_…`.
    pub op: Cow<'static, str>,
}
