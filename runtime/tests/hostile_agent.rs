//! A guest in which somebody has taken the agent's place, and a monitor that somebody has taken over: the host gives up with
//! words that say why, in bounded time and memory, and nothing of what it was told acts on a terminal.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on panics

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use bulkhead_protocol::agent::stream_hello::Kind;
use bulkhead_protocol::agent::{
    ConfigureRequest, ContainerRequest, GuestInfo, ListProcessesResponse, StreamReply,
};
use bulkhead_protocol::wire::{self, Code, Response};
use bulkhead_protocol::{client::CallError, stream};
use bulkhead_runtime::guest::{Guest, configure};
use bulkhead_runtime::{Context, Result};

/// What the host does.
#[derive(Clone, Copy)]
enum Wish {
    Call,
    Configure,
    Stream,
    Port,
}

/// A row: what is asked, what is said in answer, and a word of the error.
type Row = (&'static str, Wish, fn(&mut UnixStream), &'static str);

/// Sends for as long as somebody reads.
fn for_ever(socket: &mut UnixStream, bytes: &[u8]) {
    let many = bytes.repeat((64 << 10) / bytes.len() + 1);
    while socket.write_all(&many).is_ok() {}
}

fn send(socket: &mut UnixStream, bytes: &[u8]) {
    // Who has heard enough hangs up.
    let _ = socket.write_all(bytes);
}

/// Accepts the connection, as a monitor does.
fn ok(socket: &mut UnixStream) {
    send(socket, b"OK 1073741824\n");
}

fn frame(id: u32, response: &Response) -> Vec<u8> {
    wire::encode(wire::Kind::Response, id, response).unwrap()
}

fn answer(socket: &mut UnixStream, response: &Response) {
    ok(socket);
    send(socket, &frame(1, response));
}

const ESCAPES: &str = "\x1b]0;owned\x07\x1b[2J\x1b[31m\r\u{9b}1m";

const ROWS: &[Row] = &[
    ("nobody listens", Wish::Call, |_| (), "nothing listens there"),
    (
        "the monitor says something else",
        Wish::Call,
        |s| send(s, b"HTTP/1.1 200 OK\n"),
        "refused a connection",
    ),
    ("the monitor's line has no end", Wish::Call, |s| for_ever(s, b"O"), "refused a connection"),
    (
        "the monitor's line would act on a terminal",
        Wish::Call,
        |s| send(s, b"\x1b[2J\n"),
        "refused a connection",
    ),
    ("silence, then the end", Wish::Call, ok, "broke"),
    (
        "noise",
        Wish::Call,
        |s| {
            ok(s);
            for_ever(s, &[7; 64]);
        },
        "not valid",
    ),
    (
        "zeros without end",
        Wish::Call,
        |s| {
            ok(s);
            for_ever(s, &[0; 64]);
        },
        "not valid",
    ),
    (
        "a frame of 4 GiB",
        Wish::Call,
        |s| {
            ok(s);
            for_ever(s, &[0xff; 9]);
        },
        "not valid",
    ),
    (
        "frames of other calls without end",
        Wish::Call,
        |s| {
            ok(s);
            for_ever(s, &frame(77, &Response::ok(&GuestInfo::default())));
        },
        "nobody asked for",
    ),
    (
        "the largest frames of other calls without end",
        Wish::Call,
        |s| {
            ok(s);
            for_ever(s, &frame(77, &Response { status: None, payload: vec![0; (4 << 20) - 100] }));
        },
        "nobody asked for",
    ),
    (
        "half a frame",
        Wish::Call,
        |s| {
            ok(s);
            send(s, &[0, 0, 1, 0, 0, 0, 0, 1, 2, 0, 7]);
        },
        "broke",
    ),
    (
        "a message that is none",
        Wish::Call,
        |s| {
            ok(s);
            send(s, &[0, 0, 0, 4, 0, 0, 0, 1, 2, 0, 0x0a, 0xff, 0xff, 0xff]);
        },
        "not valid",
    ),
    (
        "an answer that is none",
        Wish::Call,
        |s| answer(s, &Response { status: None, payload: vec![0xff; 1000] }),
        "not valid",
    ),
    (
        "messages in messages",
        Wish::Call,
        |s| answer(s, &Response { status: None, payload: vec![0x0b; 100_000] }),
        "not valid",
    ),
    (
        "two million processes that are nothing",
        Wish::Call,
        |s| answer(s, &Response { status: None, payload: [0x0a, 0].repeat((2 << 20) - 100) }),
        "more than 65536 fields",
    ),
    (
        "a refusal of 3 MiB that would act on a terminal",
        Wish::Call,
        |s| answer(s, &Response::error(Code::Internal, ESCAPES.repeat(100_000))),
        "owned",
    ),
    (
        "a code that does not exist",
        Wish::Call,
        |s| {
            let mut r = Response::error(Code::Internal, "why");
            r.status.as_mut().unwrap().code = -7;
            answer(s, &r);
        },
        "why",
    ),
    (
        "an agent of another version",
        Wish::Configure,
        |s| answer(s, &Response::ok(&GuestInfo { protocol: 99, ..GuestInfo::default() })),
        "protocol 99",
    ),
    (
        "information of 4 MiB",
        Wish::Configure,
        |s| {
            answer(
                s,
                &Response::ok(&GuestInfo { kernel_release: "k".repeat(4_000_000), ..GuestInfo::default() }),
            )
        },
        "protocol 0",
    ),
    ("no information", Wish::Configure, ok, "cannot set the guest up"),
    (
        "a stream that is refused",
        Wish::Stream,
        |s| {
            ok(s);
            reply(s, "no such container");
        },
        "no such container",
    ),
    (
        "a stream that is refused by what would act on a terminal",
        Wish::Stream,
        |s| {
            ok(s);
            reply(s, &ESCAPES.repeat(100));
        },
        "owned",
    ),
    (
        "a stream's answer without an end",
        Wish::Stream,
        |s| {
            ok(s);
            for_ever(s, &[0x80]);
        },
        "over 16384 bytes",
    ),
    (
        "a stream's answer of 2 MiB",
        Wish::Stream,
        |s| {
            ok(s);
            for_ever(s, &[0xff, 0xff, 0x7f]);
        },
        "over 16384 bytes",
    ),
    (
        "a stream's answer that is none",
        Wish::Stream,
        |s| {
            ok(s);
            send(s, &[4, 0xff, 0xff, 0xff, 0xff]);
        },
        "cannot connect the stdout",
    ),
    ("a stream that nobody answers", Wish::Stream, ok, "nothing listens there"),
    ("a port that nobody answers", Wish::Port, ok, "port 80"),
];

fn reply(socket: &mut UnixStream, error: &str) {
    let mut bytes = Vec::new();
    stream::write_message(&mut bytes, &StreamReply { error: error.into() }).unwrap();
    send(socket, &bytes);
}

/// Does what the host does, and gives the words that a person gets.
fn ask(guest: &Guest, wish: Wish) -> String {
    let result: Result<()> = match wish {
        Wish::Call => guest.agent().and_then(|mut agent| {
            let answer: Result<ListProcessesResponse, CallError> =
                agent.call("ListProcesses", &ContainerRequest { container: "c".into() });
            answer.map(drop).context(|| "cannot list processes".into())
        }),
        Wish::Configure => {
            guest.agent().and_then(|mut agent| configure(&mut agent, ConfigureRequest::default()).map(drop))
        }
        Wish::Stream => guest.stream("c", "", Kind::Stdout, "").map(drop),
        Wish::Port => guest.port("127.0.0.1:80".parse().unwrap()).map(drop),
    };
    result.expect_err("it was believed").chain()
}

/// Most memory that this process ever had, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn whatever_an_agent_says_the_host_gives_up_with_a_reason() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("vsock");
    let before = peak();
    let mut wrong = Vec::new();
    for (name, wish, says, word) in ROWS {
        let listener = UnixListener::bind(&path).unwrap();
        let answered = thread::scope(|scope| {
            scope.spawn(move || {
                let (mut socket, _) = listener.accept().unwrap();
                let mut line = [0; 64];
                let _ = socket.read(&mut line).unwrap();
                says(&mut socket);
                // What the host still says must not meet a closed door before it has read the answer.
                let _ = socket.shutdown(std::net::Shutdown::Write);
                while matches!(socket.read(&mut line), Ok(1..)) {}
            });
            ask(&Guest::new(&path), *wish)
        });
        fs::remove_file(&path).unwrap();
        let quiet = !answered.chars().any(|c| c.is_control() && c != '\n' && c != '\t');
        if !answered.contains(word) || !quiet || answered.len() > 20_000 {
            wrong.push(format!("{name}: {:?}", answered.chars().take(300).collect::<String>()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(peak() - before < 48 << 10, "{} KiB", peak() - before);
}
