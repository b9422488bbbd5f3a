//! Sandbox life cycle on the host: state, monitor, storage, logs.
//!
//! A sandbox is a directory of state, a *supervisor* process that holds its lock for as long as it lives, and the
//! monitor (`bulkhead-vmm`) that the supervisor starts and dies with. There is no daemon: every verb reads the state,
//! and talks to the agent in the guest by itself.
//!
//! Read in this order: [`launch`] (what `run` does), [`supervise`] (what the supervisor does), [`guest`] (how the
//! host talks to the agent), [`state`] (what is on disk).

pub mod binds;
pub mod clone;
pub mod copy;
pub mod doctor;
pub mod drives;
mod error;
pub mod exec;
#[doc(hidden)]
pub mod fuzzing;
pub mod guest;
pub mod isolation;
pub mod jail;
pub mod launch;
pub mod logs;
pub mod monitor;
pub mod names;
pub mod network;
pub mod null;
pub mod options;
mod paths;
pub mod policy;
pub mod pool;
pub mod relay;
pub mod scratch;
pub mod seccomp;
pub mod settings;
pub mod shares;
pub mod snapshot;
mod spec;
pub mod state;
pub mod stop;
pub mod supervise;
pub mod template;
pub mod terminal;
pub mod trace;
pub mod verify;

pub use error::{Context, Error, Result};
pub use paths::{Artefacts, Layout};
pub use settings::Settings;
