//! The state machine without any container: every transition, and the races.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::bail;
use proptest::prelude::*;

use super::*;

/// Containers that do what they are told.
#[derive(Default)]
struct Fake {
    state: Mutex<FakeState>,
}

#[derive(Default)]
struct FakeState {
    /// To end a process, by `id` or `id/exec`.
    ends: HashMap<String, Sender<Exit>>,
    /// The next call of this name fails.
    fails: Option<&'static str>,
    /// A call of this name waits until the sender is gone.
    waits: Option<(&'static str, Receiver<()>)>,
    oom: bool,
    pid: u32,
}

struct NoStreams;

impl Streams for NoStreams {
    fn close_input(&mut self) {}

    fn resize(&self, _: u16, _: u16) -> anyhow::Result<()> {
        bail!("no terminal")
    }
}

impl Fake {
    fn call(&self, name: &'static str) -> anyhow::Result<()> {
        let mut state = lock(&self.state);
        if state.fails == Some(name) {
            state.fails = None;
            bail!("{name} fails");
        }
        if let Some((_, wait)) = state.waits.take_if(|(waits, _)| *waits == name) {
            drop(state);
            let _ = wait.recv();
        }
        Ok(())
    }

    fn made(&self, key: String) -> Made<NoStreams> {
        let (sender, ended) = channel();
        let mut state = lock(&self.state);
        state.pid += 1;
        state.ends.insert(key, sender);
        Made { pid: state.pid, ended, streams: NoStreams }
    }

    fn end(&self, key: &str, status: u32) {
        if let Some(sender) = lock(&self.state).ends.remove(key) {
            let _ = sender.send(Exit::now(status));
        }
    }
}

impl Backend for Fake {
    type More = ();
    type Streams = NoStreams;
    type Stats = ();

    fn create(&self, create: &Create<()>) -> anyhow::Result<Made<NoStreams>> {
        self.call("create")?;
        Ok(self.made(create.id.clone()))
    }

    fn start(&self, _: &str) -> anyhow::Result<()> {
        self.call("start")
    }

    fn exec(&self, id: &str, exec: &str, _: &Value, _: &Stdio) -> anyhow::Result<Made<NoStreams>> {
        self.call("exec")?;
        Ok(self.made(format!("{id}/{exec}")))
    }

    fn kill(&self, id: &str, signal: u32, _: bool) -> anyhow::Result<()> {
        self.call("kill")?;
        self.end(id, 128 + signal);
        Ok(())
    }

    fn kill_exec(&self, _: u32, _: u32) -> anyhow::Result<()> {
        self.call("kill_exec")
    }

    fn pause(&self, _: &str) -> anyhow::Result<()> {
        self.call("pause")
    }

    fn resume(&self, _: &str) -> anyhow::Result<()> {
        self.call("resume")
    }

    fn checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        self.call("checkpoint")?;
        if checkpoint.exit {
            self.end(id, 137);
        }
        Ok(())
    }

    fn update(&self, _: &str, _: &Value) -> anyhow::Result<()> {
        self.call("update")
    }

    fn stats(&self, _: &str) -> anyhow::Result<()> {
        self.call("stats")
    }

    fn was_oom(&self, _: &str) -> bool {
        lock(&self.state).oom
    }

    fn delete(&self, id: &str) -> anyhow::Result<()> {
        self.call("delete")?;
        self.end(id, 137);
        Ok(())
    }
}

struct Rig {
    tasks: Arc<Tasks<Fake>>,
    events: Arc<Mutex<Vec<String>>>,
}

impl Rig {
    fn new() -> Self {
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        let word = |event: &Event| match event {
            Event::Create { .. } => "create".to_owned(),
            Event::Start { .. } => "start".into(),
            Event::ExecAdded { exec, .. } => format!("added {exec}"),
            Event::ExecStarted { exec, .. } => format!("started {exec}"),
            Event::Oom { .. } => "oom".into(),
            Event::Paused { .. } => "paused".into(),
            Event::Resumed { .. } => "resumed".into(),
            Event::Checkpointed { path, .. } => format!("saved {}", path.display()),
            Event::Exit { process, exit, .. } => format!("exit {process} {}", exit.status),
            Event::Delete { .. } => "delete".into(),
        };
        let tasks = Tasks::new(Fake::default(), move |event| lock(&seen).push(word(&event)));
        Self { tasks, events }
    }

    fn create(&self) -> Result<u32> {
        let (bundle, stdio) = ("/b".into(), Stdio::default());
        self.tasks.create(&Create { id: "c".into(), bundle, stdio, more: () })
    }

    fn running() -> Self {
        let rig = Self::new();
        rig.create().unwrap();
        rig.tasks.start("c", "").unwrap();
        rig
    }

    fn save(&self, exit: bool) -> Result<()> {
        self.tasks.checkpoint("c", &Checkpoint { path: "/i".into(), exit })
    }

    fn events(&self) -> String {
        lock(&self.events).join(", ")
    }

    fn fails(&self, call: &'static str) {
        lock(&self.tasks.backend.state).fails = Some(call);
    }

    fn end(&self, key: &str, status: u32) {
        self.tasks.backend.end(key, status);
    }
}

#[test]
fn a_life_is_told_in_its_order() {
    let rig = Rig::running();
    rig.tasks.add_exec("c", "e", Value::Null, Stdio::default()).unwrap();
    rig.tasks.start("c", "e").unwrap();
    rig.end("c/e", 9);
    assert_eq!(rig.tasks.wait("c", "e").unwrap().status, 9);
    rig.tasks.suspend("c", true).unwrap();
    rig.tasks.suspend("c", false).unwrap();
    rig.tasks.kill("c", "", 15, false).unwrap();
    assert_eq!(rig.tasks.wait("c", "").unwrap().status, 143);
    assert_eq!(rig.tasks.delete("c", "e").unwrap().1.status, 9);
    assert_eq!(rig.tasks.delete("c", "").unwrap().1.status, 143);
    assert!(rig.tasks.is_empty());
    let told = "create, start, added e, started e, exit e 9, paused, resumed, exit c 143, delete";
    assert_eq!(rig.events(), told);
}

#[test]
fn what_makes_no_sense_is_refused_by_its_kind() {
    let rig = Rig::new();
    assert!(matches!(rig.tasks.start("c", ""), Err(Error::NotFound(_))));
    rig.create().unwrap();
    assert!(matches!(rig.create(), Err(Error::AlreadyExists(_))));
    assert!(matches!(rig.tasks.suspend("c", true), Err(Error::Precondition(_))));
    assert!(matches!(rig.tasks.start("c", "nosuch"), Err(Error::NotFound(_))));
    rig.tasks.add_exec("c", "e", Value::Null, Stdio::default()).unwrap();
    assert!(matches!(rig.tasks.start("c", "e"), Err(Error::Precondition(_))), "before the task runs");
    assert!(matches!(rig.tasks.kill("c", "e", 9, false), Err(Error::Precondition(_))));
    let again = rig.tasks.add_exec("c", "e", Value::Null, Stdio::default());
    assert!(matches!(again, Err(Error::AlreadyExists(_))));
    rig.tasks.start("c", "").unwrap();
    assert!(matches!(rig.tasks.start("c", ""), Err(Error::Precondition(_))));
    assert!(matches!(rig.tasks.delete("c", ""), Err(Error::Precondition(_))));
    rig.end("c", 0);
    rig.tasks.wait("c", "").unwrap();
    assert!(matches!(rig.tasks.kill("c", "", 9, false), Err(Error::NotFound(_))));
    assert!(matches!(rig.tasks.stats("c"), Err(Error::NotFound(_))));
    assert!(matches!(
        rig.tasks.add_exec("c", "f", Value::Null, Stdio::default()),
        Err(Error::Precondition(_))
    ));
    rig.tasks.delete("c", "").unwrap();
    assert!(matches!(rig.tasks.wait("c", ""), Err(Error::NotFound(_))));
}

#[test]
fn what_fails_leaves_the_state_as_it_was() {
    let rig = Rig::new();
    rig.fails("create");
    assert!(matches!(rig.create(), Err(Error::Failed(_))));
    assert!(rig.tasks.is_empty());
    rig.create().unwrap();
    rig.fails("start");
    assert!(rig.tasks.start("c", "").is_err());
    rig.tasks.start("c", "").unwrap();
    rig.fails("pause");
    assert!(rig.tasks.suspend("c", true).is_err());
    assert_eq!(rig.tasks.state("c", "").unwrap().phase, Phase::Running);
    rig.tasks.add_exec("c", "e", Value::Null, Stdio::default()).unwrap();
    rig.fails("exec");
    assert!(rig.tasks.start("c", "e").is_err());
    assert_eq!(rig.tasks.wait("c", "e").unwrap().status, 255);
    rig.end("c", 0);
    rig.tasks.wait("c", "").unwrap();
    rig.fails("delete");
    assert!(rig.tasks.delete("c", "").is_err());
    rig.tasks.delete("c", "").unwrap();
    assert_eq!(rig.events(), "create, start, added e, exit c 0, delete");
}

#[test]
fn a_task_is_saved_while_it_runs_or_is_suspended_and_as_often_as_one_likes() {
    let rig = Rig::new();
    assert!(matches!(rig.save(false), Err(Error::NotFound(_))));
    rig.create().unwrap();
    assert!(matches!(rig.save(false), Err(Error::Precondition(_))), "before it is started");
    rig.tasks.start("c", "").unwrap();
    rig.save(false).unwrap();
    rig.tasks.add_exec("c", "e", Value::Null, Stdio::default()).unwrap();
    rig.save(false).unwrap();
    rig.tasks.start("c", "e").unwrap();
    rig.save(false).unwrap();
    assert_eq!(rig.tasks.state("c", "e").unwrap().phase, Phase::Running, "an exec goes on, too");
    rig.tasks.suspend("c", true).unwrap();
    rig.save(false).unwrap();
    assert_eq!(rig.tasks.state("c", "").unwrap().phase, Phase::Paused);
    rig.fails("checkpoint");
    assert!(matches!(rig.save(true), Err(Error::Failed(_))));
    rig.tasks.suspend("c", false).unwrap();
    rig.save(true).unwrap();
    assert_eq!(rig.tasks.wait("c", "").unwrap().status, 137);
    assert!(matches!(rig.save(false), Err(Error::NotFound(_))), "it has ended");
    rig.tasks.delete("c", "").unwrap();
    let told = "create, start, saved /i, added e, saved /i, started e, saved /i, paused, saved /i, resumed, saved /i, \
        exit c 137, delete";
    assert_eq!(rig.events(), told);
}

#[test]
fn one_that_is_suspended_can_end_of_being_saved() {
    let rig = Rig::running();
    rig.tasks.suspend("c", true).unwrap();
    rig.save(true).unwrap();
    assert_eq!(rig.tasks.wait("c", "").unwrap().status, 137);
    assert!(matches!(rig.tasks.suspend("c", false), Err(Error::Precondition(_))), "it cannot go on any more");
    assert_eq!(rig.events(), "create, start, paused, saved /i, exit c 137");
}

#[test]
fn two_who_save_a_task_at_once_come_one_after_the_other_and_its_end_after_both() {
    let rig = Rig::running();
    let go = held(&rig, "checkpoint");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| rig.save(true));
        while lock(&rig.tasks.backend.state).waits.is_some() {
            std::thread::yield_now();
        }
        let second = scope.spawn(|| rig.save(false));
        let kill = scope.spawn(|| rig.tasks.kill("c", "", 9, false));
        drop(go);
        first.join().unwrap().unwrap();
        // Its end may be known by then, or not yet.
        let _ = (second.join().unwrap(), kill.join().unwrap());
    });
    rig.tasks.wait("c", "").unwrap();
    let events = rig.events();
    assert!(events.starts_with("create, start, saved /i"), "{events}");
    assert!(events.ends_with("exit c 137"), "{events}");
}

#[test]
fn a_task_that_was_never_started_can_be_deleted() {
    let rig = Rig::new();
    rig.create().unwrap();
    assert_eq!(rig.tasks.delete("c", "").unwrap().1.status, 137);
    assert!(rig.tasks.is_empty());
    rig.create().unwrap();
    assert_eq!(rig.events(), "create, exit c 137, delete, create");
}

#[test]
fn want_of_memory_is_told_before_the_end() {
    let rig = Rig::running();
    lock(&rig.tasks.backend.state).oom = true;
    rig.end("c", 137);
    rig.tasks.wait("c", "").unwrap();
    assert_eq!(rig.events(), "create, start, oom, exit c 137");
}

/// Has a call wait inside the backend; the answer lets it go on.
fn held(rig: &Rig, call: &'static str) -> Sender<()> {
    let (go, wait) = channel();
    lock(&rig.tasks.backend.state).waits = Some((call, wait));
    go
}

#[test]
fn an_end_during_start_comes_after_it() {
    let rig = Rig::new();
    rig.create().unwrap();
    let go = held(&rig, "start");
    std::thread::scope(|scope| {
        let start = scope.spawn(|| rig.tasks.start("c", "").map(drop));
        while lock(&rig.tasks.backend.state).waits.is_some() {
            std::thread::yield_now();
        }
        rig.end("c", 1);
        // Two creates of one id, one kill: they wait or are refused, and do not get in between.
        assert!(matches!(rig.create(), Err(Error::AlreadyExists(_))));
        drop(go);
        start.join().unwrap().unwrap();
    });
    rig.tasks.wait("c", "").unwrap();
    assert_eq!(rig.events(), "create, start, exit c 1");
}

#[test]
fn an_exec_that_ends_at_once_is_told_after_its_start() {
    for _ in 0..50 {
        let rig = Rig::running();
        rig.tasks.add_exec("c", "e", Value::Null, Stdio::default()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !lock(&rig.tasks.backend.state).ends.contains_key("c/e") {
                    std::thread::yield_now();
                }
                rig.end("c/e", 0);
            });
            rig.tasks.start("c", "e").unwrap();
        });
        rig.tasks.wait("c", "e").unwrap();
        assert_eq!(rig.events(), "create, start, added e, started e, exit e 0");
    }
}

#[test]
fn all_who_wait_are_told() {
    let rig = Rig::running();
    std::thread::scope(|scope| {
        let waiters: Vec<_> =
            (0..8).map(|_| scope.spawn(|| rig.tasks.wait("c", "").unwrap().status)).collect();
        std::thread::sleep(Duration::from_millis(5));
        rig.end("c", 6);
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), 6);
        }
    });
    assert_eq!(rig.tasks.wait("c", "").unwrap().status, 6);
}

proptest! {
    /// Whatever is called in whatever order: an end is told once, and nothing of a process is told after its end.
    #[test]
    fn no_order_of_calls_confuses_it(calls in prop::collection::vec(0..12, 0..40)) {
        let rig = Rig::new();
        for call in calls {
            match call {
                0 => drop(rig.create()),
                1 => drop(rig.tasks.start("c", "")),
                2 => drop(rig.tasks.add_exec("c", "e", Value::Null, Stdio::default())),
                3 => drop(rig.tasks.start("c", "e")),
                4 => drop(rig.tasks.kill("c", "", 9, true)),
                5 => drop(rig.tasks.delete("c", "")),
                6 => drop(rig.tasks.delete("c", "e")),
                7 => drop(rig.tasks.suspend("c", true)),
                8 => drop(rig.tasks.suspend("c", false)),
                9 => drop(rig.save(false)),
                10 => drop(rig.save(true)),
                _ => rig.end("c/e", 0),
            }
        }
        let events = lock(&rig.events).clone();
        let mut phase = "";
        for event in &events {
            let fits = match event.as_str() {
                "create" => phase.is_empty() || phase == "delete",
                "start" => phase == "create",
                "paused" => phase == "start",
                "resumed" => phase == "paused",
                "saved /i" => matches!(phase, "start" | "paused"),
                "delete" => phase == "exit",
                event if event.starts_with("exit c") => matches!(phase, "create" | "start" | "paused"),
                _ => true,
            };
            prop_assert!(fits, "{event} in {events:?}");
            phase = match event.as_str() {
                "resumed" => "start",
                event @ ("create" | "start" | "paused" | "delete") => event,
                event if event.starts_with("exit c") => "exit",
                _ => phase,
            };
        }
    }
}

#[test]
fn who_waits_for_a_while_is_told_when_it_has_not_ended() {
    let rig = Rig::running();
    assert_eq!(rig.tasks.wait_for("c", Duration::from_millis(1)).unwrap(), None);
    let waiter = {
        let tasks = Arc::clone(&rig.tasks);
        std::thread::spawn(move || tasks.wait_for("c", Duration::from_secs(60)).unwrap())
    };
    rig.end("c", 4);
    assert_eq!(waiter.join().unwrap().unwrap().status, 4);
    assert!(matches!(rig.tasks.wait_for("nosuch", Duration::ZERO), Err(Error::NotFound(_))));
}
