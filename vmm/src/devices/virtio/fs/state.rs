//! What a backend knows of the guest (which files it has open, by which numbers), taken out of it and put into another: vhost-user's
//! DEVICE_STATE, in which the backend chooses the form.

use std::fs::File;
use std::io::{Read, Seek, Write};

use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::frontend::{Backend, Lost};
use crate::memory::memory_file;

/// Most bytes of state: some hundred for each file that the guest knows.
const MAX_STATE: u64 = 256 << 20;

impl Backend {
    /// All that it knows of the guest, whose queues it has given back.
    ///
    /// # Errors
    /// It does not answer, cannot, or knows too much.
    pub fn state(&mut self) -> Result<Vec<u8>, Lost> {
        let mut file = self.file()?;
        let theirs = file.try_clone()?;
        self.exchange_state("save what it knows of the guest", |frontend| {
            transfer(frontend, VhostTransferStateDirection::SAVE, theirs)
        })?;
        let length = file.metadata()?.len();
        if length > MAX_STATE {
            return Err(Lost::Lacks("a state of reasonable size: the guest has too many files open"));
        }
        file.rewind()?;
        let mut state = Vec::with_capacity(length as usize);
        file.read_to_end(&mut state)?;
        Ok(state)
    }

    /// Makes it know what another knew. Before it is given the queues.
    ///
    /// # Errors
    /// It does not answer, or cannot: files are not where they were.
    pub fn set_state(&mut self, state: &[u8]) -> Result<(), Lost> {
        let mut file = self.file()?;
        file.write_all(state)?;
        file.rewind()?;
        self.exchange_state("go on with what another knew of the guest", |frontend| {
            transfer(frontend, VhostTransferStateDirection::LOAD, file)
        })
    }

    /// A file that is nothing but memory. One position in it serves both sides, as for a pipe, and nobody has to be read from while it
    /// is written to.
    fn file(&self) -> Result<File, Lost> {
        if !self.has_state() {
            return Err(Lost::Lacks(
                "the means to save what it knows of the guest (virtiofsd 1.11 or later has them)",
            ));
        }
        Ok(memory_file(c"file-server-state", libc::MFD_CLOEXEC)?)
    }
}

fn transfer(
    frontend: &mut Frontend,
    direction: VhostTransferStateDirection,
    file: File,
) -> vhost::Result<()> {
    let stopped = VhostTransferStatePhase::STOPPED;
    // It may name a file of its own instead, which no backend does.
    let another = frontend.set_device_state_fd(direction, stopped, file.into())?;
    if another.is_some() {
        return Err(vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::IncorrectFds));
    }
    frontend.check_device_state()
}
