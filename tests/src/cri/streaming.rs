//! The streams of CRI's `Exec`, `Attach` and `PortForward`: a WebSocket whose messages begin with the number of the stream
//! that they are of (`v4.channel.k8s.io`).

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::client::Response;
use tungstenite::http::HeaderValue;
use tungstenite::{Error, Message, WebSocket};

const PROTOCOL: &str = "v4.channel.k8s.io";
/// How long nothing may come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Streams of one call.
#[derive(Debug)]
pub struct Session {
    socket: WebSocket<TcpStream>,
    heard: BTreeMap<u8, Vec<u8>>,
    /// The other side has ended it.
    ended: bool,
}

impl Session {
    /// Of exec and attach.
    pub const STDIN: u8 = 0;
    /// Of exec and attach.
    pub const STDOUT: u8 = 1;
    /// Of exec and attach.
    pub const STDERR: u8 = 2;
    /// How an exec has ended.
    const STATUS: u8 = 3;
    /// Of exec and attach: the size of the terminal.
    const RESIZE: u8 = 4;
    /// Of port-forward; both begin with the number of the port.
    pub const DATA: u8 = 0;
    /// Of port-forward.
    pub const ERRORS: u8 = 1;

    pub(super) fn open(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").with_context(|| format!("{url} is not of http"))?;
        let host = rest.split('/').next().unwrap_or_default();
        let stream = TcpStream::connect(host).with_context(|| format!("connect to {host}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("ws://{rest}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let (socket, answer): (_, Response) =
            tungstenite::client(request, stream).with_context(|| format!("WebSocket of {url}"))?;
        let chosen = answer.headers().get("Sec-WebSocket-Protocol");
        ensure!(chosen.is_some_and(|chosen| chosen == PROTOCOL), "the server speaks {chosen:?}");
        Ok(Self { socket, heard: BTreeMap::new(), ended: false })
    }

    /// Sets how long nothing may come; 20 seconds when not said.
    ///
    /// # Errors
    /// Of the socket.
    pub fn patience(&mut self, time: Duration) -> Result<()> {
        Ok(self.socket.get_ref().set_read_timeout(Some(time))?)
    }

    /// Says something on a stream.
    ///
    /// # Errors
    /// The other side has gone.
    pub fn send(&mut self, stream: u8, bytes: impl AsRef<[u8]>) -> Result<()> {
        let message = [&[stream], bytes.as_ref()].concat();
        self.socket.send(Message::binary(message)).context("send to the stream")
    }

    /// Gives the terminal another size.
    ///
    /// # Errors
    /// The other side has gone.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        self.send(Self::RESIZE, serde_json::json!({"Width": columns, "Height": rows}).to_string())
    }

    /// What has come on a stream.
    pub fn heard(&self, stream: u8) -> &[u8] {
        self.heard.get(&stream).map_or(&[], Vec::as_slice)
    }

    /// The same for a person.
    pub fn text(&self, stream: u8) -> String {
        String::from_utf8_lossy(self.heard(stream)).into_owned()
    }

    /// Forgets what has come.
    pub fn forget(&mut self) {
        self.heard.clear();
    }

    fn hear(&mut self) -> Result<()> {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                if let Some((stream, bytes)) = bytes.split_first() {
                    self.heard.entry(*stream).or_default().extend_from_slice(bytes);
                }
            }
            Ok(Message::Close(_))
            | Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => {
                self.ended = true;
            }
            Ok(_) => {}
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                bail!("nothing comes any more; so far {:?}", self.told())
            }
            Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => self.ended = true,
            Err(error) => return Err(error).context("read from the streams"),
        }
        Ok(())
    }

    fn told(&self) -> Vec<(u8, String)> {
        self.heard.keys().map(|&stream| (stream, self.text(stream))).collect()
    }

    /// Waits until this has come on a stream.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait_for(&mut self, stream: u8, words: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !self.text(stream).contains(words) {
            ensure!(!self.ended && Instant::now() < end, "{words:?} does not come: {:?}", self.told());
            self.hear()?;
        }
        Ok(())
    }

    /// Waits until the other side has ended it.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_for_end(&mut self) -> Result<()> {
        while !self.ended {
            self.hear()?;
        }
        Ok(())
    }

    /// Waits for the end of an exec, and answers its exit status.
    ///
    /// # Errors
    /// It does not end, or not with a status.
    pub fn status(&mut self) -> Result<i32> {
        self.wait_for_end()?;
        let words = self.text(Self::STATUS);
        let status: Value = serde_json::from_str(&words).with_context(|| format!("status {words:?}"))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let causes = status["details"]["causes"].as_array().into_iter().flatten();
        let code =
            causes.filter(|cause| cause["reason"] == "ExitCode").find_map(|cause| cause["message"].as_str());
        Ok(code.with_context(|| format!("no exit code in {words}"))?.parse()?)
    }
}
