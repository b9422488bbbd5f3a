//! Disks that change under a guest.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Block;
use super::disk::Disk;
use crate::config::LimitConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::driver::{DATA, Driver, WRITE};

const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;
const ERROR: u8 = 1;

fn file(place: &Path, name: &str, sectors: usize, byte: u8) -> PathBuf {
    let path = place.join(name);
    std::fs::write(&path, vec![byte; sectors * 512]).unwrap();
    path
}

/// Makes a request for the first sector available, without a notification.
fn ask(driver: &mut Driver, kind: u32) {
    driver.put(DATA, &[&kind.to_le_bytes()[..], &[0; 12]].concat());
    driver.put(DATA + 64, &[0xee]);
    let flags = if kind == IN { WRITE } else { 0 };
    driver.offer(0, 0, &[(DATA, 16, 0), (DATA + 512, 512, flags), (DATA + 64, 1, WRITE)]);
}

fn answer(driver: &Driver) -> u8 {
    driver.get(DATA + 64, 1)[0]
}

fn read(driver: &mut Driver) -> (u8, u8) {
    ask(driver, IN);
    driver.kick(0);
    (answer(driver), driver.get(DATA + 512, 1)[0])
}

#[test]
fn the_driver_hears_of_another_disk_and_reads_that_one() {
    let place = tempfile::tempdir().unwrap();
    let mut driver = Driver::new(Box::new(Block::removable("drive", None)));
    let capacity = |driver: &Driver| driver.read(0x100);
    assert_eq!((capacity(&driver), read(&mut driver).0), (0, ERROR));
    for (number, sectors) in [(1, 8), (2, 8), (3, 20)] {
        let path = file(place.path(), "disk", sectors, number);
        driver.write(0x64, 3);
        let _ = driver.line.read();
        let generation = driver.read(0xfc);
        driver.transport.change_disk(Some(Disk::raw(&path, false).unwrap()));
        assert_ne!(driver.read(0xfc), generation, "who reads the capacity meanwhile has to begin anew");
        assert!(driver.line.read().is_ok() && driver.read(0x60) & 2 == 2, "the driver is told to look");
        assert_eq!(capacity(&driver) as usize, sectors);
        assert_eq!(read(&mut driver), (OK, number));
    }
    driver.transport.change_disk(None);
    assert_eq!((capacity(&driver), read(&mut driver).0), (0, ERROR));
    assert!(!driver.needs_reset());
}

#[test]
fn what_was_asked_of_one_disk_does_not_come_to_the_next() {
    let place = tempfile::tempdir().unwrap();
    let disk = |name, byte| Disk::raw(&file(place.path(), name, 8, byte), false).unwrap();
    let mut driver = Driver::new(Box::new(Block::removable("drive", Some(disk("one", 1)))));
    ask(&mut driver, OUT);
    driver.transport.change_disk(Some(disk("two", 2)));
    // Answered before anybody notified the device, and to no disk.
    assert_eq!((driver.used(0).0, answer(&driver)), (1, ERROR));
    driver.kick(0);
    for (name, byte) in [("one", 1), ("two", 2)] {
        assert_eq!(std::fs::read(place.path().join(name)).unwrap(), vec![byte; 4096], "{name}");
    }
}

#[test]
fn a_driver_that_has_not_begun_yet_finds_the_disk() {
    let place = tempfile::tempdir().unwrap();
    let mut driver = Driver::new(Box::new(Block::removable("drive", None)));
    // Reset: no queue, no interrupt wanted.
    driver.write(0x70, 0);
    let _ = driver.line.read();
    driver.transport.change_disk(Some(Disk::raw(&file(place.path(), "disk", 8, 5), false).unwrap()));
    assert!(driver.line.read().is_err());
    driver.start();
    assert_eq!(read(&mut driver), (OK, 5));
}

#[test]
fn a_drive_takes_disks_that_cannot_be_written() {
    let place = tempfile::tempdir().unwrap();
    let path = file(place.path(), "disk", 8, 7);
    let empty = Block::removable("drive", None);
    let features = empty.features();
    let mut driver = Driver::new(Box::new(empty));
    driver.transport.change_disk(Some(Disk::raw(&path, true).unwrap()));
    assert_eq!(read(&mut driver), (OK, 7));
    ask(&mut driver, OUT);
    driver.kick(0);
    assert_eq!(answer(&driver), ERROR);
    // And so does one that goes on from a snapshot: what the driver was offered is the same.
    let full = Block::removable("drive", Some(Disk::raw(&path, true).unwrap()));
    assert_eq!(full.features(), features);
}

#[test]
fn what_is_no_disk_is_refused_at_once() {
    let place = tempfile::tempdir().unwrap();
    let fifo = place.path().join("fifo");
    make_fifo(&fifo);
    for path in [fifo.as_path(), Path::new("/dev/null"), place.path(), &place.path().join("missing")] {
        assert!(Disk::raw(path, true).is_err(), "{path:?}");
        assert!(Disk::composite("disk", &[path.to_owned()]).is_err(), "{path:?}");
    }
}

fn make_fifo(path: &Path) {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a C string that lives during the call.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
}

#[test]
fn a_limited_disk_does_what_it_may_and_goes_on_by_itself() {
    let place = tempfile::tempdir().unwrap();
    let path = file(place.path(), "disk", 8, 7);
    // One at once, and 20 more in each second.
    let config = LimitConfig { requests_per_second: NonZeroU64::new(20), ..LimitConfig::default() };
    let block = Block::new("disk", Disk::raw(&path, false).unwrap()).with_limit(Some(&config)).unwrap();
    let mut driver = Driver::new(Box::new(block));
    for _ in 0..16 {
        ask(&mut driver, IN);
    }
    let start = Instant::now();
    driver.kick(0);
    // A tenth of a second's are two, and one that goes into debt.
    let at_once = driver.used(0).0;
    assert!((1..16).contains(&at_once), "{at_once}");
    while driver.used(0).0 < 16 {
        assert!(start.elapsed() < Duration::from_secs(30), "{} of 16", driver.used(0).0);
        std::thread::sleep(Duration::from_millis(5));
        for fd in driver.transport.host_fds() {
            // As the event loop, which calls when the timer has run out; a look before changes nothing.
            driver.transport.host_event(fd);
        }
    }
    // 13 at 50 ms each; never sooner, whatever else this machine does.
    assert!(start.elapsed() >= Duration::from_millis(13 * 50 - 10), "{:?}", start.elapsed());
    assert_eq!((answer(&driver), driver.get(DATA + 512, 1)[0]), (OK, 7));
}

#[test]
fn what_waits_for_a_limit_is_saved_as_not_asked_yet() {
    let place = tempfile::tempdir().unwrap();
    let path = file(place.path(), "disk", 8, 7);
    let config = LimitConfig { bytes_per_second: NonZeroU64::new(1), ..LimitConfig::default() };
    let limited = || Block::new("disk", Disk::raw(&path, false).unwrap()).with_limit(Some(&config)).unwrap();
    let mut driver = Driver::new(Box::new(limited()));
    for _ in 0..3 {
        ask(&mut driver, IN);
    }
    driver.kick(0);
    assert_eq!(driver.used(0).0, 1, "the first goes into debt, the others wait for minutes");
    let unlimited = Block::new("disk", Disk::raw(&path, false).unwrap());
    let driver = driver.move_to(Box::new(unlimited)).unwrap();
    assert_eq!(driver.used(0).0, 3);
}
