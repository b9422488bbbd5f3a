//! Hard-isolated containers, each with a kernel of its own.

fn main() {}
