//! The server against the ttrpc crate's own client, over unix sockets.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_protocol::PROTOCOL_VERSION;
use bulkhead_protocol::agent::{ConfigureRequest, GuestInfo, ProcessRequest};
use bulkhead_protocol::wire::Code;
use prost::Message;

use crate::agent::Agent;

/// Runs an agent of its own while `body` talks to it: its sockets `agent` and `streams` are in the directory.
pub fn with_agent(body: impl FnOnce(&str)) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let listen = |name: &str| {
        let listener = UnixListener::bind(path(name)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener.into()
    };
    let (rpc, streams) = (listen("agent"), listen("streams"));
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&done);
    let agent = std::thread::spawn(move || {
        Agent::new(rpc, streams).unwrap().run_until(|_| seen.load(Ordering::Relaxed));
    });
    body(&directory.path().display().to_string());
    done.store(true, Ordering::Relaxed);
    agent.join().unwrap();
}

fn call(client: &ttrpc::Client, method: &str, message: &impl Message) -> ttrpc::Result<Vec<u8>> {
    let mut request = ttrpc::Request::new();
    request.service = "bulkhead.agent.v1.Agent".into();
    request.method = method.into();
    request.payload = message.encode_to_vec();
    request.timeout_nano = 5_000_000_000;
    client.request(request).map(|response| response.payload)
}

fn code(error: ttrpc::Error) -> i32 {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code.value(),
        other => panic!("{other}"),
    }
}

#[test]
fn the_ttrpc_crate_understands_us() {
    with_agent(|directory| {
        let client = ttrpc::Client::connect(&format!("unix://{directory}/agent")).unwrap();
        let answer = call(&client, "Configure", &ConfigureRequest::default()).unwrap();
        let info = GuestInfo::decode(answer.as_slice()).unwrap();
        assert_eq!(info.protocol, PROTOCOL_VERSION);
        assert!(info.memory_bytes > 0 && info.cpus > 0 && !info.kernel_release.is_empty());
        let missing = ProcessRequest { container: "nobody".into(), exec: String::new(), bound: false };
        let error = call(&client, "WaitProcess", &missing).unwrap_err();
        assert!(error.to_string().contains("container nobody does not exist"), "{error}");
        assert_eq!(code(error), Code::NotFound as i32);
        let error = call(&client, "NoSuchMethod", &missing).unwrap_err();
        assert_eq!(code(error), Code::Unimplemented as i32);
        // The connection has survived all of it.
        call(&client, "Configure", &ConfigureRequest::default()).unwrap();
    });
}

#[test]
fn many_connections_do_not_mix() {
    with_agent(|directory| {
        let clients: Vec<_> =
            (0..20).map(|_| ttrpc::Client::connect(&format!("unix://{directory}/agent")).unwrap()).collect();
        for (number, client) in clients.iter().enumerate() {
            let missing =
                ProcessRequest { container: format!("c{number}"), exec: String::new(), bound: false };
            let error = call(client, "WaitProcess", &missing).unwrap_err();
            assert!(error.to_string().contains(&format!("container c{number} ")), "{error}");
        }
    });
}
