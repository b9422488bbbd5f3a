//! The table of kills for `bulkhead-oci`.

use anyhow::Result;
use bulkhead_tests::host::Host;
use bulkhead_tests::test;
use serde_json::json;

use crate::BUSYBOX;
use crate::faults::Victim::{All, Caller, Monitor, StandIn, Supervisor};
use crate::faults::{FEW, Kind, LONG, MANY, ON_C, ROW, Row, Table};
use crate::oci::Bundle;

/// Makes a container `box` that waits for its start; its streams are files, as an engine's would be.
const CREATE: &str =
    "bulkhead-oci --root $W/oci create --bundle $W/bulkhead-oci box >$W/out 2>$W/err </dev/null";
const UP: &str = "bulkhead-oci --root $W/oci run -d --bundle $W/bulkhead-oci box >$W/out 2>$W/err </dev/null";

const ROWS: &[Row] = &[
    Row { verb: "create", line: CREATE, victims: &[Caller, Supervisor, StandIn, Monitor, All], ..ROW },
    Row {
        verb: "start",
        container: CREATE,
        line: "bulkhead-oci --root $W/oci start box",
        victims: &[Caller, Supervisor, StandIn, Monitor],
        ..ON_C
    },
    Row { verb: "run -d", line: UP, victims: &[Supervisor, Monitor], ..ROW },
    Row {
        verb: "exec",
        container: UP,
        line: "bulkhead-oci --root $W/oci exec box true",
        victims: &[Caller, StandIn, Monitor],
        ..ON_C
    },
    Row {
        verb: "kill",
        container: UP,
        line: "bulkhead-oci --root $W/oci kill box KILL",
        victims: &[Caller, Supervisor, Monitor],
        ..ON_C
    },
    Row {
        verb: "pause, resume",
        container: UP,
        line: "bulkhead-oci --root $W/oci pause box && bulkhead-oci --root $W/oci resume box",
        victims: &[Caller, Monitor],
        ..ON_C
    },
    Row {
        verb: "update",
        container: UP,
        line: "bulkhead-oci --root $W/oci update --pids-limit 100 box",
        victims: &[Caller, Monitor],
        ..ON_C
    },
    Row {
        verb: "delete -f",
        container: UP,
        line: "bulkhead-oci --root $W/oci delete -f box",
        victims: &[Caller, Supervisor, Monitor],
        ..ON_C
    },
    Row {
        verb: "checkpoint",
        container: UP,
        line: "bulkhead-oci --root $W/oci checkpoint --image-path $W/image box",
        victims: &[Caller, Supervisor, Monitor],
        undo: "rm -rf $W/image $W/.image*",
        ..ON_C
    },
    Row {
        verb: "restore",
        prepare: "[ -e $W/kept ] || { bulkhead-oci --root $W/oci run -d --bundle $W/bulkhead-oci box >$W/out 2>$W/err </dev/null && \
            bulkhead-oci --root $W/oci checkpoint --image-path $W/kept box && bulkhead-oci --root $W/oci delete -f box; }",
        line: "bulkhead-oci --root $W/oci restore -d --bundle $W/bulkhead-oci --image-path $W/kept box >$W/out 2>$W/err </dev/null",
        victims: &[Supervisor, StandIn, Monitor],
        ..ROW
    },
];

fn table(host: &Host, moments: u32) -> Result<()> {
    let bundle = Bundle::new(host, "bulkhead-oci")?;
    bundle.runs("trap exit TERM; echo up; while :; do sleep 0.1; done")?;
    bundle.change(|config| config["annotations"] = json!({"dev.bulkhead.memory": "128"}))?;
    Table::new(host, Kind::Oci)?.run(ROWS, moments)
}

test!(whoever_is_killed_under_an_engine, BUSYBOX.deadline(3000).shows_output());
fn whoever_is_killed_under_an_engine(host: &Host) -> Result<()> {
    table(host, FEW)
}

test!(
    whoever_is_killed_at_many_moments_under_an_engine,
    BUSYBOX.deadline(30_000).shows_output().pending(LONG)
);
fn whoever_is_killed_at_many_moments_under_an_engine(host: &Host) -> Result<()> {
    table(host, MANY)
}
