//! The targets, one file for each kind of reader.

pub mod agent;
pub mod backend;
pub mod control;
pub mod devices;
pub mod disks;
pub mod files;
pub mod image;
pub mod packets;
pub mod registers;
pub mod saved;
pub mod snapshot;
