//! PID 1 of the guest: runs OCI containers, talks ttrpc over vsock.

fn main() {}
