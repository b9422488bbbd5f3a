//! Socket device (section 5.10): stream sockets between guest and host, on the host side unix sockets as Firecracker's
//! "hybrid vsock" has them.
//!
//! - To the guest: connect to the device's socket, send `CONNECT <port>\n`, read `OK <port>\n`, then it is the stream.
//! - To the host: what the guest connects to on port P of context 2 is a connection to `<socket>_P`.
//!
//! [`connection`] is one stream: credit, half-closes, exact end of file. `muxer` has all of them and the host's
//! sockets. Nothing is buffered from host to guest: data is read from the host's socket right into the guest's receive
//! buffer when the guest has both buffer and credit. From guest to host, what the host does not take at once is kept,
//! at most [`connection::BUFFER`] bytes per stream, which is the credit the guest is given.

pub mod connection;
mod device;
mod handler;
mod metrics;
#[cfg(test)]
mod model;
mod muxer;
mod packet;
mod stream;

pub use device::Vsock;
