//! PID 1 of the guest: runs OCI containers, talks ttrpc over vsock.
//!
//! One process, one thread, one epoll loop ([`agent::Agent`]); a container or an exec is a forked child that sets
//! itself up ([`container::child`]) and reports over a socket pair; [`names`] is started as a program of its own. Being alone in the guest's kernel, the agent has
//! nothing to defend against the network: whatever reaches it came through the monitor's vsock.

mod agent;
mod archive;
mod boot;
mod container;
mod disk;
mod error;
mod hw;
mod names;
mod network;
mod ports;
mod reaper;
mod rpc;
mod streams;
mod suspend;

use bulkhead_protocol::mark;

/// Exit status of a guest whose agent could not start or failed: the monitor's "guest crashed".
const EXIT_SOFTWARE: u8 = 70;

fn main() {
    if std::env::args_os().nth(1).is_some_and(|word| word == names::WORD) {
        return names::serve();
    }
    hw::acquire();
    hw::mark(mark::AGENT_STARTED);
    boot::end_machine_on_panic();
    #[cfg(feature = "unix-sockets")]
    let started = boot::start_on_unix_sockets();
    #[cfg(not(feature = "unix-sockets"))]
    let started = boot::start();
    let error = match started.and_then(|mut agent| agent.run()) {
        Err(error) => error,
        Ok(never) => match never {},
    };
    boot::console(&format!("bulkhead agent: {error}"));
    hw::exit(EXIT_SOFTWARE);
}
