//! How the host talks to the agent in a guest: through the monitor's vsock socket.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent::stream_hello::Kind;
use bulkhead_protocol::agent::{ConfigureRequest, GuestInfo, StreamHello, StreamReply};
use bulkhead_protocol::client::{Client, words};
use bulkhead_protocol::{AGENT_PORT, AGENT_SERVICE, PROTOCOL_VERSION, STREAM_PORT, stream};

use crate::network::Network;
use crate::state::now_ns;
use crate::{Context, Error, Result, names};

/// How long the monitor and the guest's kernel may take to connect, and the agent to accept a stream.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the agent may take to answer a call. Waiting for a process's end is no such call: who does that watches the connection.
const ANSWER: Duration = Duration::from_secs(60);
/// Longest answer to `CONNECT`: `OK 4294967295\n`.
const MAX_ANSWER: usize = 32;
/// Bytes of entropy given to a guest.
const ENTROPY: usize = 32;

/// A connection to the agent's ttrpc service.
pub type Agent = Client<UnixStream>;

/// The way into one guest.
#[derive(Clone, Debug)]
pub struct Guest {
    vsock: PathBuf,
}

impl Guest {
    /// The guest behind the monitor's vsock socket.
    #[must_use]
    pub fn new(vsock: &Path) -> Self {
        Self { vsock: vsock.to_owned() }
    }

    /// Connects to the agent's ttrpc service. A call whose answer takes more than a minute fails.
    ///
    /// # Errors
    /// The monitor is gone, or the agent does not answer.
    pub fn agent(&self) -> Result<Agent> {
        self.agent_within(PATIENCE, ANSWER)
    }

    /// The same with other limits: for the connection, and for each answer.
    ///
    /// # Errors
    /// As [`Guest::agent`].
    pub fn agent_within(&self, patience: Duration, answer: Duration) -> Result<Agent> {
        let connection = self.connect(AGENT_PORT, patience)?;
        limit(&connection, answer).context(unreachable)?;
        Ok(Client::new(connection, AGENT_SERVICE))
    }

    /// Connects one stream of a process; `path` is for archives.
    ///
    /// # Errors
    /// As [`Guest::agent`], and the agent's refusal.
    pub fn stream(&self, container: &str, exec: &str, kind: Kind, path: &str) -> Result<UnixStream> {
        let what = || format!("cannot connect the {} of the container", kind.as_str_name().to_lowercase());
        let (container, exec, path) = (container.into(), exec.into(), path.into());
        let hello = StreamHello { container, exec, kind: kind.into(), path, ..StreamHello::default() };
        self.say(&hello, what)
    }

    /// Connects to a port of the loopback in the guest, by IPv4 or IPv6, whichever of them somebody listens with. That of
    /// `address` is tried first.
    ///
    /// # Errors
    /// As [`Guest::agent`], or nobody listens there.
    pub fn port(&self, address: SocketAddr) -> Result<UnixStream> {
        let port = address.port().into();
        let hello =
            StreamHello { kind: Kind::Port.into(), port, ipv6: address.is_ipv6(), ..StreamHello::default() };
        self.say(&hello, || format!("cannot connect to port {} in the guest", address.port()))
    }

    fn say(&self, hello: &StreamHello, what: impl Fn() -> String + Copy) -> Result<UnixStream> {
        let mut connection = self.connect(STREAM_PORT, PATIENCE)?;
        limit(&connection, PATIENCE).context(what)?;
        stream::write_message(&mut connection, hello).context(what)?;
        accepted(&mut connection).context(what)?;
        connection.set_read_timeout(None).context(what)?;
        connection.set_write_timeout(None).context(what)?;
        Ok(connection)
    }

    fn connect(&self, port: u32, patience: Duration) -> Result<UnixStream> {
        let what = unreachable;
        let mut connection = UnixStream::connect(&self.vsock).context(what)?;
        limit(&connection, patience).context(what)?;
        connection.write_all(format!("CONNECT {port}\n").as_bytes()).context(what)?;
        let mut answer = Vec::with_capacity(MAX_ANSWER);
        // Byte by byte: what follows the line belongs to whoever listens in the guest.
        while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER {
            let mut byte = [0];
            connection.read_exact(&mut byte).map_err(|error| silent(error, patience)).context(what)?;
            answer.extend_from_slice(&byte);
        }
        if !answer.starts_with(b"OK ") {
            let said = words(&String::from_utf8_lossy(&answer));
            return Err(Error::Monitor(format!("the monitor refused a connection: {}", said.trim_end())));
        }
        Ok(connection)
    }
}

fn unreachable() -> String {
    "cannot reach the agent in the guest".to_owned()
}

/// Lets no single read or write take longer.
pub(crate) fn limit(connection: &UnixStream, patience: Duration) -> io::Result<()> {
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))
}

/// Makes a guest itself: the first thing that every guest is told. Entropy, clock and the check of the agent's version are added to
/// `request`.
///
/// # Errors
/// The guest does not answer in time, the agent is of another version, or its refusal.
pub fn configure(agent: &mut Agent, request: ConfigureRequest) -> Result<GuestInfo> {
    let mut entropy = vec![0; ENTROPY];
    names::random(&mut entropy)?;
    let realtime_ns = i64::try_from(now_ns()).unwrap_or(0);
    let request = ConfigureRequest { entropy, realtime_ns, ..request };
    let what = || "cannot set the guest up".to_owned();
    // A guest that goes on from a template has not shown yet that it is well.
    agent.stream().set_read_timeout(Some(PATIENCE)).context(what)?;
    let mut info: GuestInfo =
        agent.call("Configure", &request).map_err(|source| Error::Agent { what: what(), source })?;
    agent.stream().set_read_timeout(Some(ANSWER)).context(what)?;
    if info.protocol == PROTOCOL_VERSION {
        // It is kept, and shown.
        info.kernel_release = words(&info.kernel_release);
        return Ok(info);
    }
    Err(Error::Usage(format!(
        "the guest's agent speaks protocol {}, this program speaks {PROTOCOL_VERSION}: install both from one build \
         (`make` in a checkout makes the initramfs, too)",
        info.protocol
    )))
}

/// The same for a guest that goes on from a snapshot with the network `now`, where it had `before`. What it was told otherwise stays.
///
/// # Errors
/// As [`configure`].
pub fn reconfigure(agent: &mut Agent, before: &Network, now: &Network, name_server: Vec<u8>) -> Result<()> {
    let networks = (!now.interfaces.is_empty()).then(|| (now.to_message(), before.to_message()));
    let (network, formerly) = networks.unzip();
    configure(agent, ConfigureRequest { network, formerly, name_server, ..ConfigureRequest::default() })
        .map(drop)
}

/// Reads the agent's reply to a hello, or to a finished archive.
pub(crate) fn accepted(connection: &mut UnixStream) -> io::Result<()> {
    let patience = connection.read_timeout().ok().flatten().unwrap_or(PATIENCE);
    let reply: StreamReply = stream::read_message(connection).map_err(|error| silent(error, patience))?;
    if reply.error.is_empty() { Ok(()) } else { Err(io::Error::other(words(&reply.error))) }
}

/// Puts words to the two ways in which a peer says nothing.
fn silent(error: io::Error, patience: Duration) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return io::Error::new(error.kind(), "the connection was closed: nothing listens there");
    }
    stalled(error, patience)
}

/// Puts words to a time limit that has passed.
pub(crate) fn stalled(error: io::Error, patience: Duration) -> io::Error {
    if error.kind() != io::ErrorKind::WouldBlock {
        return error;
    }
    let seconds = patience.as_secs();
    let words = format!("no answer within {seconds} seconds: the guest, or its monitor, stands still");
    io::Error::new(io::ErrorKind::TimedOut, words)
}
