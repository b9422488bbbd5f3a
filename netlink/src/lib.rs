//! The part of rtnetlink (`rtnetlink(7)`) that Bulkhead needs, synchronous and without dependencies: the host reads a
//! network namespace's links, addresses, routes and neighbours and redirects traffic ([`redirect`]); the guest's agent
//! makes the same links, addresses, routes and neighbours in the guest.
//!
//! [`message`] writes and reads messages, [`socket`] exchanges them with the kernel; one module for each kind of thing
//! says what it looks like on the wire. What is read is checked for its lengths: a message that is too short or has an
//! attribute of the wrong size is left out, never a panic.

pub mod address;
pub mod link;
pub mod message;
pub mod neighbour;
pub mod redirect;
pub mod route;
pub mod socket;

pub use address::Address;
pub use link::{Link, Mac};
pub use neighbour::Neighbour;
pub use route::Route;
pub use socket::Socket;
