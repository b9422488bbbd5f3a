//! What the agent in a guest answers, as the host reads it: the guest may have taken the agent's place.

use std::io::{self, Cursor, Read, Write};

use bulkhead_protocol::agent::{
    CreateContainerResponse, Empty, ExecProcessResponse, GuestInfo, ListProcessesResponse, StatsResponse,
    StreamHello, StreamReply, WaitProcessResponse,
};
use bulkhead_protocol::client::{CallError, Client};
use bulkhead_protocol::wire::{self, Code, Decoder, Kind, Request, Response};
use bulkhead_protocol::{AGENT_SERVICE, names, stream};
use prost::Message;

use crate::{Seed, Target, seed};

/// Answers to calls.
pub const ANSWERS: Target = Target {
    name: "agent-answers",
    surface: "ttrpc answers of the guest's agent",
    run: answers,
    seeds: answer_seeds,
};
/// Heads of streams, and frames in pieces.
pub const STREAM: Target = Target {
    name: "agent-streams",
    surface: "heads of streams, questions for names, frames that come in pieces",
    run: streams,
    seeds: || {
        let reply = |error: &str| {
            let mut bytes = Vec::new();
            stream::write_message(&mut bytes, &StreamReply { error: error.into() }).expect("memory");
            bytes
        };
        let request =
            Request { service: "s".into(), method: "m".into(), payload: vec![1; 9], timeout_nano: 5 };
        vec![
            seed("accepted", [vec![0], reply("")].concat()),
            seed("refused", [vec![0], reply("no such container")].concat()),
            seed("a length of five bytes", vec![0, 0xff, 0xff, 0xff, 0xff, 0x0f]),
            seed("a question", [vec![1], b"\0\x05hello".to_vec()].concat()),
            seed("a frame", [vec![2], wire::encode(Kind::Request, 1, &request).expect("short")].concat()),
        ]
    },
};

/// A connection on which the guest has said all that it will say.
struct Said<'a>(Cursor<&'a [u8]>);

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn answers(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 8 {
        0 => call::<GuestInfo>(rest),
        1 => call::<CreateContainerResponse>(rest),
        2 => call::<ExecProcessResponse>(rest),
        3 => call::<WaitProcessResponse>(rest),
        4 => call::<ListProcessesResponse>(rest),
        5 => call::<StatsResponse>(rest),
        _ => call::<Empty>(rest),
    }
}

fn call<R: Message + Default>(said: &[u8]) {
    let answer = Client::new(Said(Cursor::new(said)), AGENT_SERVICE).call::<R>("M", &Empty {});
    match answer {
        Ok(answer) => assert!(answer.encoded_len() <= said.len() * 4 + 64),
        Err(CallError::Refused { message, .. }) => {
            assert!(message.chars().count() <= 4096, "a refusal of {} characters", message.chars().count());
            assert!(
                !message.chars().any(|c| c.is_control() && c != '\n' && c != '\t'),
                "it acts on a terminal: {message:?}"
            );
        }
        Err(_) => {}
    }
}

fn answer_seeds() -> Vec<Seed> {
    let frame = |kind, id, message: &Response| wire::encode(kind, id, message).expect("short");
    let info = GuestInfo { protocol: 1, ..GuestInfo::default() };
    let exit = WaitProcessResponse { exit_code: 3, signal: 9, oom_killed: true, exited_at_ns: -5 };
    let one = |kind: u8, response: &Response| [vec![kind], frame(Kind::Response, 1, response)].concat();
    let stray = frame(Kind::Response, 3, &Response::ok(&Empty {}));
    vec![
        seed("information", one(0, &Response::ok(&info))),
        seed("the end of a process", one(3, &Response::ok(&exit))),
        seed("a refusal", one(6, &Response::error(Code::NotFound, "no such container"))),
        seed(
            "a refusal that would act on a terminal",
            one(6, &Response::error(Code::Internal, "\x1b]0;owned\x07\x1b[2J")),
        ),
        seed("answers to other calls", [vec![0], stray.repeat(40)].concat()),
        seed("a request", [vec![0], frame(Kind::Request, 1, &Response::ok(&info))].concat()),
        seed("a frame of 4 GiB", vec![0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0]),
    ]
}

fn streams(data: &[u8]) {
    let Some((kind, mut rest)) = data.split_first() else { return };
    match kind % 3 {
        0 => {
            let mut same = rest;
            let _ = stream::read_message::<StreamReply>(&mut same);
            let _ = stream::read_message::<StreamHello>(&mut rest);
        }
        1 => {
            if let Ok(message) = names::read_message(&mut rest) {
                let mut again = Vec::new();
                names::write_message(&mut again, &message).expect("memory");
                assert_eq!(again[2..], message[..]);
            }
        }
        _ => {
            // However the bytes are cut, the same frames come out.
            let frames = |cut: usize| {
                let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
                for piece in rest.chunks(cut) {
                    decoder.push(piece);
                    loop {
                        match decoder.next_frame() {
                            Ok(Some(frame)) => frames.push(frame),
                            Ok(None) => break,
                            Err(_) => return frames,
                        }
                    }
                }
                frames
            };
            let whole = frames(rest.len().max(1));
            assert_eq!(whole, frames(usize::from(*kind) % 13 + 1));
            for (_, payload) in whole {
                let _ = Request::decode(payload.as_slice());
                let _ = Response::decode(payload.as_slice());
            }
        }
    }
}
