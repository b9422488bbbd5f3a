//! Whole-system tests, one file a topic. Each runs inside a KVM host of its own; see `tests/README.md`.

mod framework;

fn main() {
    bulkhead_tests::runner::main()
}
