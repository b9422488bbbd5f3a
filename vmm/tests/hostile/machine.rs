//! Registers, ports and the processor itself.

use super::common::Guest;
use super::kit::*;

/// A loop over addresses: mov $from,%ebx; mov $count,%ecx; 1: body; inc %ebx; dec %ecx; jnz 1b
fn over(from: u32, count: u32, body: &[u8]) -> Guest {
    let back = -(body.len() as i32 + 2 + 2 + 6);
    Guest::new()
        .raw(&[0xbb])
        .raw(&from.to_le_bytes())
        .raw(&[0xb9])
        .raw(&count.to_le_bytes())
        .raw(body)
        .raw(&[0xff, 0xc3, 0xff, 0xc9, 0x0f, 0x85])
        .raw(&back.to_le_bytes())
}

/// Writes of 1, 2, 4 and 8 bytes of %rcx to (%rbx).
const WRITES: &[u8] = &[0x88, 0x0b, 0x66, 0x89, 0x0b, 0x89, 0x0b, 0x48, 0x89, 0x0b];
/// Reads likewise, into %rax.
const READS: &[u8] = &[0x8a, 0x03, 0x66, 0x8b, 0x03, 0x8b, 0x03, 0x48, 0x8b, 0x03];
/// in and out of 1 and 4 bytes at port %bx: mov %ebx,%edx; …
const PORT_READS: &[u8] = &[0x89, 0xda, 0xec, 0xed];
const PORT_WRITES: &[u8] = &[0x89, 0xda, 0x88, 0xc8, 0xee, 0xef];

pub fn acts() -> Vec<Act> {
    [registers(), ports(), processor()].into_iter().flatten().collect()
}

fn lives(name: &str, guest: Guest) -> Act {
    Act { unknown: true, ..act(name, guest, End::Lives(&[])) }
}

fn registers() -> Vec<Act> {
    let windows = ALL.len() as u32 * 0x1000;
    let right = ALL.iter().fold(Guest::new(), |guest, device| guest.set_up(*device));
    let mut acts = vec![
        lives("every register read, every width", over(0xd000_0000, windows, READS)),
        lives("every register written, every width", over(0xd000_0000, windows, WRITES)),
        lives("the same of devices that are in use", right.clone().then(&over(0xd000_0000, windows, WRITES))),
        lives("configuration spaces written", right.then(&over(0xd000_0100, 0x100, WRITES))),
        lives(
            "addresses where no device is",
            over(0xd010_0000, 0x800, WRITES).then(&over(0xd010_0000, 0x800, READS)),
        ),
        lives("200,000 notifications", {
            // mov $notify,%ebx; mov $200000,%ecx; xor %eax,%eax; 1: mov %eax,(%rbx); dec %ecx; jnz 1b
            let guest = Guest::new().set_up(ALL[3]).raw(&[0xbb]).raw(&register(RNG, 0x50).to_le_bytes());
            guest
                .raw(&[0xb9])
                .raw(&200_000_u32.to_le_bytes())
                .raw(&[0x31, 0xc0, 0x89, 0x03, 0xff, 0xc9, 0x75, 0xfa])
        }),
        lives("20,000 notifications of queues that do not exist", {
            let guest = Guest::new().set_up(ALL[0]).raw(&[0xbb]).raw(&register(DISK, 0x50).to_le_bytes());
            guest.raw(&[0xb9]).raw(&20_000_u32.to_le_bytes()).raw(&[0x89, 0x0b, 0xff, 0xc9, 0x75, 0xfa])
        }),
        lives(
            "notifications before there is a queue",
            Guest::new().kick(DISK, 0).kick(NET, 1).kick(VSOCK, 2).kick(CONSOLE, 1),
        ),
    ];
    for device in ALL {
        let window = device.window;
        let at = u64::from(queue_at(window, device.queue));
        let queue = |guest: Guest| guest.queue(window, device.queue, &[(u64::from(DATA), 64, 0, 0)], &[0], 1);
        acts.push(lives(
            &format!("{}: its queue moved while in use", device.name),
            queue(Guest::new())
                .set_up(device)
                .set_queue(window, device.queue, 3, 0xffff_f000, at + 1, u64::MAX)
                .register(window, 0x44, 0)
                .kick(window, device.queue)
                .count(2000),
        ));
        acts.push(lives(
            &format!("{}: features that change after they were agreed on", device.name),
            queue(Guest::new())
                .set_up(device)
                .register(window, 0x24, 1)
                .register(window, 0x20, u32::MAX)
                .register(window, 0x24, 77)
                .register(window, 0x20, u32::MAX)
                .register(window, 0x70, 15)
                .kick(window, device.queue)
                .count(2000),
        ));
        acts.push(lives(
            &format!("{}: in use without features, status and queues in any order", device.name),
            Guest::new()
                .register(window, 0x70, 4)
                .register(window, 0x70, 0xff)
                .register(window, 0x44, 1)
                .register(window, 0x70, 15)
                .register(window, 0x70, 64)
                .register(window, 0x70, u32::MAX)
                .kick(window, device.queue),
        ));
        acts.push(lives(
            &format!("{}: misused and reset 200 times", device.name),
            Guest::new().queue(window, device.queue, &[(1 << 50, 64, 0, 0)], &[0], 1).times(200, |guest| {
                guest.set_up(device).kick(window, device.queue).wait(window, device.queue)
            }),
        ));
    }
    acts
}

fn ports() -> Vec<Act> {
    let marks = |count: u32| Guest::new().times(count, |guest| guest.mark(9));
    // All but those of the exit device and of the reset line, whose writes end the machine as documented.
    let writes = over(0, 0x60, PORT_WRITES).then(&over(0x70, 0xad0, PORT_WRITES)).then(&over(
        0xb48,
        0x1000,
        PORT_WRITES,
    ));
    vec![
        lives("every port read", over(0, 0x1_0000, PORT_READS)),
        lives("most ports written", writes),
        lives("20,000 marks", marks(20_000)),
        act("20,000 marks and an exit", marks(20_000).exit(3), End::Ends(3, "exited")),
        act("an exit by another width", Guest::new().out8(0xb44, 9).spin(), End::Ends(9, "exited")),
        // mov $0xb45,%edx; out %al,(%dx): not the register itself.
        lives("an exit beside the register", Guest::new().out8(0xb45, 9).out8(0xb46, 9).out8(0xb47, 9)),
        act(
            "an exit by a string of 64 KiB",
            Guest::new()
                .raw(&[0xbe])
                .raw(&DATA.to_le_bytes())
                .raw(&[0xb9, 0, 0, 1, 0, 0xba, 0x44, 0x0b, 0, 0, 0xf3, 0x6e])
                .spin(),
            End::Ends(0, "exited"),
        ),
        act("a reset", Guest::new().reboot(), End::Ends(0, "reboot")),
        act("two ends at once", Guest::new().eax(5).out32(0xb44).reboot(), End::Ends(5, "exited")),
        act(
            "a panic that is none, and a reset",
            Guest::new().print("Kernel panic - not syncing").reboot(),
            End::Ends(70, "panic"),
        ),
    ]
}

fn processor() -> Vec<Act> {
    let crash = || End::Ends(70, "crash");
    vec![
        act("a triple fault", Guest::new().triple_fault(), crash()),
        act(
            "page tables full of ones",
            Guest::new().fill(0x9000, 4096).raw(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]).spin(),
            crash(),
        ),
        // mov $0xdead0000,%eax; mov %rax,%cr3
        act(
            "page tables where no memory is",
            Guest::new().eax(0xdead_0000).raw(&[0x0f, 0x22, 0xd8]).spin(),
            crash(),
        ),
        // mov $0x12345678,%ecx; wrmsr
        act(
            "a register that does not exist",
            {
                Guest::new()
                    .raw(&[0x0f, 0x01, 0x1c, 0x25, 0, 0x30, 0, 0])
                    .raw(&[0xb9, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x30])
                    .spin()
            },
            crash(),
        ),
        // jmp to an address without memory
        act("a jump to where no memory is", Guest::new().eax(0xc800_0000).raw(&[0xff, 0xe0]), crash()),
    ]
}
