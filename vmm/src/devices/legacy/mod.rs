//! The few ports of a PC that a kernel without firmware still touches, and two of Bulkhead's own. All of them answer at
//! once, so that nothing in the guest waits for hardware that is not there.

mod i8042;
mod ports;
mod serial;

pub use i8042::KeyboardController;
pub use ports::{EXIT_PORT, ExitPort, MARK_PORT, MarkPort, RTC_PORT, RealTimeClock};
pub use serial::{SERIAL_PORT, SerialPort};
