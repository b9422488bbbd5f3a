use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::path::Path;

use proptest::prelude::*;
use syscalls::Sysno;

use super::filter::{begin, confine};
use super::table::{self, ALL, BACKUP, MAIN, MEMORY, TABLE, VCPU, WATCH, When};
use super::{Kind, count};

/// How a forked child ended that was confined and then did `act`: its wait status, and what it wrote to standard error.
fn child(kind: Kind, act: impl FnOnce()) -> (libc::c_int, String) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(fds.as_mut_ptr()) }, 0);
    // SAFETY: the child makes system calls and allocates, which glibc makes possible after fork, and ends by _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: plain numbers.
        unsafe {
            libc::dup2(fds[1], 2);
            libc::prctl(libc::PR_SET_NAME, c"some-thread".as_ptr());
        }
        let confined = begin().and_then(|()| confine(kind));
        if confined.is_ok() {
            act();
        }
        // SAFETY: _exit has no preconditions.
        unsafe { libc::_exit(if confined.is_ok() { 7 } else { 8 }) }
    }
    let mut status = 0;
    // SAFETY: our own descriptors and child.
    let mut pipe = unsafe {
        libc::close(fds[1]);
        File::from_raw_fd(fds[0])
    };
    let mut text = String::new();
    pipe.read_to_string(&mut text).unwrap();
    // SAFETY: the status lives across the call.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    (status, text)
}

fn passes(kind: Kind, act: impl FnOnce()) {
    let (status, text) = child(kind, act);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{kind:?}: {status:#x} {text}");
}

fn refused(kind: Kind, name: &str, act: impl FnOnce()) {
    let (status, text) = child(kind, act);
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS,
        "{kind:?}: {status:#x} {text}"
    );
    let words = format!("({name}) refused in thread some-thread, its arguments: 0x");
    assert!(text.starts_with("bulkhead-vmm: system call ") && text.contains(&words), "{text}");
}

fn call(number: Sysno, arguments: [u64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    // SAFETY: the tests pass descriptors that are closed and addresses that are null: the kernel refuses or does nothing.
    unsafe { libc::syscall(i64::from(number.id()), a, b, c, d) }
}

const NOWHERE: u64 = 9999;

#[test]
fn what_the_table_has_passes_and_what_it_has_not_ends_the_process() {
    for kind in Kind::ALL {
        passes(kind, || {
            call(Sysno::read, [NOWHERE, 0, 0, 0]);
            assert!(vec![1_u8; 4 << 20].iter().all(|byte| *byte == 1));
        });
        refused(kind, "openat", || drop(File::open("/dev/null")));
        refused(kind, "execve", || {
            call(Sysno::execve, [0; 4]);
        });
        refused(kind, "ptrace", || {
            call(Sysno::ptrace, [0; 4]);
        });
    }
    passes(Kind::Main, || {
        call(Sysno::accept4, [NOWHERE, 0, 0, 0]);
    });
    refused(Kind::Vcpu, "accept4", || {
        call(Sysno::accept4, [NOWHERE, 0, 0, 0]);
    });
}

#[test]
fn arguments_are_checked() {
    let executable = |protection: i32| {
        move || {
            call(Sysno::mmap, [0, 0, protection as u64, 0]);
        }
    };
    passes(Kind::Main, executable(libc::PROT_READ | libc::PROT_WRITE));
    refused(Kind::Main, "mmap", executable(libc::PROT_READ | libc::PROT_EXEC));
    refused(Kind::Vcpu, "mprotect", || {
        call(Sysno::mprotect, [0, 0, libc::PROT_EXEC as u64, 0]);
    });
    let socket = |family: i32| {
        move || {
            call(Sysno::socket, [family as u64, libc::SOCK_STREAM as u64, 0, 0]);
        }
    };
    passes(Kind::Main, socket(libc::AF_UNIX));
    for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_VSOCK] {
        refused(Kind::Main, "socket", socket(family));
    }
    refused(Kind::Main, "clone", || {
        call(Sysno::clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64, 0, 0, 0]);
    });
    refused(Kind::Main, "prctl", || {
        call(Sysno::prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0]);
    });
    refused(Kind::Main, "fcntl", || {
        call(Sysno::fcntl, [NOWHERE, libc::F_SETOWN as u64, 0, 0]);
    });
    refused(Kind::Main, "ioctl", || {
        call(Sysno::ioctl, [NOWHERE, libc::TIOCSTI, 0, 0]);
    });
    // KVM_RUN is for vCPUs, KVM_GET_CLOCK for the event loop, KVM_CREATE_VM for nobody.
    passes(Kind::Vcpu, || {
        call(Sysno::ioctl, [NOWHERE, 0xae80, 0, 0]);
    });
    refused(Kind::Main, "ioctl", || {
        call(Sysno::ioctl, [NOWHERE, 0xae80, 0, 0]);
    });
    refused(Kind::Vcpu, "ioctl", || {
        call(Sysno::ioctl, [NOWHERE, 0x8030_ae7c, 0, 0]);
    });
    for kind in Kind::ALL {
        refused(kind, "ioctl", || {
            call(Sysno::ioctl, [NOWHERE, 0xae01, 0, 0]);
        });
    }
}

#[test]
fn threads_can_be_started_in_a_confined_process_and_confine_themselves_further() {
    passes(Kind::Main, || {
        let thread = std::thread::spawn(|| confine(Kind::Backup).is_ok());
        assert!(thread.join().unwrap());
    });
    refused(Kind::Main, "accept4", || {
        let thread = std::thread::spawn(|| {
            // SAFETY: a name of this thread alone.
            unsafe { libc::prctl(libc::PR_SET_NAME, c"some-thread".as_ptr()) };
            confine(Kind::Backup).unwrap();
            call(Sysno::accept4, [NOWHERE, 0, 0, 0]);
        });
        drop(thread.join());
    });
}

/// For `kind`, whether the table allows the call with these arguments: the table read as people read it.
fn allowed(kind: u8, number: Sysno, arguments: &[u64; 4]) -> bool {
    let argument = |index: u8| arguments.get(usize::from(index)).copied().unwrap_or(0);
    TABLE.iter().filter(|entry| entry.call == number && entry.threads & kind != 0).any(|entry| {
        match entry.when {
            When::Always | When::Unknown => true,
            When::Is(index, values) => values.contains(&(argument(index) as u32)),
            When::Without(index, bits) => argument(index) & bits == 0,
            When::Exactly(index, value) => argument(index) == value,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_filter_says_what_the_table_says(
        vcpu in any::<bool>(),
        number in prop_oneof![Just(Sysno::ioctl), Just(Sysno::fcntl), Just(Sysno::socket), Just(Sysno::prctl), Just(Sysno::seccomp)],
        known in any::<prop::sample::Index>(),
        other in any::<u32>(),
        use_known in any::<bool>(),
    ) {
        let values: Vec<u32> = TABLE
            .iter()
            .filter_map(|entry| match entry.when {
                When::Is(_, values) => Some(values),
                _ => None,
            })
            .flatten()
            .copied()
            .collect();
        let value = if use_known { *known.get(&values) } else { other };
        // Nothing is done to this process: descriptors are closed, and the filter is null.
        let arguments = match number {
            Sysno::ioctl | Sysno::fcntl => [NOWHERE, value.into(), 0, 0],
            Sysno::socket => [value.into(), u64::MAX, 0, 0],
            _ => [value.into(), 0, 0, 0],
        };
        let (kind, bit) = if vcpu { (Kind::Vcpu, VCPU) } else { (Kind::Main, MAIN) };
        let (status, text) = child(kind, || {
            call(number, arguments);
        });
        let passed = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7;
        prop_assert_eq!(passed, allowed(bit, number, &arguments), "{:?} {:?}: {:#x} {}", number, arguments, status, text);
    }
}

#[test]
fn who_is_started_later_may_do_nothing_that_its_starter_may_not() {
    for entry in TABLE {
        let own = entry.threads;
        if own & (BACKUP | MEMORY | WATCH) != 0 {
            assert!(own & MAIN != 0, "{}", entry.call.name());
        }
        if own & WATCH != 0 {
            assert!(own & VCPU != 0, "{}: vCPU threads start these", entry.call.name());
        }
        assert!(own != 0 && own & !ALL == 0 && !entry.why.is_empty());
    }
}

#[test]
fn nothing_dangerous_is_in_the_table() {
    for call in [
        Sysno::open,
        Sysno::openat,
        Sysno::openat2,
        Sysno::execve,
        Sysno::execveat,
        Sysno::ptrace,
        Sysno::mount,
        Sysno::bpf,
        Sysno::setuid,
        Sysno::unshare,
        Sysno::setns,
        Sysno::process_vm_readv,
        Sysno::process_vm_writev,
        Sysno::io_uring_setup,
        Sysno::userfaultfd,
        Sysno::perf_event_open,
        Sysno::keyctl,
        Sysno::listen,
        Sysno::bind,
        Sysno::chmod,
        Sysno::rename,
        Sysno::symlink,
        Sysno::link,
        Sysno::pidfd_getfd,
        Sysno::kexec_load,
        Sysno::init_module,
    ] {
        assert!(TABLE.iter().all(|entry| entry.call != call), "{}", call.name());
    }
    for kind in Kind::ALL {
        eprintln!("{kind:?}: {} system calls", count(kind));
        assert!(count(kind) < 80);
    }
}

/// Methods of KVM's descriptors that are called when the machine runs, and what the table must have for them. All others are called
/// before the monitor is in its jail.
const WHEN_IT_RUNS: [(&str, u32, u8); 15] = [
    ("run", 0xae80, VCPU),
    ("get_regs", 0x81, VCPU),
    ("get_sregs", 0x83, VCPU),
    ("translate_gva", 0x85, VCPU),
    ("get_msrs", 0x88, VCPU),
    ("get_lapic", 0x8e, VCPU),
    ("get_mp_state", 0x98, VCPU),
    ("get_vcpu_events", 0x9f, VCPU),
    ("get_debug_regs", 0xa1, VCPU),
    ("get_tsc_khz", 0xa3, VCPU),
    ("get_xsave", 0xa4, VCPU),
    ("get_xcrs", 0xa6, VCPU),
    ("get_msr_index_list", 0x02, MAIN),
    ("get_irqchip", 0x62, MAIN),
    ("get_clock", 0x7c, MAIN),
];
const BEFORE: [&str; 28] = [
    "get_api_version",
    "check_extension",
    "create_vm",
    "get_supported_cpuid",
    "set_identity_map_address",
    "set_tss_address",
    "create_irq_chip",
    "create_vcpu",
    "set_user_memory_region",
    "register_ioevent",
    "register_irqfd",
    "set_cpuid2",
    "set_msrs",
    "set_regs",
    "set_sregs",
    "set_fpu",
    "set_xcrs",
    "set_xsave",
    "set_lapic",
    "set_mp_state",
    "set_vcpu_events",
    "set_debug_regs",
    "set_tsc_khz",
    "set_irqchip",
    "set_clock",
    "get_vcpu_mmap_size",
    "get_cpuid2",
    "get_kvm_run",
];

/// Calls of methods of KVM's descriptors in the source, by the method.
fn kvm_calls(directory: &Path, found: &mut BTreeMap<String, String>) {
    let receivers = ["kvm.", "vm.", "vcpu.", "self.fd.", "Kvm::", "fd."];
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            kvm_calls(&path, found);
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        if !text.contains("kvm_ioctls") || path.ends_with("jail/tests.rs") {
            continue;
        }
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for receiver in receivers {
                for (at, _) in line.match_indices(receiver) {
                    let before = line[..at].chars().next_back();
                    let rest = &line[at + receiver.len()..];
                    let method: String =
                        rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                    let prefixes = [
                        "get_",
                        "set_",
                        "create_",
                        "register_",
                        "run",
                        "translate",
                        "check_ext",
                        "enable_",
                        "nmi",
                    ];
                    let whole = !before.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
                    if whole
                        && rest[method.len()..].starts_with('(')
                        && prefixes.iter().any(|p| method.starts_with(p))
                    {
                        found.insert(method, format!("{}: {}", path.display(), line.trim()));
                    }
                }
            }
        }
    }
}

#[test]
fn every_request_of_kvm_in_the_source_is_known() {
    let mut found = BTreeMap::new();
    kvm_calls(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert!(found.len() > 25, "{found:?}");
    for (method, place) in &found {
        let runs = WHEN_IT_RUNS.iter().find(|(known, ..)| known == method);
        assert!(
            runs.is_some() || BEFORE.contains(&method.as_str()),
            "{place}: is {method} called when the machine runs? Then the table needs it. Either way this test must know."
        );
    }
    for (method, number, kind) in WHEN_IT_RUNS {
        let list = if kind == VCPU { table::VCPU_IOCTLS } else { table::MAIN_IOCTLS };
        assert!(list.iter().any(|request| request & 0xffff == 0xae00 | number & 0xff), "{method}");
        assert!(found.contains_key(method), "{method} is not called any more");
    }
}
