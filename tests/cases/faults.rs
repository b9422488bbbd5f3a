//! kill -9 of every process that a verb involves, at moments spread over the verb: a table, each row a verb. Whoever is killed, the
//! verb ends, what is said afterwards is true, a container beside it is well, the verb works again, and nothing is left.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::leak::parent;
use bulkhead_tests::process::{Finished, Program, Running};
use bulkhead_tests::test;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::BUSYBOX;
use crate::network::connected;

/// How long anything may take that is not meant to take longer, in the host's time.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// How long what is left of the killed may take to go.
const LEAK_PATIENCE: Duration = Duration::from_secs(3);
/// What takes longer may have made a template, which it does not the next time.
const MAKES_TEMPLATE: Duration = Duration::from_millis(300);
/// Moments of each verb at which each process is killed: in every run, and when asked for.
pub const FEW: u32 = 1;
pub const MANY: u32 = 5;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The process that the verb was given to.
    Caller,
    /// The supervisor, or `bulkhead-oci`'s sandbox.
    Supervisor,
    /// The process that stands for the container of `bulkhead-oci`.
    StandIn,
    Monitor,
    FileServer,
    Passt,
    /// All of them at once.
    All,
}
use Victim::{All, Caller, FileServer, Monitor, Passt, Supervisor};

/// A verb. The lines are of shell; `$W` is a directory of the test's.
pub struct Row {
    pub verb: &'static str,
    /// Options of the container `box` that is there before; "none": there is none.
    pub container: &'static str,
    /// Before each time.
    pub prepare: &'static str,
    pub line: &'static str,
    pub victims: &'static [Victim],
    /// After each time, besides the removal of `box`.
    pub undo: &'static str,
}

const NONE: &str = "none";
/// Of a verb that makes `box`.
pub const ROW: Row = Row {
    verb: "run",
    container: NONE,
    prepare: "",
    line: "",
    victims: &[Caller, Supervisor, Monitor],
    undo: "",
};
/// Of a verb about a `box` that is there.
pub const ON_C: Row = Row { container: "", ..ROW };

/// Verbs that make a container.
const MAKERS: &[Row] = &[
    Row {
        line: "bulkhead run --name box busybox echo hi",
        victims: &[Caller, Supervisor, Monitor, All],
        ..ROW
    },
    Row { verb: "run --rm", line: "bulkhead run --rm --name box busybox echo hi", ..ROW },
    Row {
        verb: "run -d",
        line: "bulkhead run -d --name box busybox sleep 1000",
        victims: &[Supervisor, All],
        ..ROW
    },
    Row {
        verb: "run -v",
        prepare: "mkdir -p $W/share",
        line: "bulkhead run -d --name box -v $W/share:/share busybox sleep 1000",
        victims: &[Supervisor, Monitor, FileServer],
        ..ROW
    },
    Row {
        verb: "run --network passt",
        line: "bulkhead run -d --name box --network passt busybox sleep 1000",
        victims: &[Supervisor, Monitor, Passt],
        ..ROW
    },
    Row {
        verb: "run, which makes a template",
        prepare: "rm -rf /var/lib/bulkhead/templates/*",
        line: "bulkhead run -d --name box busybox sleep 1000",
        victims: &[Caller, Monitor, All],
        // What is half-made goes when the next is made.
        undo: "bulkhead run --rm busybox true",
        ..ROW
    },
    Row {
        verb: "pool warm",
        line: "bulkhead pool warm --image busybox -n 1",
        victims: &[Caller, Monitor],
        undo: "bulkhead pool rm --all",
        ..ROW
    },
    Row {
        verb: "pool rm",
        prepare: "bulkhead pool warm --image busybox -n 1",
        line: "bulkhead pool rm busybox",
        victims: &[Caller, Supervisor],
        undo: "bulkhead pool rm --all",
        ..ROW
    },
];

/// Verbs on a container that runs.
const ACTS: &[Row] = &[
    Row { verb: "exec", line: "bulkhead exec box echo hi", ..ON_C },
    Row { verb: "cp to it", line: "bulkhead cp /usr/bin/busybox box:/tmp/b", ..ON_C },
    Row { verb: "cp from it", line: "bulkhead cp box:/bin/busybox $W/b", undo: "rm -f $W/b", ..ON_C },
    Row { verb: "logs", line: "bulkhead logs box", victims: &[Caller], ..ON_C },
    Row { verb: "top, stats", line: "bulkhead top box && bulkhead stats box", victims: &[Monitor], ..ON_C },
    Row { verb: "wait", line: "bulkhead kill box >/dev/null; bulkhead wait box", ..ON_C },
    Row { verb: "kill", line: "bulkhead kill box", ..ON_C },
    Row { verb: "stop", line: "bulkhead stop -t 1 box", ..ON_C },
    Row { verb: "rm -f", line: "bulkhead rm -f box", ..ON_C },
    Row {
        verb: "rm",
        prepare: "bulkhead stop -t 0 box",
        line: "bulkhead rm box",
        victims: &[Caller],
        ..ON_C
    },
    Row {
        verb: "snapshot",
        line: "bulkhead snapshot box $W/saved",
        undo: "rm -rf $W/saved $W/.saved*",
        ..ON_C
    },
    Row {
        verb: "restore",
        container: NONE,
        prepare: "[ -e $W/origin ] || { bulkhead run -d --name oo busybox sleep 1000 && bulkhead snapshot oo $W/origin && bulkhead rm -f oo; }",
        line: "bulkhead restore -d --name box $W/origin",
        victims: &[Supervisor, Monitor],
        ..ROW
    },
    Row {
        verb: "fork",
        line: "bulkhead fork --name twin box",
        victims: &[Caller, Supervisor, All],
        undo: "bulkhead rm -f twin; bulkhead ps -aq >/dev/null",
        ..ON_C
    },
    Row {
        verb: "image load, rm",
        container: NONE,
        line: "bulkhead --root $W/r image load -q $IMAGE >$W/id && bulkhead --root $W/r image rm busybox",
        victims: &[Caller],
        undo: "rm -rf $W/r $W/id",
        ..ROW
    },
];

test!(whoever_is_killed_while_a_container_is_made, BUSYBOX.deadline(3000).shows_output());
fn whoever_is_killed_while_a_container_is_made(host: &Host) -> Result<()> {
    let _network = connected(host)?;
    Table::new(host, Kind::Cli)?.run(MAKERS, FEW)
}

test!(whoever_is_killed_while_something_is_done_with_it, BUSYBOX.deadline(3000).shows_output());
fn whoever_is_killed_while_something_is_done_with_it(host: &Host) -> Result<()> {
    Table::new(host, Kind::Cli)?.run(ACTS, FEW)
}

/// Why it is not run always.
pub const LONG: &str = "the tables of kills with more moments; some minutes";

test!(whoever_is_killed_at_many_moments_of_making, BUSYBOX.deadline(30_000).shows_output().pending(LONG));
fn whoever_is_killed_at_many_moments_of_making(host: &Host) -> Result<()> {
    let _network = connected(host)?;
    Table::new(host, Kind::Cli)?.run(MAKERS, MANY)
}

test!(whoever_is_killed_at_many_moments_of_acts, BUSYBOX.deadline(30_000).shows_output().pending(LONG));
fn whoever_is_killed_at_many_moments_of_acts(host: &Host) -> Result<()> {
    Table::new(host, Kind::Cli)?.run(ACTS, MANY)
}

/// Which front end the verbs are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Cli,
    Oci,
}

/// A process that can be a victim.
struct Process {
    pid: i32,
    what: Victim,
}

/// A host on which the rows of a table are tried.
pub struct Table<'h> {
    host: &'h Host,
    kind: Kind,
    /// Of the container beside it all.
    others: Vec<i32>,
    failures: Vec<String>,
}

impl<'h> Table<'h> {
    pub fn new(host: &'h Host, kind: Kind) -> Result<Self> {
        // Before all looks at the host: what a first start makes and keeps.
        host.bulkhead(["run", "-d", "--name", "well", "busybox", "sleep", "100000"])?.ok()?;
        let mut table = Self { host, kind, others: Vec::new(), failures: Vec::new() };
        table.others = table.processes(0).iter().map(|process| process.pid).collect();
        Ok(table)
    }

    pub fn run(mut self, rows: &[Row], moments: u32) -> Result<()> {
        println!("| verb | takes, ms | killed | moments | of them with a victim |\n|---|---|---|---|---|");
        let start = Instant::now();
        for row in rows {
            self.row(row, moments).with_context(|| row.verb)?;
        }
        println!("all of it: {:.0} s of the host's time", start.elapsed().as_secs_f64());
        self.host.bulkhead(["rm", "-f", "well"])?.ok()?;
        ensure!(self.failures.is_empty(), "{} failures:\n{}", self.failures.len(), self.failures.join("\n"));
        Ok(())
    }

    fn row(&mut self, row: &Row, moments: u32) -> Result<()> {
        // Once as it is meant, which also makes what is made once and kept.
        self.make(row)?;
        let mut took = self.start(row)?.wait()?.ok()?.took;
        self.clear(row)?;
        if took > MAKES_TEMPLATE {
            self.make(row)?;
            took = self.start(row)?.wait()?.ok()?.took;
            self.clear(row)?;
        }
        // What ends in peace leaves the taking apart of its machine to the kernel.
        std::thread::sleep(Duration::from_secs(1));
        let before = self.host.look();
        for (place, &victim) in (0..).zip(row.victims) {
            let mut hits = 0;
            for moment in 0..moments {
                // Not the same moments for each.
                let victims = u32::try_from(row.victims.len())?;
                let after = took * (2 * (victims * moment + place) + 1) / (2 * victims * moments);
                let what =
                    format!("{}, {victim:?} killed after {:.1} ms", row.verb, after.as_secs_f64() * 1e3);
                match self.once(row, victim, after) {
                    Ok(hit) => hits += u32::from(hit),
                    Err(error) => self.failed(format!("{what}: {error:#}"))?,
                }
                self.clear(row).with_context(|| what.clone())?;
                if let Err(error) = self.host.is_as(&before, &what, LEAK_PATIENCE) {
                    self.failed(format!("{error:#}"))?;
                }
            }
            let ms = took.as_secs_f64() * 1e3;
            println!("| {} | {ms:.0} | {victim:?} | {moments} | {hits} |", row.verb);
        }
        self.make(row)?;
        ends(self.start(row)?)?.ok().context("once more, after all that")?;
        self.clear(row)?;
        self.host.is_as(&before, row.verb, LEAK_PATIENCE)
    }

    /// Goes on with the others, as long as there are few.
    fn failed(&mut self, failure: String) -> Result<()> {
        println!("FAILED: {failure}");
        self.failures.push(format!("- {failure}"));
        ensure!(self.failures.len() < 12, "{}", self.failures.join("\n"));
        Ok(())
    }

    /// Kills at one moment, and looks at what comes of it. Answers whether there was anybody to kill.
    fn once(&self, row: &Row, victim: Victim, after: Duration) -> Result<bool> {
        self.make(row)?;
        let running = self.start(row)?;
        std::thread::sleep(after);
        let caller = running.pid().cast_signed();
        let mut hit = false;
        for process in self.processes(caller) {
            // Those that the caller has not waited for are nobody's any more.
            if victim == All || process.what == victim {
                hit |= Pid::from_raw(process.pid).is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok());
            }
        }
        let finished = ends(running)?;
        if finished.status != 0 && victim != Caller && victim != All {
            let said = format!(
                "{}{}",
                finished.stderr(),
                fs::read_to_string(self.host.work().join("err")).unwrap_or_default()
            );
            ensure!(
                finished.status != 101 && !said.trim().is_empty(),
                "it says nothing of why it failed: {finished}"
            );
            ensure!(!said.contains("panicked"), "{said}");
        }
        self.truth(row, &finished)?;
        self.host.bulkhead(["exec", "well", "echo", "well"])?.ok()?.stdout_is("well\n")?;
        Ok(hit)
    }

    /// What is said of containers is so.
    fn truth(&self, row: &Row, finished: &Finished) -> Result<()> {
        let said = |finished: Finished| -> Result<Vec<Value>> {
            Ok(serde_json::from_str(&finished.ok()?.stdout())?)
        };
        let end = Instant::now() + PATIENCE;
        'again: loop {
            let listed = match self.kind {
                Kind::Cli => said(self.host.bulkhead(["ps", "-a", "--format", "json"])?)?,
                Kind::Oci => {
                    said(self.shell("bulkhead-oci --root $W/oci list -f json | sed 's/^null$/[]/'")?.run()?)?
                }
            };
            for container in listed.iter().filter(|container| container["name"] != "well") {
                let name = container["name"].as_str().or(container["id"].as_str()).context("no name")?;
                let still = match container["status"].as_str().context("no status")? {
                    "running" => {
                        let line = match self.kind {
                            Kind::Cli => format!("bulkhead exec {name} true"),
                            Kind::Oci => format!("bulkhead-oci --root $W/oci exec {name} true"),
                        };
                        let tried = self.shell(&line)?.run()?;
                        // Who has just been killed is said to run for as long as it takes to end.
                        (tried.status != 0).then(|| format!("it is said to run, and does not: {tried}"))
                    }
                    "exited" => {
                        ensure!(container["exit_code"].is_u64(), "{container}");
                        let text = self.host.bulkhead(["inspect", name])?.ok()?.stdout();
                        let seen: Vec<Value> = serde_json::from_str(&text)?;
                        ensure!(seen[0]["status"] == "exited", "{text}");
                        None
                    }
                    "created" if self.kind == Kind::Cli => {
                        Some(format!("it is being made for ever: {container}"))
                    }
                    _ => None,
                };
                if let Some(still) = still {
                    ensure!(Instant::now() < end, "{}: {still}\n{finished}", row.verb);
                    std::thread::sleep(Duration::from_millis(50));
                    continue 'again;
                }
            }
            return Ok(());
        }
    }

    fn make(&self, row: &Row) -> Result<()> {
        if row.container != NONE {
            let line = match self.kind {
                Kind::Cli => format!(
                    "bulkhead run -d --name box {} busybox sh -c 'trap exit TERM; echo up; while :; do sleep 0.1; done'",
                    row.container
                ),
                Kind::Oci => row.container.to_owned(),
            };
            self.shell(&line)?.run()?.ok()?;
        }
        if !row.prepare.is_empty() {
            self.shell(row.prepare)?.run()?.ok()?;
        }
        Ok(())
    }

    fn start(&self, row: &Row) -> Result<Running> {
        let exec = if row.line.contains([';', '&']) { "" } else { "exec " };
        self.shell(&format!("{exec}{}", row.line))?.spawn()
    }

    fn clear(&self, row: &Row) -> Result<()> {
        let remove = match self.kind {
            // Why a template could not be made is kept until one is made: somebody was killed.
            Kind::Cli => "rm -f /var/lib/bulkhead/templates/failure; bulkhead rm -f box >/dev/null",
            Kind::Oci => "bulkhead-oci --root $W/oci delete -f box",
        };
        let undo = if row.undo.is_empty() { "true" } else { row.undo };
        let finished = ends(self.shell(&format!("{remove} && {{ {undo}; }}"))?.spawn()?)?;
        finished.ok().map(drop)
    }

    fn shell(&self, line: &str) -> Result<Program> {
        let program = Program::new(["sh", "-c", line]).env("W", self.host.work().as_os_str());
        Ok(program.env("IMAGE", self.host.image("busybox").as_os_str()))
    }

    /// Those of the verb that the `caller` was given, and of the container that it is about.
    fn processes(&self, caller: i32) -> Vec<Process> {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace("self");
        let by_shell = comm(caller) == "sh";
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let Some(parent) = parent(pid).filter(|_| !self.others.contains(&pid)) else { continue };
            let what = match comm(pid).as_str() {
                "bulkhead" | "bulkhead-oci" if pid == caller || by_shell && parent == caller => Caller,
                "bulkhead-oci" if namespace(&pid.to_string()) != own => Victim::StandIn,
                "bulkhead" | "bulkhead-oci" => Supervisor,
                "bulkhead-vmm" => Monitor,
                name if name.starts_with("passt") => Passt,
                _ if fs::read(entry.path().join("cmdline")).is_ok_and(|words| has(&words, b"virtiofsd")) => {
                    FileServer
                }
                _ => continue,
            };
            found.push(Process { pid, what });
        }
        found
    }
}

/// Waits for the end of what must end by itself.
pub fn ends(mut running: Running) -> Result<Finished> {
    let (end, mut pause) = (Instant::now() + PATIENCE, Duration::from_millis(2));
    while !running.ended()? {
        if Instant::now() > end {
            let _ = running.signal(Signal::KILL);
            bail!("it does not end: {}", running.wait()?);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
    running.wait()
}

pub fn comm(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// Memory of a process that is in use, in KiB.
pub fn rss_kib(pid: u64) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim_end_matches("kB").trim().parse()?)
}

fn has(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}
