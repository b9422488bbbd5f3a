//! Which system calls the monitor's threads may make, and what for. This is the whole list: what is not here ends the monitor.
//!
//! A call that several kinds of threads make is one entry. The kinds that come into being while the guest runs (all but the
//! vCPUs) are started under the event loop's filter and add their own to it, so that what they may do is in both; vCPU
//! threads start [`WATCH`] threads, too.

use std::os::raw::{c_uint, c_ulong};

use kvm_bindings as kvm;
use syscalls::Sysno;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// The event loop: devices, control socket, the end.
pub const MAIN: u8 = 1;
/// A vCPU: KVM_RUN and what the guest's accesses to registers bring about.
pub const VCPU: u8 = 1 << 1;
/// Copies a disk into a snapshot.
pub const BACKUP: u8 = 1 << 2;
/// The forked child that writes guest memory into a snapshot.
pub const MEMORY: u8 = 1 << 3;
/// Waits beside a vhost-user exchange that may take too long.
pub const WATCH: u8 = 1 << 4;
/// All of them.
pub const ALL: u8 = MAIN | VCPU | BACKUP | MEMORY | WATCH;

/// What a call's arguments must be.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// Anything.
    Always,
    /// Anything, but it is answered as if the kernel did not know the call.
    Unknown,
    /// The low 32 bits of this argument, counted from 0, are one of these.
    Is(u8, &'static [u32]),
    /// None of these bits is set in this argument.
    Without(u8, u64),
    /// This argument is exactly this.
    Exactly(u8, u64),
}

/// A call that is allowed.
#[derive(Debug)]
pub struct Entry {
    /// Which.
    pub call: Sysno,
    /// To which threads.
    pub threads: u8,
    /// With which arguments.
    pub when: When,
    /// Why it is needed.
    pub why: &'static str,
}

const fn entry(call: Sysno, threads: u8, when: When, why: &'static str) -> Entry {
    Entry { call, threads, when, why }
}

use When::{Always, Exactly, Is, Unknown, Without};

/// `PROT_EXEC`: nothing the monitor maps while the guest runs is code.
const EXEC: u64 = libc::PROT_EXEC as u64;
/// What glibc's `pthread_create` asks `clone` for.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
/// What its `fork` asks for.
const FORK: u64 = (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD) as u64;
const UNIX: u32 = libc::AF_UNIX as u32;

/// Every call.
pub const TABLE: &[Entry] = &[
    // Every thread: memory, locks, its end.
    entry(Sysno::read, ALL, Always, "eventfds, pipes, standard input"),
    entry(Sysno::write, ALL, Always, "eventfds, serial port, the log, and the report of a refused call"),
    entry(Sysno::close, ALL, Always, "files and sockets that are done with"),
    entry(Sysno::mmap, ALL, Without(2, EXEC), "the heap, stacks of threads"),
    entry(Sysno::mprotect, ALL, Without(2, EXEC), "guard pages of stacks, the heap's growth"),
    entry(Sysno::munmap, ALL, Always, "the heap, stacks of threads"),
    entry(Sysno::mremap, ALL, Always, "the heap: large buffers grow"),
    entry(Sysno::brk, ALL, Always, "the heap"),
    entry(Sysno::madvise, ALL, Always, "stacks of threads that end; pages that are about to be used"),
    entry(Sysno::futex, ALL, Always, "locks and waiting for each other"),
    entry(Sysno::sched_yield, ALL, Always, "a lock that is about to be free"),
    entry(Sysno::clock_gettime, ALL, Always, "timeouts and the timeline, where the vDSO has no clock"),
    entry(Sysno::restart_syscall, ALL, Always, "the kernel's, after a signal"),
    entry(Sysno::rt_sigreturn, ALL, Always, "the end of a signal handler"),
    entry(Sysno::rt_sigprocmask, ALL, Always, "threads that begin and end, abort"),
    entry(Sysno::sigaltstack, ALL, Always, "threads that begin and end"),
    entry(Sysno::getpid, ALL, Always, "status; signals to oneself"),
    entry(Sysno::gettid, ALL, Always, "signals to oneself: abort"),
    entry(Sysno::tgkill, ALL, Always, "interrupting vCPUs; abort"),
    entry(
        Sysno::fcntl,
        ALL,
        Is(1, &[libc::F_GETFD as u32]),
        "Rust's library, unoptimised: is what is closed open?",
    ),
    entry(Sysno::exit, ALL, Always, "a thread's end"),
    entry(Sysno::exit_group, ALL, Always, "the process's end"),
    entry(
        Sysno::prctl,
        ALL,
        Is(
            0,
            &[
                libc::PR_SET_NAME as u32,
                libc::PR_GET_NAME as u32,
                libc::PR_SET_PDEATHSIG as u32,
                libc::PR_SET_NO_NEW_PRIVS as u32,
                libc::PR_SET_VMA as u32,
            ],
        ),
        "names of threads and (glibc's) of memory, a child that ends with its parent, and what a filter needs before it",
    ),
    entry(
        Sysno::seccomp,
        MAIN | VCPU | BACKUP | MEMORY | WATCH,
        Is(0, &[libc::SECCOMP_SET_MODE_FILTER]),
        "threads of later add their own filter",
    ),
    // Threads that are started.
    entry(Sysno::clone, MAIN | VCPU, Exactly(0, THREAD), "a thread; arguments are checked, unlike clone3's"),
    entry(
        Sysno::clone3,
        MAIN | VCPU,
        Unknown,
        "its arguments are in memory, which no filter sees: glibc takes clone then",
    ),
    entry(Sysno::set_robust_list, MAIN | VCPU, Always, "a thread's or child's beginning"),
    entry(Sysno::rseq, MAIN | VCPU, Always, "a thread's beginning"),
    entry(Sysno::sched_getaffinity, MAIN | VCPU, Always, "a thread's beginning: glibc tells its stack by it"),
    entry(Sysno::clone, MAIN, Exactly(0, FORK), "the child that writes memory into a snapshot"),
    entry(Sysno::close_range, MAIN | MEMORY, Always, "that child lets go of what is not its own"),
    entry(Sysno::wait4, MAIN, Always, "that child's end"),
    entry(Sysno::kill, MAIN, Always, "that child, when nobody wants the snapshot any more"),
    entry(Sysno::pipe2, MAIN, Always, "that child's answer, and those of threads"),
    entry(Sysno::rt_sigaction, MAIN, Always, "the process's end by the signal that ended it"),
    // The event loop.
    entry(Sysno::epoll_wait, MAIN, Always, "the event loop, streams of vsock"),
    entry(Sysno::epoll_pwait, MAIN, Always, "the same in later libraries"),
    entry(Sysno::epoll_ctl, MAIN, Always, "clients, streams and snapshots come and go"),
    entry(Sysno::poll, MAIN, Always, "standard input, streams at the end"),
    entry(Sysno::nanosleep, MAIN, Always, "a moment between two looks"),
    entry(Sysno::clock_nanosleep, MAIN, Always, "the same in later libraries"),
    entry(Sysno::eventfd2, MAIN, Always, "a device that calls itself again"),
    entry(Sysno::timerfd_settime, MAIN, Always, "a disk that has done what it may in a time"),
    entry(
        Sysno::getrandom,
        MAIN | VCPU,
        Always,
        "the guest's entropy device, a snapshot's identity, ports of vsock",
    ),
    // Sockets: control, vsock, passt, vhost-user.
    entry(Sysno::accept4, MAIN, Always, "clients of the control socket, streams of vsock"),
    entry(Sysno::socket, MAIN, Is(0, &[UNIX]), "a stream from the guest to a socket of the host"),
    entry(Sysno::connect, MAIN, Always, "the same"),
    entry(Sysno::recvfrom, MAIN | VCPU, Always, "greetings of vsock, clients; whether virtiofsd is there"),
    entry(Sysno::recvmsg, MAIN | VCPU, Always, "streams, requests with descriptors, answers of virtiofsd"),
    entry(Sysno::sendto, MAIN, Always, "answers to clients, streams"),
    entry(Sysno::sendmsg, MAIN | VCPU, Always, "streams, frames, requests to virtiofsd"),
    entry(Sysno::shutdown, MAIN | VCPU | WATCH, Always, "streams that end, a virtiofsd that does not answer"),
    // Disks, taps, snapshots.
    entry(Sysno::preadv, MAIN, Always, "disks"),
    entry(Sysno::pwritev, MAIN, Always, "disks"),
    entry(
        Sysno::pread64,
        MAIN | BACKUP | MEMORY,
        Always,
        "disks that are copied; which pages of memory there are",
    ),
    entry(Sysno::pwrite64, MAIN | BACKUP | MEMORY, Always, "snapshots"),
    entry(Sysno::readv, MAIN, Always, "frames from taps"),
    entry(Sysno::writev, MAIN | VCPU, Always, "frames to taps; output with its line's end"),
    entry(Sysno::fsync, MAIN | BACKUP | MEMORY, Always, "snapshots"),
    entry(Sysno::fdatasync, MAIN, Always, "disks"),
    entry(Sysno::fallocate, MAIN, Always, "disks: blocks that the guest discards or zeroes"),
    entry(Sysno::ftruncate, MAIN | MEMORY, Always, "snapshots: a file's length"),
    entry(
        Sysno::lseek,
        MAIN | BACKUP | MEMORY,
        Always,
        "disks that come later; where data is in what is copied",
    ),
    entry(Sysno::fstat, MAIN, Always, "files that come later"),
    entry(Sysno::newfstatat, MAIN, Always, "the same in other libraries: of descriptors"),
    entry(Sysno::statx, MAIN, Always, "the same, by Rust's library"),
    entry(
        Sysno::fcntl,
        MAIN,
        Is(
            1,
            &[libc::F_SETFD as u32, libc::F_GETFL as u32, libc::F_SETFL as u32, libc::F_DUPFD_CLOEXEC as u32],
        ),
        "files that come later",
    ),
    entry(
        Sysno::memfd_create,
        MAIN,
        Exactly(1, libc::MFD_CLOEXEC as u64),
        "what virtiofsd knows of the guest, for a snapshot",
    ),
    entry(Sysno::unlink, MAIN, Always, "its own sockets, at the end; in a jail there is nothing else"),
    // Devices of the host.
    entry(Sysno::ioctl, VCPU, Is(1, VCPU_IOCTLS), "KVM: the guest runs, and is asked where it is"),
    entry(
        Sysno::ioctl,
        MAIN,
        Is(1, MAIN_IOCTLS),
        "KVM: the machine's state for a snapshot; sockets; the terminal",
    ),
    entry(Sysno::ioctl, MAIN | VCPU, Is(1, TAP_IOCTLS), "what of the network card's work the guest can take"),
];

const fn of(direction: c_uint, number: c_uint, size: usize) -> u32 {
    truncated(ioctl_expr(direction, kvm::KVMIO, number, size as c_uint))
}

/// Requests have 32 bits.
const fn truncated(request: c_ulong) -> u32 {
    request as u32
}

/// `linux/kvm.h`, by number.
pub const VCPU_IOCTLS: &[u32] = &[
    KVM_RUN,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_TRANSLATE,
    KVM_GET_MSRS,
    KVM_GET_LAPIC,
    KVM_GET_MP_STATE,
    KVM_GET_VCPU_EVENTS,
    KVM_GET_DEBUGREGS,
    KVM_GET_TSC_KHZ,
    KVM_GET_XSAVE,
    KVM_GET_XCRS,
];
/// Of the event loop.
pub const MAIN_IOCTLS: &[u32] = &[
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_IRQCHIP,
    KVM_GET_CLOCK,
    truncated(libc::FIONBIO),
    truncated(libc::TCGETS),
    truncated(libc::TCSETS),
];
/// Of taps.
pub const TAP_IOCTLS: &[u32] = &[truncated(libc::TUNSETOFFLOAD)];

const KVM_GET_MSR_INDEX_LIST: u32 = of(_IOC_READ | _IOC_WRITE, 0x02, size_of::<kvm::kvm_msr_list>());
const KVM_GET_IRQCHIP: u32 = of(_IOC_READ | _IOC_WRITE, 0x62, size_of::<kvm::kvm_irqchip>());
const KVM_GET_CLOCK: u32 = of(_IOC_READ, 0x7c, size_of::<kvm::kvm_clock_data>());
const KVM_RUN: u32 = of(_IOC_NONE, 0x80, 0);
const KVM_GET_REGS: u32 = of(_IOC_READ, 0x81, size_of::<kvm::kvm_regs>());
const KVM_GET_SREGS: u32 = of(_IOC_READ, 0x83, size_of::<kvm::kvm_sregs>());
const KVM_TRANSLATE: u32 = of(_IOC_READ | _IOC_WRITE, 0x85, size_of::<kvm::kvm_translation>());
const KVM_GET_MSRS: u32 = of(_IOC_READ | _IOC_WRITE, 0x88, size_of::<kvm::kvm_msrs>());
const KVM_GET_LAPIC: u32 = of(_IOC_READ, 0x8e, size_of::<kvm::kvm_lapic_state>());
const KVM_GET_MP_STATE: u32 = of(_IOC_READ, 0x98, size_of::<kvm::kvm_mp_state>());
const KVM_GET_VCPU_EVENTS: u32 = of(_IOC_READ, 0x9f, size_of::<kvm::kvm_vcpu_events>());
const KVM_GET_DEBUGREGS: u32 = of(_IOC_READ, 0xa1, size_of::<kvm::kvm_debugregs>());
const KVM_GET_TSC_KHZ: u32 = of(_IOC_NONE, 0xa3, 0);
const KVM_GET_XSAVE: u32 = of(_IOC_READ, 0xa4, size_of::<kvm::kvm_xsave>());
const KVM_GET_XCRS: u32 = of(_IOC_READ, 0xa6, size_of::<kvm::kvm_xcrs>());
