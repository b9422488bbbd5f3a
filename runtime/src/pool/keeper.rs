//! The process that keeps a pool full: one thread, one loop.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_image::Store;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};

use super::control::{self, Ask};
use super::waiter::{self, Goods, Word};
use super::{Place, Record, Status, Wishes, kind};
use crate::launch::become_supervisor;
use crate::state::{self, now_ns, private_dir};
use crate::supervise::Wire;
use crate::{Artefacts, Context, Error, Layout, Result, Settings};

/// After a machine was taken the next is not begun for so long: its container is to start undisturbed.
const REST: Duration = Duration::from_millis(100);
/// Longest pause after failures, which each double it.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// How often it is looked whether image, kernel, agent, monitor and settings are still the same.
const LOOK: Duration = Duration::from_secs(30);
/// How long a machine that is given up may take to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is left free of the host's memory: this part of it, and what a machine takes until it is ready.
const FREE_PART: u64 = 10;
const MACHINE_KIB: u64 = 64 << 10;

/// A keeper at work.
pub(super) struct Keeper {
    layout: Layout,
    id: String,
    place: Place,
    wishes: Wishes,
    /// `None` in its children, as the next too.
    lock: Option<File>,
    listener: Option<OwnedFd>,
    clients: Vec<Client>,
    machines: Vec<Machine>,
    goods: Option<Goods>,
    taken: u64,
    created_ns: u64,
    problem: Option<String>,
    failures: u32,
    /// No machine is begun before.
    next: Instant,
    /// When it was last looked what they are made of.
    looked: Option<Instant>,
    /// What clients know.
    told: String,
    /// It is to end.
    cooled: bool,
}

/// Somebody on the control socket.
struct Client {
    wire: Wire,
    /// Hears of every change.
    watches: bool,
}

/// The process of a machine.
struct Machine {
    pid: Pid,
    pidfd: OwnedFd,
    /// It ends when this is dropped, unless it is taken.
    lifeline: Option<Wire>,
    stage: Stage,
    kind: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Warming,
    Waiting,
    Taken,
    /// Given up.
    Ending,
}

impl Keeper {
    /// A keeper that has not begun; its process is still to be forked. What it is of is known when this returns.
    ///
    /// # Errors
    /// There is no such image, or no kernel, agent or monitor.
    pub fn new(
        layout: &Layout,
        id: &str,
        wishes: &Wishes,
        lock: File,
        listener: OwnedFd,
        place: &Place,
    ) -> Result<Self> {
        let mut keeper = Self {
            layout: layout.clone(),
            id: id.to_owned(),
            place: place.clone(),
            wishes: wishes.clone(),
            lock: Some(lock),
            listener: Some(listener),
            clients: Vec::new(),
            machines: Vec::new(),
            goods: None,
            taken: 0,
            created_ns: now_ns(),
            problem: None,
            failures: 0,
            next: Instant::now(),
            looked: None,
            told: String::new(),
            cooled: false,
        };
        keeper.look()?;
        Ok(keeper)
    }

    /// Keeps the pool until it is told to end.
    pub fn keep(mut self) {
        while !self.cooled {
            if self.looked.is_none_or(|at| at.elapsed() >= LOOK) {
                self.look_again();
            }
            self.begin_if_wanted();
            self.wait();
        }
        self.put_away();
    }

    /// How the pool is.
    fn status(&self) -> Status {
        let count = |stage| {
            u32::try_from(self.machines.iter().filter(|m| m.stage == stage).count()).unwrap_or(u32::MAX)
        };
        Status {
            id: self.id.clone(),
            wishes: self.wishes.clone(),
            image_id: self.goods.as_ref().map(|goods| goods.image.id.to_string()).unwrap_or_default(),
            waiting: count(Stage::Waiting),
            warming: count(Stage::Warming),
            taken: self.taken,
            problem: self.problem.clone(),
            pid: std::process::id(),
            created_ns: self.created_ns,
        }
    }

    /// Finds out what machines are to be made of now, and gives up those that were made of something else.
    fn look(&mut self) -> Result<()> {
        self.looked = Some(Instant::now());
        let settings = Settings::load()?;
        let artefacts = Artefacts::find(&settings)?;
        let store = Store::open(&self.layout.data.join("images"))?;
        let image = match store.resolve(&self.wishes.image) {
            Ok(image) => image,
            Err(error) => {
                // Its layers are to go, and nobody can ask for a container of it.
                self.goods = None;
                self.let_go(|_| true);
                return Err(error.into());
            }
        };
        let options = kind::options(&self.wishes);
        let kind = kind::of(&self.layout, &artefacts, &image, &options)?
            .ok_or_else(|| Error::Usage("no machine can wait for such a container".into()))?;
        if self.goods.as_ref().is_none_or(|goods| goods.kind != kind) {
            let record = Record { image_id: image.id.to_string() };
            let text = serde_json::to_vec(&record).context(|| "cannot describe a pool".into())?;
            private_dir(&self.place.dir)?;
            let path = self.place.record();
            fs::write(&path, text).context(|| format!("cannot write {}", path.display()))?;
        }
        self.let_go(|machine| machine.kind != kind);
        self.goods = Some(Goods { artefacts, image, kind });
        Ok(())
    }

    fn look_again(&mut self) {
        match self.look() {
            Ok(()) if self.failures == 0 => self.problem = None,
            Ok(()) => {}
            Err(error) => self.problem = Some(error.chain()),
        }
    }

    /// Gives up machines that nobody has taken.
    fn let_go(&mut self, which: impl Fn(&Machine) -> bool) {
        for machine in &mut self.machines {
            if matches!(machine.stage, Stage::Warming | Stage::Waiting) && which(machine) {
                machine.stage = Stage::Ending;
                machine.lifeline = None;
            }
        }
    }

    /// Machines that are there or on their way, and not taken.
    fn held(&self) -> usize {
        self.machines.iter().filter(|m| matches!(m.stage, Stage::Warming | Stage::Waiting)).count()
    }

    fn wants_one(&self) -> bool {
        let warming = self.machines.iter().any(|machine| machine.stage == Stage::Warming);
        !warming && self.held() < self.wishes.count as usize
    }

    fn begin_if_wanted(&mut self) {
        if !self.wants_one() || Instant::now() < self.next {
            return;
        }
        self.look_again();
        let Some(goods) = self.goods.clone() else { return self.failed(None) };
        if let Err(lacking) = enough_memory() {
            return self.failed(Some(lacking));
        }
        match self.begin(goods) {
            Ok(machine) => self.machines.push(machine),
            Err(error) => self.failed(Some(error.chain())),
        }
    }

    fn begin(&mut self, goods: Goods) -> Result<Machine> {
        let kind = goods.kind.clone();
        let (lifeline, theirs) = Wire::pair()?;
        // SAFETY: the process has one thread, so the child may go on as if nothing had happened.
        match unsafe { libc::fork() } {
            -1 => Err(std::io::Error::last_os_error()).context(|| "cannot fork a supervisor".into()),
            0 => {
                drop(lifeline);
                self.forget_all();
                become_supervisor();
                let code = waiter::run(&self.layout, &self.wishes, goods, theirs);
                // SAFETY: _exit has no preconditions; no destructor of what it shares with the keeper may run.
                unsafe { libc::_exit(code.into()) }
            }
            child => {
                let pid =
                    Pid::from_raw(child).ok_or_else(|| Error::Usage("a process without a number".into()))?;
                let pidfd =
                    pidfd_open(pid, PidfdFlags::empty()).context(|| "cannot watch a supervisor".into())?;
                Ok(Machine { pid, pidfd, lifeline: Some(lifeline), stage: Stage::Warming, kind })
            }
        }
    }

    /// In a child: nothing of the keeper's stays open, or nobody would notice the keeper's end.
    fn forget_all(&mut self) {
        self.lock = None;
        self.listener = None;
        self.clients.clear();
        self.machines.clear();
    }

    /// The next machine has to wait, longer each time.
    fn failed(&mut self, why: Option<String>) {
        if let Some(why) = why {
            self.problem = Some(why);
        }
        let rest = REST.saturating_mul(1 << self.failures.min(10));
        self.failures = self.failures.saturating_add(1);
        self.next = Instant::now() + rest.min(LONGEST_REST);
    }

    /// Until something happens.
    fn wait(&mut self) {
        self.tell_watchers();
        let now = Instant::now();
        let looks = self.looked.map_or(now, |at| at + LOOK);
        let wakes = if self.wants_one() { looks.min(self.next) } else { looks };
        let left = wakes.saturating_duration_since(now);
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: left.subsec_nanos().into(),
        };
        let Some(listener) = &self.listener else { return };
        let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.wire.0, PollFlags::IN)));
        fds.extend(self.machines.iter().map(|machine| PollFd::new(&machine.pidfd, PollFlags::IN)));
        let lifelines = self.machines.iter().filter_map(|machine| machine.lifeline.as_ref());
        fds.extend(lifelines.map(|wire| PollFd::new(&wire.0, PollFlags::IN)));
        if poll(&mut fds, Some(&timeout)).is_err() {
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut ready = ready.into_iter();
        let connects = ready.next() == Some(true);
        let clients: Vec<_> = ready.by_ref().take(self.clients.len()).collect();
        let ended: Vec<_> = ready.by_ref().take(self.machines.len()).collect();
        // Their words first: one may say why it ends.
        for machine in self.machines.iter_mut().filter(|machine| machine.lifeline.is_some()) {
            if ready.next() != Some(true) {
                continue;
            }
            match machine.lifeline.as_ref().and_then(Wire::receive::<Word>) {
                Some(Word::Ready) => {
                    machine.stage = Stage::Waiting;
                    (self.failures, self.problem) = (0, None);
                }
                Some(Word::Failed(why)) => {
                    self.problem = Some(why);
                }
                Some(Word::Taken) => {
                    machine.stage = Stage::Taken;
                    self.taken += 1;
                    self.next = self.next.max(Instant::now() + REST);
                }
                None => machine.lifeline = None,
            }
        }
        self.bury(&ended);
        let all = std::mem::take(&mut self.clients);
        let mut ready = clients.into_iter();
        for client in all {
            if ready.next() == Some(true) {
                self.hear(client);
            } else {
                self.clients.push(client);
            }
        }
        if connects {
            let accepted = self.listener.as_ref().map(control::accept);
            if let Some(Ok(wire)) = accepted {
                self.clients.push(Client { wire, watches: false });
            }
        }
    }

    fn tell_watchers(&mut self) {
        let now = self.status();
        let text = serde_json::to_string(&now).unwrap_or_default();
        if std::mem::replace(&mut self.told, text.clone()) != text {
            self.clients.retain(|client| !client.watches || client.wire.send(&now).is_ok());
        }
    }

    /// Reaps those that have ended.
    fn bury(&mut self, ended: &[bool]) {
        let mut lost = 0;
        let mut ended = ended.iter();
        self.machines.retain(|machine| {
            if ended.next() != Some(&true) {
                return true;
            }
            let _ = waitpid(Some(machine.pid), WaitOptions::empty());
            lost += usize::from(matches!(machine.stage, Stage::Warming | Stage::Waiting));
            false
        });
        if lost > 0 {
            // One that was killed has cleared nothing away.
            super::forget_dead(&self.layout);
            let _ = state::list(&self.layout);
            self.failed(None);
        }
    }

    /// Does what a client asks; one that has gone is forgotten.
    fn hear(&mut self, mut client: Client) {
        let Some(ask) = client.wire.receive::<Ask>() else { return };
        match ask {
            Ask::Cool => {
                self.cooled = true;
                // It hears of the end by the end of the connection.
                self.clients.push(client);
                return;
            }
            Ask::Status => {}
            Ask::Warm { count } => {
                client.watches = true;
                self.wishes.count = count;
                let excess = self.held().saturating_sub(count as usize);
                self.drop_some(excess);
                // Somebody asks for it now.
                self.problem = None;
                self.next = self.next.min(Instant::now() + REST);
            }
        }
        if client.wire.send(&self.status()).is_ok() {
            self.clients.push(client);
        }
    }

    fn drop_some(&mut self, count: usize) {
        let held = |m: &&mut Machine| matches!(m.stage, Stage::Warming | Stage::Waiting);
        for machine in self.machines.iter_mut().rev().filter(held).take(count) {
            machine.stage = Stage::Ending;
            machine.lifeline = None;
        }
    }

    /// Ends all machines that nobody has taken, and removes what is the pool's.
    fn put_away(mut self) {
        self.let_go(|_| true);
        let deadline = Instant::now() + PATIENCE;
        for machine in self.machines.iter().filter(|machine| machine.stage == Stage::Ending) {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: left.subsec_nanos().into(),
            };
            if !matches!(poll(&mut [PollFd::new(&machine.pidfd, PollFlags::IN)], Some(&timeout)), Ok(1..)) {
                // What it leaves is cleared away by the next command.
                let _ = pidfd_send_signal(&machine.pidfd, Signal::KILL);
            }
            let _ = waitpid(Some(machine.pid), WaitOptions::empty());
        }
        self.place.remove();
    }
}

/// Whether the host has memory for one more machine and some to spare.
fn enough_memory() -> Result<(), String> {
    let Ok(text) = fs::read_to_string(Path::new("/proc/meminfo")) else { return Ok(()) };
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    let (Some(total), Some(available)) = (value("MemTotal"), value("MemAvailable")) else { return Ok(()) };
    let wanted = total / FREE_PART + MACHINE_KIB;
    if available >= wanted {
        return Ok(());
    }
    Err(format!(
        "the host has {} MiB of memory to spare, and another machine waits for {}: it is made when there is more",
        available >> 10,
        wanted >> 10
    ))
}
