//! How `run` takes a machine that waits.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::letter::{self, Letter};
use super::{control, forget, kind};
use crate::launch::{Launched, Order, attend, failure};
use crate::state::{self, Files};
use crate::supervise::Tell;
use crate::terminal::Signals;
use crate::{Result, template, trace};

/// Runs a container in a machine that waits. `None`: there is none of its kind; whatever is in the way of this is no reason not to
/// run the container in a machine of its own.
///
/// # Errors
/// A machine is there, and the container cannot be run in it: its name is taken, its command does not exist.
pub(crate) fn take(order: &Order<'_>) -> Result<Option<Launched>> {
    let Order { layout, options, artefacts, .. } = order;
    let Ok(entries) = fs::read_dir(layout.warm()) else { return Ok(None) };
    if options.no_pool || options.no_template || template::switched_off(&artefacts.settings) {
        return Ok(None);
    }
    let Ok(Some(wanted)) = kind::of(layout, artefacts, order.image, options) else { return Ok(None) };
    trace::mark("kind of machine known");
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let Some(id) = name.strip_prefix(&wanted).and_then(|rest| rest.strip_prefix('.')) else { continue };
        match hand_over(order, &wanted, id) {
            Ok(launched) => return launched.map(Some),
            // Another was quicker, or the machine has gone.
            Err(_) if state::is_locked(&Files::new(layout, id).lock()) => {}
            Err(_) => forget(layout, &layout.warm().join(&name)),
        }
    }
    Ok(None)
}

/// The outer error: the machine cannot be had. The inner: it can, but the container cannot be.
fn hand_over(order: &Order<'_>, kind: &str, id: &str) -> io::Result<Result<Launched>> {
    let Order { layout, options, .. } = order;
    let wire = control::try_connect(&Files::new(layout, id).take())?;
    letter::impatient(&wire, true)?;
    let letter = Letter {
        kind: kind.to_owned(),
        name: order.name.map(str::to_owned),
        record: order.record(id, ""),
        spec: order.spec(id, &[]),
        hostname: order.hostname(id),
        trace: trace::so_far(),
    };
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let input = options.interactive.then(|| stdin.as_fd());
    let streams: Vec<BorrowedFd<'_>> = if options.detach {
        Vec::new()
    } else {
        [stdout.as_fd(), stderr.as_fd()].into_iter().chain(input).collect()
    };
    let signals = Signals::block().map_err(io::Error::other)?;
    letter::send(&wire, &letter, &streams)?;
    match wire.receive::<Tell>() {
        Some(Tell::Taken) => {
            letter::impatient(&wire, false)?;
            Ok(attend(&wire, &signals, id, options))
        }
        Some(Tell::Failed { status, message }) => Ok(Err(failure(status, message))),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
