//! A process that keeps one machine ready, and becomes the supervisor of the container that takes it.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_image::Image;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::letter::{self, Letter};
use super::{Wishes, control, forget, kind};
use crate::launch::detach_keys;
use crate::relay::Ends;
use crate::state::{self, Files, Nameless, Record, private_dir};
use crate::supervise::{Plan, Tell, Waiting, Wire};
use crate::{Artefacts, Context, Layout, Result, trace};

/// Said to the keeper.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Word {
    /// The machine can be had.
    Ready,
    /// It cannot be made.
    Failed(String),
    /// It is a container's now.
    Taken,
}

/// Longest reason that is told.
const MAX_REASON: usize = 8 << 10;

/// What a pool's machines are made of.
#[derive(Clone, Debug)]
pub(super) struct Goods {
    pub artefacts: Artefacts,
    pub image: Image,
    pub kind: String,
}

/// Makes a machine and waits until it is taken, or until the keeper is gone. Answers the exit status for the process.
pub(super) fn run(layout: &Layout, wishes: &Wishes, goods: Goods, keeper: Wire) -> u8 {
    // Whoever takes the machine has a timeline of its own.
    trace::go_on_with(None);
    let heard = keeper.0.try_clone().map(Wire);
    let tell = |word: &Word| {
        let _ = heard.as_ref().map(|keeper| keeper.send(word));
    };
    let kind = goods.kind.clone();
    let mut waiting = match warm(layout, wishes, goods, keeper) {
        Ok(waiting) => waiting,
        Err(error) => {
            tell(&Word::Failed(error.chain().chars().take(MAX_REASON).collect()));
            return 1;
        }
    };
    let files = waiting.files().clone();
    let post = match Post::open(layout, &files, &kind, waiting.id()) {
        Ok(post) => post,
        Err(error) => {
            waiting.abandon();
            tell(&Word::Failed(error.chain()));
            return 1;
        }
    };
    tell(&Word::Ready);
    // Who holds the waiting machine's end of the connection is the machine itself.
    let taken = post.wait(&mut waiting, &kind);
    drop(post);
    match taken {
        Some((caller, letter, ends, name)) => {
            tell(&Word::Taken);
            drop(heard);
            let Letter { mut record, spec, trace, .. } = letter;
            record.name = name;
            trace::go_on_with(trace);
            trace::mark("machine taken");
            waiting.become_of(record, spec, ends, caller)
        }
        None => {
            waiting.abandon();
            0
        }
    }
}

fn warm(layout: &Layout, wishes: &Wishes, goods: Goods, keeper: Wire) -> Result<Waiting> {
    let Nameless { files, id, lock } = Nameless::make(layout)?;
    let made = private_dir(&files.run).and_then(|()| {
        let Goods { artefacts, image, .. } = goods;
        let read = worth_reading(&image);
        let record = Record::new(id, &wishes.image, &image, kind::options(wishes));
        let plan = Plan {
            layout: layout.clone(),
            files: files.clone(),
            record,
            lock,
            artefacts,
            layers: image.layers.clone(),
            hostname: String::new(),
            spec: Value::Null,
            seccomp: None,
            ends: Ends::default(),
            caller: keeper,
            shares: None,
            copy: None,
        };
        Waiting::warm(plan, read)
    });
    made.inspect_err(|_| drop(files.remove()))
}

/// Files of the image that most of its containers read first: the program it is for, and what loads it.
fn worth_reading(image: &Image) -> Vec<String> {
    const LOADERS: [&str; 3] =
        ["/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6", "/lib/ld-musl-x86_64.so.1"];
    let config = &image.config;
    let program = config.entrypoint.first().or_else(|| config.cmd.first()).map_or("", String::as_str);
    let path = config.env.iter().find_map(|variable| variable.strip_prefix("PATH="));
    let directories =
        path.unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").split(':');
    let programs: Vec<_> = match program {
        "" => Vec::new(),
        absolute if absolute.starts_with('/') => vec![absolute.to_owned()],
        name => directories.map(|directory| format!("{directory}/{name}")).collect(),
    };
    programs.into_iter().chain(LOADERS.map(str::to_owned)).collect()
}

/// Where the machine can be had, for as long as it can.
struct Post<'a> {
    layout: &'a Layout,
    listener: OwnedFd,
    socket: PathBuf,
    entry: PathBuf,
}

impl<'a> Post<'a> {
    fn open(layout: &'a Layout, files: &Files, kind: &str, id: &str) -> Result<Self> {
        let socket = files.take();
        let listener = control::listen(&socket)?;
        let entry = layout.warm().join(kind::entry(kind, id));
        let post = Self { layout, listener, socket, entry };
        let write = || {
            private_dir(&layout.warm())?;
            fs::write(&post.entry, "").context(|| format!("cannot write {}", post.entry.display()))
        };
        // The directory goes with the last that was in it, perhaps just now.
        write().or_else(|_| write())?;
        Ok(post)
    }

    /// Until somebody takes the machine. `None`: it has ended, or the keeper has.
    fn wait(&self, waiting: &mut Waiting, kind: &str) -> Option<(Wire, Letter, Ends, String)> {
        loop {
            let mut fds = [
                PollFd::new(waiting.caller(), PollFlags::IN),
                PollFd::from_borrowed_fd(waiting.ended(), PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
            let [ended, lost, asked] = fds.map(|fd| !fd.revents().is_empty());
            if ended || lost {
                return None;
            }
            if asked && let Some(taken) = self.give(waiting, kind) {
                return Some(taken);
            }
        }
    }

    /// Hears one that wants the machine. `None`: it is somebody else, or wants what cannot be.
    fn give(&self, waiting: &mut Waiting, kind: &str) -> Option<(Wire, Letter, Ends, String)> {
        let caller = control::accept(&self.listener).ok()?;
        letter::impatient(&caller, true).ok()?;
        let (letter, fds) = letter::receive(&caller).ok()?;
        if letter.kind != kind || letter.record.id != waiting.id() {
            return None;
        }
        let refuse = |error: &crate::Error| {
            let _ = caller.send(&Tell::Failed { status: error.exit_status(), message: error.chain() });
        };
        let keys = detach_keys(&letter.record.options).inspect_err(refuse).ok()?;
        let mut fds = fds.into_iter();
        let (output, error, input) = (fds.next(), fds.next(), fds.next());
        let ends = Ends { input, output, error, log: None, detach_keys: keys };
        let name = state::take_name(self.layout, letter.name.as_deref(), waiting.id());
        let name = name.inspect_err(refuse).ok()?;
        let well = waiting.greet(&letter.hostname).is_ok();
        if !well || letter::impatient(&caller, false).is_err() || caller.send(&Tell::Taken).is_err() {
            // It has just been killed; or whoever wanted it has gone, and nothing of a container has been done to it.
            let _ = fs::remove_file(self.layout.names().join(name));
            return None;
        }
        Some((caller, letter, ends, name))
    }
}

impl Drop for Post<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
        forget(self.layout, &self.entry);
    }
}
