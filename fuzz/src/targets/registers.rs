//! Registers and ports: accesses of every width at every offset in any order.

use std::sync::Arc;

use vmm::bus::Bus;
use vmm::config::{Input, Output};
use vmm::devices::console_output::{ConsoleOutput, Outlet};
use vmm::devices::legacy::{
    EXIT_PORT, ExitPort, KeyboardController, MARK_PORT, MarkPort, RTC_PORT, RealTimeClock, SERIAL_PORT,
    SerialPort,
};
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::block::Block;
use vmm::devices::virtio::console::Console;
use vmm::devices::virtio::rng::Rng;
use vmm::timeline::Timeline;

use super::devices::exit;
use crate::bytes::{Bytes, Script};
use crate::guest::{Host, op, play};
use crate::{Target, seed};

/// virtio-mmio's registers.
pub const MMIO: Target = Target {
    name: "mmio",
    surface: "virtio-mmio registers, any width, any order",
    run: mmio,
    seeds: || {
        let set_up = [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, 16), (0x80, 0x4_0000)];
        let ready = [(0x90, 0x4_2000), (0xa0, 0x4_4000), (0x44, 1), (0x70, 15), (0x50, 0)];
        let writes = |list: &[(u16, u32)]| {
            list.iter().fold(Script::new(), |script, (at, value)| script.u8(0).u16(*at).u8(4).u32(*value)).0
        };
        let right = [writes(&set_up), writes(&ready)].concat();
        let sizes = [0, 3, 65535, 65536, 1 << 31].map(|size| writes(&[(0x38, size), (0x44, 1), (0x70, 15)]));
        vec![
            seed("a driver of the rng", [vec![1], right.clone()].concat()),
            seed(
                "queue addresses while in use",
                [vec![1], right.clone(), writes(&[(0x80, 0), (0x84, 9)])].concat(),
            ),
            seed("odd sizes of a queue", [vec![1], writes(&set_up), sizes.concat()].concat()),
            seed(
                "features toggled",
                [vec![0], right, writes(&[(0x20, 0), (0x24, 7), (0x20, 1), (0x70, 8)])].concat(),
            ),
            seed("features that are not offered, and a machine that is saved then", {
                [vec![1], writes(&[(0x24, 1), (0x20, 0x0f00_0000)]), vec![15, 0, 0, 0]].concat()
            }),
            seed("configuration space", Script::new().u8(0).u8(1).u16(0xfff).u8(8).u8(1).u16(0x100).u8(3)),
        ]
    },
};
/// The ports of a PC.
pub const PORTS: Target = Target {
    name: "ports",
    surface: "I/O ports: serial, keyboard controller, clock, marks, exit",
    run: ports,
    seeds: || {
        let write = |script: Script, port: u64, bytes: &[u8]| script.u8(0).u16(port as u16).part(bytes);
        let serial = |script, register, value| write(script, SERIAL_PORT + register, &[value]);
        vec![
            seed("print", write(Script::new(), SERIAL_PORT, b"hello")),
            seed("loopback", serial(serial(Script::new(), 4, 0x10), 0, 7)),
            seed("exit", write(write(Script::new(), MARK_PORT, &[1]), EXIT_PORT, &[7, 0, 0, 0])),
            seed("reset", write(Script::new(), 0x64, &[0xfe])),
            seed("read", Script::new().u8(1).u16(0x71).u8(4).u8(1).u16(0x3fd).u8(1)),
        ]
    },
};

struct Any(u8);

impl Host for Any {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        match self.0 % 3 {
            0 => Box::new(Block::empty("disk", false)),
            1 => Box::<Rng>::default(),
            _ => {
                let outlet =
                    Outlet::open(&ConsoleOutput::new(100), &Output::None).expect("an outlet to nowhere");
                Box::new(Console::new(outlet, Input::None, exit()))
            }
        }
    }
}

fn mmio(data: &[u8]) {
    let mut input = Bytes(data);
    let mut host = Any(input.u8());
    // Reads and writes only, and now and then a machine that is saved.
    let mut script = Script::new();
    while !input.is_empty() {
        let (what, offset, width) = (input.u8(), input.u16(), input.u8());
        script = match what % 16 {
            15 => script.moved(),
            what if what % 2 == 1 => script.u8(op::READ).u16(offset).u8(width),
            _ => script.u8(op::WRITE).u16(offset).u8(width).u32(input.u32()),
        };
    }
    play(&mut host, Bytes(&script.0));
}

const RING: usize = 100;

fn ports(data: &[u8]) {
    let ring = ConsoleOutput::new(RING);
    let outlet = Outlet::open(&ring, &Output::None).expect("an outlet to nowhere");
    let (exit, timeline) = (exit(), Arc::new(Timeline::default()));
    let mut bus = Bus::default();
    bus.insert(SERIAL_PORT, 8, Arc::new(SerialPort::new(outlet, None)));
    bus.insert(
        KeyboardController::PORT,
        KeyboardController::PORTS,
        Arc::new(KeyboardController::new(exit.clone())),
    );
    bus.insert(RTC_PORT, 2, Arc::new(RealTimeClock));
    bus.insert(MARK_PORT, 1, Arc::new(MarkPort::new(Arc::clone(&timeline))));
    bus.insert(EXIT_PORT, 4, Arc::new(ExitPort::new(exit.clone())));
    let mut input = Bytes(data);
    while !input.is_empty() {
        let (what, port) = (input.u8(), u64::from(input.u16()));
        if what % 2 == 0 {
            bus.write(port, input.part());
        } else {
            bus.read(port, &mut vec![0; usize::from(input.u8())]);
        }
    }
    assert!(ring.tail(usize::MAX).len() <= 3 * RING);
    assert!(timeline.events().len() <= 256);
    // The first word counts, whatever comes later.
    let outcome = exit.outcome();
    bus.write(EXIT_PORT, &[1]);
    assert!(outcome.is_none() || exit.outcome() == outcome);
}
