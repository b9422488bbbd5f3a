//! A guest that is hostile from its first instruction, at ring 0 and with all devices in its hands: whatever it does, the
//! monitor lives and answers, or ends that machine alone and says why; its memory, its log and its report stay small.
//!
//! Each hostile act is a row of a table ([`rings`], [`devices`], [`machine`]) with what is to come of it.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

#[path = "../common/mod.rs"]
mod common;
mod devices;
mod kit;
mod machine;
mod rings;

use kit::play;

#[test]
fn rings_that_make_no_sense_stop_their_device_and_nothing_else() {
    play(&rings::acts());
}

#[test]
fn requests_that_make_no_sense_are_answered_or_stop_their_device() {
    play(&devices::acts());
}

#[test]
fn registers_ports_and_processors_in_a_hostile_guests_hands() {
    play(&machine::acts());
}
