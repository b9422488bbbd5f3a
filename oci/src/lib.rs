//! What `bulkhead-oci` is made of: an OCI runtime with runc's command line, whose containers are microVMs. It is a library for the
//! program and for the fuzz targets, and an interface for nobody else.
//!
//! Read in this order: [`verbs`] (what each verb does), [`sandbox`] (the process that is a container on the host),
//! [`config`] (what of config.json is whose).

// Nobody else's interface: its documentation is for those who change it.
#![allow(rustdoc::private_intra_doc_links)]

#[doc(hidden)]
pub mod args;
#[doc(hidden)]
pub mod cgroup;
mod checkpoint;
#[doc(hidden)]
pub mod config;
mod console;
#[doc(hidden)]
pub mod fuzzing;
mod hooks;
#[doc(hidden)]
pub mod log;
mod pod;
mod policy;
#[doc(hidden)]
pub mod sandbox;
#[doc(hidden)]
pub mod store;
#[doc(hidden)]
pub mod verbs;

use bulkhead_runtime::Settings;

use crate::log::Log;
use crate::store::Root;

/// What every verb works with.
#[derive(Debug)]
pub struct Context {
    /// The containers.
    pub root: Root,
    /// Where messages go.
    pub log: Log,
    /// The administrator's.
    pub settings: Settings,
    /// cgroupsPath names a unit of systemd's.
    pub systemd_cgroup: bool,
    /// The host's cgroups are not ours to write.
    pub rootless: bool,
}
