//! Words with systemd, over the system bus or, where there is none, its own socket.

use std::time::{Duration, Instant};

use bulkhead_runtime::{Error, Result};
use nix::sys::socket::UnixAddr;
use rustbus::connection::ll_conn::force_finish_on_error;
use rustbus::connection::{Error as BusError, Timeout};
use rustbus::message_builder::{MarshalledMessage, MarshalledMessageBody};
use rustbus::wire::ObjectPath;
use rustbus::wire::errors::MarshalError;
use rustbus::wire::unmarshal::traits::Variant;
use rustbus::{DuplexConn, MessageBuilder, MessageType, RpcConn, standard_messages};

use super::properties::Named;

const NAME: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
/// For a system without a bus, or at a time when there is none. Only root may connect.
const PRIVATE: &str = "/run/systemd/private";
/// How long systemd may take for an answer, and for a job.
const PATIENCE: Duration = Duration::from_secs(30);
/// After this the first message is sent again.
const NUDGE: Duration = Duration::from_millis(20);

/// A connection to systemd.
pub struct Manager {
    connection: RpcConn,
}

/// Why a call has not done what it should.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("systemd says {name}: {message}")]
    Said { name: String, message: String },
    #[error("the connection to systemd has failed: {0}")]
    Bus(#[from] BusError),
    #[error("systemd's job for it ended with {0:?}")]
    Job(String),
}

impl From<MarshalError> for Refusal {
    fn from(error: MarshalError) -> Self {
        Self::Bus(error.into())
    }
}

impl From<rustbus::wire::errors::UnmarshalError> for Refusal {
    fn from(error: rustbus::wire::errors::UnmarshalError) -> Self {
        Self::Bus(error.into())
    }
}

fn cannot(what: String) -> impl FnOnce(Refusal) -> Error {
    move |refusal| Error::Other { what, source: refusal.into() }
}

impl Manager {
    /// # Errors
    /// Neither the system bus nor systemd's own socket takes a connection.
    pub fn connect() -> Result<Self> {
        Self::of_bus()
            .or_else(|_| Self::of_socket())
            .map_err(cannot(format!("cannot talk to systemd over the system bus, nor over {PRIVATE}")))
    }

    fn of_bus() -> Result<Self, Refusal> {
        let connection = RpcConn::system_conn(Timeout::Duration(PATIENCE))?;
        let mut manager = Self { connection };
        // Before anything is started, so that no end of a job is missed.
        let rule = format!("type='signal',interface='{INTERFACE}',member='JobRemoved',path='{OBJECT}'");
        manager.send(standard_messages::add_match(&rule))?;
        manager.call("Subscribe", |_| Ok(()))?;
        Ok(manager)
    }

    fn of_socket() -> Result<Self, Refusal> {
        let address = UnixAddr::new(PRIVATE).map_err(BusError::from)?;
        let connection = DuplexConn::connect_to_bus(address, false)?;
        let mut manager = Self { connection: RpcConn::new(connection) };
        // What systemd reads together with the last words of the authentication lies with it until more comes (sd-bus reads
        // 256 bytes at a time then, and waits for the socket after it). So the first message is one that may be sent again.
        let end = Instant::now() + PATIENCE;
        loop {
            let ping =
                MessageBuilder::new().call("Ping").with_interface("org.freedesktop.DBus.Peer").on(OBJECT);
            match manager.answer_within(NUDGE, ping.build()) {
                Err(Refusal::Bus(BusError::TimedOut)) if Instant::now() < end => {}
                answer => return answer.map(|_| manager),
            }
        }
    }

    /// Makes a scope and waits until it is there.
    ///
    /// # Errors
    /// systemd refuses.
    pub fn start(&mut self, unit: &str, properties: &[Named]) -> Result<()> {
        let mut started = self.transient(unit, properties);
        // One of that name has failed and was never forgotten: as runc, once more without it.
        if let Err(Refusal::Said { name, .. }) = &started
            && name.ends_with(".UnitExists")
        {
            let _ = self.reset(unit);
            started = self.transient(unit, properties);
        }
        started.map_err(cannot(format!("cannot have systemd make the scope {unit}")))
    }

    fn transient(&mut self, unit: &str, properties: &[Named]) -> Result<(), Refusal> {
        self.job("StartTransientUnit", |body| {
            body.push_param2(unit, "replace")?;
            body.push_param(properties)?;
            let others: &[(String, Vec<Named>)] = &[];
            body.push_param(others)
        })
    }

    /// Changes properties of a unit until it is gone.
    ///
    /// # Errors
    /// systemd refuses.
    pub fn set(&mut self, unit: &str, properties: &[Named]) -> Result<()> {
        let set = self.call("SetUnitProperties", |body| {
            body.push_param2(unit, true)?;
            body.push_param(properties)
        });
        set.map(drop).map_err(cannot(format!("cannot have systemd change the limits of {unit}")))
    }

    /// Ends a unit and forgets how it ended.
    ///
    /// # Errors
    /// There is none of that name any more, or systemd refuses.
    pub fn stop(&mut self, unit: &str) -> Result<()> {
        let stopped = self.job("StopUnit", |body| body.push_param2(unit, "replace"));
        let _ = self.reset(unit);
        stopped.map_err(cannot(format!("cannot have systemd remove the scope {unit}")))
    }

    fn reset(&mut self, unit: &str) -> Result<(), Refusal> {
        self.call("ResetFailedUnit", |body| body.push_param(unit)).map(drop)
    }

    /// systemd's version, 0 when it does not say one.
    ///
    /// # Errors
    /// It does not answer.
    pub fn version(&mut self) -> Result<u32> {
        let mut question = MessageBuilder::new()
            .call("Get")
            .with_interface("org.freedesktop.DBus.Properties")
            .on(OBJECT)
            .at(NAME)
            .build();
        let asked = question.body.push_param2(INTERFACE, "Version").map_err(Refusal::from);
        let text = asked.and_then(|()| {
            let answer = self.send(question)?;
            let value: Variant<'_, '_> = answer.body.parser().get()?;
            Ok(value.get::<String>()?)
        });
        Ok(number(&text.map_err(cannot("cannot ask systemd for its version".into()))?))
    }

    /// A call that answers a job, to its end.
    fn job(
        &mut self,
        method: &str,
        fill: impl FnOnce(&mut MarshalledMessageBody) -> Result<(), MarshalError>,
    ) -> Result<(), Refusal> {
        let answer = self.call(method, fill)?;
        let job: ObjectPath<&str> = answer.body.parser().get()?;
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let signal = self.connection.wait_signal(Timeout::Duration(left))?;
            if signal.dynheader.member.as_deref() != Some("JobRemoved") {
                continue;
            }
            let (_, ended, _, result): (u32, ObjectPath<&str>, &str, &str) = signal.body.parser().get4()?;
            if ended.as_ref() == job.as_ref() {
                return if result == "done" { Ok(()) } else { Err(Refusal::Job(result.to_owned())) };
            }
        }
    }

    fn call(
        &mut self,
        method: &str,
        fill: impl FnOnce(&mut MarshalledMessageBody) -> Result<(), MarshalError>,
    ) -> Result<MarshalledMessage, Refusal> {
        let mut call =
            MessageBuilder::new().call(method).with_interface(INTERFACE).on(OBJECT).at(NAME).build();
        fill(&mut call.body)?;
        self.send(call)
    }

    /// Sends a call and waits for its answer.
    fn send(&mut self, call: MarshalledMessage) -> Result<MarshalledMessage, Refusal> {
        self.answer_within(PATIENCE, call)
    }

    fn answer_within(
        &mut self,
        patience: Duration,
        mut call: MarshalledMessage,
    ) -> Result<MarshalledMessage, Refusal> {
        let patience = Timeout::Duration(patience);
        let serial =
            self.connection.send_message(&mut call)?.write(patience).map_err(force_finish_on_error)?;
        let answer = self.connection.wait_response(serial, patience)?;
        if answer.typ != MessageType::Error {
            return Ok(answer);
        }
        let message = answer.body.parser().get::<String>().unwrap_or_default();
        Err(Refusal::Said { name: answer.dynheader.error_name.unwrap_or_default(), message })
    }
}

/// 252 of `252.39-1~deb12u2`, `v252` and `systemd 252`.
fn number(version: &str) -> u32 {
    let from = version.find(|c: char| c.is_ascii_digit()).unwrap_or(version.len());
    let digits: String = version.chars().skip(from).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn versions() {
        assert_eq!(
            ["252.39-1~deb12u2", "v252", "systemd 252 (252)", "", "x"].map(number),
            [252, 252, 252, 0, 0]
        );
    }
}
