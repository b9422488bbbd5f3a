//! The 8250 serial port at 0x3f8, for early and debug output. It has an interrupt only where one is asked for.

use std::io;
use std::sync::Mutex;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::console_output::Outlet;
use crate::sync::lock;

/// First of the eight ports of ttyS0.
pub const SERIAL_PORT: u64 = 0x3f8;

/// The interrupt line, if it is connected.
struct Line(Option<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |event| event.write(1))
    }
}

/// ttyS0.
pub struct SerialPort(Mutex<Serial<Line, NoEvents, Outlet>>);

impl SerialPort {
    /// A port that writes to `outlet` and interrupts by `interrupt`.
    pub fn new(outlet: Outlet, interrupt: Option<EventFd>) -> Self {
        Self(Mutex::new(Serial::new(Line(interrupt), outlet)))
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), Some(byte)) = (offset.try_into(), data.first_mut()) {
            *byte = lock(&self.0).read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = offset.try_into() else { return };
        let mut serial = lock(&self.0);
        // More than one byte is a string instruction. Losing an interrupt is all that can go wrong here.
        for byte in data {
            let _ = serial.write(offset, *byte);
        }
    }
}
