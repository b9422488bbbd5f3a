//! The keyboard controller: no keyboard, but the line that resets the processor. It is how a kernel with `reboot=k`
//! reboots, told apart from a triple fault, which is a crash.

use crate::bus::BusDevice;
use crate::exit::{ExitRequest, Outcome};

const DATA: u64 = 0;
const STATUS_COMMAND: u64 = 4;
/// Command "pulse output line 0": reset.
const COMMAND_RESET: u8 = 0xfe;

/// Ports 0x60 to 0x64.
#[derive(Debug)]
pub struct KeyboardController {
    exit: ExitRequest,
}

impl KeyboardController {
    /// First port.
    pub const PORT: u64 = 0x60;
    /// Number of ports.
    pub const PORTS: u64 = 5;

    /// A controller whose reset line ends the machine.
    pub fn new(exit: ExitRequest) -> Self {
        Self { exit }
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Status 0: nothing to read, ready for a command. Port 0x61 reads as 0x20: the timer output has gone high.
        if let Some(byte) = data.first_mut() {
            *byte = match offset {
                DATA | STATUS_COMMAND => 0,
                _ => 0x20,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == STATUS_COMMAND && data.first() == Some(&COMMAND_RESET) {
            self.exit.request(Outcome::Reboot);
        }
    }
}
