//! What hostile guests are made of, and what must be true after each.

use std::any::Any;
use std::fs;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vmm::control::{Client, Method};

use super::common::{Guest, Place, kvm, monitor};

/// Windows of the devices, in order.
pub const DISK: u32 = 0;
pub const NET: u32 = 1;
pub const VSOCK: u32 = 2;
pub const RNG: u32 = 3;
pub const CONSOLE: u32 = 4;
/// All of them, each with a queue that the device takes from, and the sizes of its queues.
pub const ALL: [Device; 5] = [
    Device { window: DISK, name: "disk", queue: 0, queues: &[256] },
    Device { window: NET, name: "net0", queue: 1, queues: &[256, 256] },
    Device { window: VSOCK, name: "vsock", queue: 1, queues: &[128, 128, 16] },
    Device { window: RNG, name: "rng", queue: 0, queues: &[16] },
    Device { window: CONSOLE, name: "console", queue: 1, queues: &[64, 64] },
];

#[derive(Clone, Copy)]
pub struct Device {
    pub window: u32,
    pub name: &'static str,
    pub queue: u32,
    pub queues: &'static [u16],
}

/// Where buffers are, one MiB each.
pub const DATA: u32 = 0x80_0000;
/// Where the guest's memory ends below the hole, and where it goes on.
pub const HOLE: u64 = 0xc000_0000;
pub const AFTER_HOLE: u64 = 0x1_0000_0000;
/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// Feature bits that a driver accepts here besides version 1.
const F_INDIRECT: u32 = 1 << 28;

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

pub fn table(descriptors: &[Descriptor]) -> Vec<u8> {
    let bytes = |(address, length, flags, next): &Descriptor| {
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
            .concat()
    };
    descriptors.iter().flat_map(bytes).collect()
}

/// Where a queue is: descriptors, and behind them both rings.
pub fn queue_at(window: u32, queue: u32) -> u32 {
    0x40_0000 + (window * 4 + queue) * 0x1_0000
}
pub const AVAILABLE: u32 = 0x4000;
pub const USED: u32 = 0x8000;

pub fn register(window: u32, offset: u32) -> u32 {
    0xd000_0000 + window * 0x1000 + offset
}

/// Moves of a driver, right and wrong.
impl Guest {
    pub fn register(self, window: u32, offset: u32, value: u32) -> Self {
        self.store(register(window, offset), value)
    }

    /// A queue with these descriptors and heads; the ring's index says `index`.
    pub fn queue(
        self,
        window: u32,
        queue: u32,
        descriptors: &[Descriptor],
        heads: &[u16],
        index: u16,
    ) -> Self {
        let at = queue_at(window, queue);
        let ring: Vec<u8> = [0, index].iter().chain(heads).flat_map(|word| word.to_le_bytes()).collect();
        self.place(at, table(descriptors)).place(at + AVAILABLE, ring)
    }

    /// What a driver does up to accepting features.
    pub fn negotiate(self, window: u32) -> Self {
        self.register(window, 0x70, 0)
            .register(window, 0x70, 3)
            .register(window, 0x24, 1)
            .register(window, 0x20, 1)
            .register(window, 0x24, 0)
            .register(window, 0x20, F_INDIRECT)
            .register(window, 0x70, 11)
    }

    /// Tells the device where a queue is.
    pub fn set_queue(self, window: u32, queue: u32, size: u32, at: u64, available: u64, used: u64) -> Self {
        [(0x80, at), (0x90, available), (0xa0, used)]
            .into_iter()
            .fold(
                self.register(window, 0x30, queue).register(window, 0x38, size),
                |guest, (offset, address)| {
                    guest.register(window, offset, address as u32).register(
                        window,
                        offset + 4,
                        (address >> 32) as u32,
                    )
                },
            )
            .register(window, 0x44, 1)
    }

    /// All that a driver does; queues of these sizes.
    pub fn set_up(self, device: Device) -> Self {
        let window = device.window;
        (0..)
            .zip(device.queues)
            .fold(self.negotiate(window), |guest, (queue, size)| {
                let at = u64::from(queue_at(window, queue));
                let (available, used) = (at + u64::from(AVAILABLE), at + u64::from(USED));
                guest.set_queue(window, queue, (*size).into(), at, available, used)
            })
            .register(window, 0x70, 15)
    }

    pub fn kick(self, window: u32, queue: u32) -> Self {
        self.register(window, 0x50, queue)
    }

    /// Waits until the device has given something back, or needs a reset.
    pub fn wait(self, window: u32, queue: u32) -> Self {
        // mov $status,%ebx; mov $index,%esi
        self.raw(&[0xbb])
            .raw(&register(window, 0x70).to_le_bytes())
            .raw(&[0xbe])
            .raw(&(queue_at(window, queue) + USED + 2).to_le_bytes())
            // 1: mov (%rbx),%eax; test $0x40,%al; jnz 2f; mov (%rsi),%cx; test %cx,%cx; jz 1b; 2:
            .raw(&[0x8b, 0x03, 0xa8, 0x40, 0x75, 0x08, 0x66, 0x8b, 0x0e, 0x66, 0x85, 0xc9, 0x74, 0xf2])
    }

    /// Asks the entropy device for something, as a driver does; then says so and stands still.
    fn behaves_in_the_end(self) -> Self {
        // In place of whatever the act has left there.
        let at = queue_at(RNG, 0);
        self.store(at, DATA)
            .store(at + 4, 0)
            .store(at + 8, 32)
            .store(at + 12, WRITE.into())
            .store(at + AVAILABLE, 0x1_0000)
            .store(at + AVAILABLE + 4, 0)
            .store(at + USED, 0)
            .set_up(ALL[RNG as usize])
            .kick(RNG, 0)
            .wait(RNG, 0)
            .print("done\n")
            .halt()
    }
}

/// What is to come of an act.
pub enum End {
    /// The machine goes on: a device works, the control socket answers. These devices were stopped.
    Lives(&'static [&'static str]),
    /// It ends: status and outcome in the report.
    Ends(i32, &'static str),
}

/// A row of a table.
pub struct Act {
    pub name: String,
    pub guest: Guest,
    pub end: End,
    /// Which devices are stopped is chance.
    pub unknown: bool,
    /// What the host does meanwhile.
    pub host: fn(&Place) -> Box<dyn Any>,
}

pub fn act(name: impl Into<String>, guest: Guest, end: End) -> Act {
    Act { name: name.into(), guest, end, unknown: false, host: |_| Box::new(()) }
}

/// Most resident memory of the monitor. Its own is 4 MiB; the guest's comes in pieces of 2 MiB.
const MAX_RSS_KIB: i64 = 64 << 10;
/// Most bytes that it says.
const MAX_LOG: usize = 8 << 10;
/// Most bytes of its report.
const MAX_REPORT: u64 = 64 << 10;
/// How long an act may take on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// Plays all, each in a machine of its own.
pub fn play(acts: &[Act]) {
    if !kvm() {
        return;
    }
    let mut wrong = Vec::new();
    for act in acts {
        let start = Instant::now();
        let result = std::panic::catch_unwind(|| perform(act));
        println!("{:6.0?} {}", start.elapsed(), act.name);
        if result.is_err() {
            wrong.push(act.name.as_str());
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), acts.len());
}

fn perform(act: &Act) {
    let place = Place::new();
    let cable = UnixListener::bind(place.path("net")).unwrap();
    let _host = (act.host)(&place);
    let guest = Guest::new().map_devices().then(&act.guest).behaves_in_the_end();
    let config = json!({
        "boot": {"kernel": place.write("kernel", guest.elf())},
        // Some of it after the hole.
        "machine": {"memory_mib": 3200},
        "disks": [{"id": "disk", "path": place.write("disk", vec![7; 1 << 20])}],
        "networks": [{"socket": place.path("net")}],
        "vsock": {"cid": 3, "socket": place.path("vsock")},
        "control": place.path("control"), "report": place.path("report"),
    });
    let config = place.write("config", config.to_string());
    let log = fs::File::create(place.path("log")).unwrap();
    let mut command = monitor();
    command.arg("--config").arg(config).stderr(log).stdout(Stdio::null());
    limit_descriptors(&mut command);
    let child = command.spawn().unwrap();
    let mut running = Running { child: Some(child), place };
    match act.end {
        End::Lives(stopped) => running.lives((!act.unknown).then_some(stopped)),
        End::Ends(status, outcome) => running.ends(status, outcome),
    }
    drop(cable);
    assert_eq!(fs::metadata(running.place.path("disk")).unwrap().len(), 1 << 20, "the disk has another size");
}

struct Running {
    child: Option<Child>,
    place: Place,
}

impl Running {
    fn log(&self) -> String {
        fs::read_to_string(self.place.path("log")).unwrap()
    }

    fn lives(&mut self, stopped: Option<&[&str]>) {
        let deadline = Instant::now() + PATIENCE;
        let mut client = self.client(deadline);
        loop {
            // It answers all the time, not only in the end.
            let status = client.status().unwrap_or_else(|error| panic!("{error}; {}", self.log()));
            if status.console_tail.ends_with("done\n") {
                break;
            }
            assert!(Instant::now() < deadline, "it does not get on: {status:?}; {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
        self.is_idle();
        // Nor is there no room for somebody who comes now.
        let mut client =
            Client::connect(&self.place.path("control")).unwrap_or_else(|error| panic!("{error}"));
        let metrics = client.call(Method::Metrics).unwrap();
        assert!(metrics["devices"]["rng"]["bytes"].as_u64().unwrap() >= 32);
        client.call(Method::Quit).unwrap();
        self.ends(0, "quit");
        let log = self.log();
        let Some(stopped) = stopped else { return };
        for device in ALL {
            let misused = format!("misuses {},", device.name);
            assert_eq!(log.contains(&misused), stopped.contains(&device.name), "{}: {log}", device.name);
        }
    }

    fn client(&mut self, deadline: Instant) -> Client {
        loop {
            if let Ok(client) = Client::connect(&self.place.path("control")) {
                return client;
            }
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}: {}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The guest stands still, so nothing is left to do.
    fn is_idle(&self) {
        let path = PathBuf::from(format!("/proc/{}/stat", self.child.as_ref().unwrap().id()));
        let ticks = || {
            let stat = fs::read_to_string(&path).unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        };
        for _ in 0..20 {
            let before = ticks();
            thread::sleep(Duration::from_millis(50));
            if ticks() - before <= 1 {
                return;
            }
        }
        panic!("the monitor is busy though its guest stands still: {}", self.log());
    }

    fn ends(&mut self, status: i32, outcome: &str) {
        let (ended, rss_kib) = wait(self.child.take().unwrap());
        let log = self.log();
        assert_eq!(ended.code(), Some(status), "{ended:?}: {log}");
        let report: serde_json::Value =
            serde_json::from_slice(&fs::read(self.place.path("report")).unwrap()).unwrap();
        assert_eq!(report["outcome"], outcome, "{log}");
        if outcome == "crash" {
            assert!(log.contains("vCPU 0"), "it does not say why: {log}");
        }
        assert!(rss_kib < MAX_RSS_KIB, "{rss_kib} KiB of memory");
        assert!(log.len() < MAX_LOG, "{} bytes of log: {}", log.len(), &log[..MAX_LOG]);
        let length = fs::metadata(self.place.path("report")).unwrap().len();
        assert!(length < MAX_REPORT, "{length} bytes of report");
        assert!(!self.place.path("control").exists() && !self.place.path("vsock").exists());
        assert!(!log.contains("panicked at"), "{log}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How it ended, and the most memory that it had.
fn wait(child: Child) -> (ExitStatus, i64) {
    let pid = child.id() as libc::pid_t;
    let mut status = 0;
    let deadline = Instant::now() + PATIENCE;
    loop {
        // SAFETY: a rusage of zeros is valid, and both pointers are to values that live across the call. The child is ours, and
        // nobody else waits for it.
        let (waited, usage) = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            (libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage), usage)
        };
        if waited == pid {
            return (ExitStatus::from_raw(status), usage.ru_maxrss);
        }
        if Instant::now() > deadline {
            // SAFETY: plain numbers; the child was not waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// As many descriptors as a process has where nobody has said anything.
fn limit_descriptors(command: &mut Command) {
    let limit = || {
        let limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
        // SAFETY: one rlimit that lives across the call, which allocates nothing.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: see there.
    unsafe { command.pre_exec(limit) };
}
