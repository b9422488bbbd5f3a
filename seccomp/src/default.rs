//! The profile of containers that ask for none: what docker's allows, call for call, in a table by reason.
//!
//! A call is allowed always, or with a capability without which it would be of no use, or not at all; a test knows the third
//! kind by reason, too, so that a call which the kernel gains has to be thought about.

use crate::{Argument, Profile, Rule};

/// Calls that every container may make, by what they are for.
const ALWAYS: [(&str, &str); 12] = [
    (
        "Files: to find, open, read, write, change and remove them",
        "access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 \
         fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr \
         fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr lchown lgetxattr link linkat \
         listxattr llistxattr lremovexattr lseek lsetxattr lstat mkdir mkdirat mknod mknodat name_to_handle_at newfstatat \
         open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv \
         removexattr rename renameat renameat2 rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync \
         sync_file_range syncfs tee truncate umask unlink unlinkat utime utimensat utimes vmsplice write writev ioctl",
    ),
    (
        "To be told of changes and events",
        "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd \
         eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch poll ppoll pselect6 select \
         signalfd signalfd4",
    ),
    ("Asynchronous input and output", "io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit"),
    (
        "Memory",
        "brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap \
         mprotect mremap msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease \
         remap_file_pages",
    ),
    (
        "Processes and threads. To look into those of the same user is harmless since 4.8, when seccomp came to bind traced ones, too",
        "arch_prctl execve execveat exit exit_group fork futex futex_requeue futex_wait futex_waitv futex_wake get_robust_list \
         get_thread_area getcpu getpgid getpgrp getpid getppid getsid gettid kill modify_ldt pause pidfd_open \
         pidfd_send_signal prctl process_vm_readv process_vm_writev ptrace restart_syscall rseq seccomp set_robust_list \
         set_thread_area set_tid_address setpgid setsid tgkill tkill vfork wait4 waitid",
    ),
    (
        "Signals",
        "rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
         rt_tgsigqueueinfo sigaltstack",
    ),
    (
        "Who a process is, and what it may use",
        "capget capset getegid geteuid getgid getgroups getpriority getresgid getresuid getrlimit getrusage getuid \
         ioprio_get ioprio_set landlock_add_rule landlock_create_ruleset landlock_restrict_self prlimit64 \
         sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler \
         sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield setfsgid \
         setfsuid setgid setgroups setpriority setregid setresgid setresuid setreuid setrlimit setuid",
    ),
    (
        "Time. To set it takes a capability that these do not ask for to look",
        "adjtimex alarm clock_adjtime clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer \
         time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime \
         timerfd_settime times",
    ),
    (
        "Network and local sockets; socket itself is below",
        "accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg \
         sendto setsockopt shutdown socketpair",
    ),
    (
        "Pipes, queues, shared memory",
        "mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd pipe pipe2 semctl \
         semget semop semtimedop shmat shmctl shmdt shmget",
    ),
    ("About the system", "getrandom sysinfo uname"),
    (
        "The same by the names that they have for 32-bit programs",
        "_llseek _newselect chown32 clock_adjtime64 clock_getres_time64 clock_gettime64 clock_nanosleep_time64 \
         fadvise64_64 fchown32 fcntl64 fstat64 fstatat64 fstatfs64 ftruncate64 futex_time64 getegid32 geteuid32 getgid32 \
         getgroups32 getresgid32 getresuid32 getuid32 io_pgetevents_time64 ipc lchown32 lstat64 mmap2 \
         mq_timedreceive_time64 mq_timedsend_time64 ppoll_time64 pselect6_time64 recv recvmmsg_time64 \
         rt_sigtimedwait_time64 sched_rr_get_interval_time64 semtimedop_time64 send sendfile64 setfsgid32 setfsuid32 \
         setgid32 setgroups32 setregid32 setresgid32 setresuid32 setreuid32 setuid32 sigprocmask sigreturn sigaction \
         signal socketcall stat64 statfs64 timer_gettime64 timer_settime64 timerfd_gettime64 timerfd_settime64 truncate64 \
         ugetrlimit utimensat_time64 waitpid",
    ),
];

/// Calls that come with a capability.
const WITH: [(&str, &str); 14] = [
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    // Mounts, namespaces and what acts on the whole machine.
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie mount mount_setattr \
         move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns statmount syslog umount \
         umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    ("CAP_SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// `AF_VSOCK`: who could open one could talk to the monitor. That must be harmless, and need not be possible.
const AF_VSOCK: u64 = 40;
/// `PER_LINUX`, `PER_LINUX32`, each with and without `UNAME26`, and the question which it is.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// `CLONE_NEWNS`, `…CGROUP`, `…UTS`, `…IPC`, `…USER`, `…PID`, `…NET`.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
const ENOSYS: u32 = 38;

impl Profile {
    /// The default one, for a container whose bounding set has `capabilities`.
    #[must_use]
    pub fn default_with(capabilities: &[&str]) -> Self {
        let mut syscalls: Vec<_> = ALWAYS.iter().map(|(_, calls)| allow(calls, Vec::new())).collect();
        let held = WITH.iter().filter(|(capability, _)| capabilities.contains(capability));
        syscalls.extend(held.map(|(_, calls)| allow(calls, Vec::new())));
        let first =
            |op: &'static str, value, value_two| Argument { index: 0, value, value_two, op: op.into() };
        syscalls.push(allow("socket", vec![first("SCMP_CMP_NE", AF_VSOCK, 0)]));
        syscalls.extend(
            PERSONALITIES.map(|persona| allow("personality", vec![first("SCMP_CMP_EQ", persona, 0)])),
        );
        if !capabilities.contains(&"CAP_SYS_ADMIN") {
            syscalls.push(allow("clone", vec![first("SCMP_CMP_MASKED_EQ", NEW_NAMESPACES, 0)]));
            // Its flags are in memory, where no filter can see them; libraries then use clone.
            let clone3 = Rule {
                action: "SCMP_ACT_ERRNO".into(),
                errno_ret: Some(ENOSYS),
                ..allow("clone3", Vec::new())
            };
            syscalls.push(clone3);
        }
        Self {
            default_action: "SCMP_ACT_ERRNO".into(),
            architectures: vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()],
            syscalls,
            ..Self::default()
        }
    }
}

fn allow(calls: &'static str, args: Vec<Argument>) -> Rule {
    let names = calls.split_ascii_whitespace().map(Into::into).collect();
    Rule { names, action: "SCMP_ACT_ALLOW".into(), errno_ret: None, args }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::Program;

    /// Calls that no container may make, whatever its capabilities, and why.
    const NEVER: [(&str, &str); 6] = [
        ("Keys of the kernel's have no namespaces", "add_key keyctl request_key"),
        (
            "A way around every filter of calls, with a history of errors",
            "io_uring_enter io_uring_register io_uring_setup",
        ),
        (
            "Acts on the whole machine",
            "kexec_file_load kexec_load migrate_pages move_pages pivot_root swapoff swapon",
        ),
        (
            "Opens errors of the kernel's to attack: a page fault can be held for as long as one likes",
            "userfaultfd",
        ),
        (
            "Obsolete: the kernel does not have it, or libraries do not call it",
            "_sysctl afs_syscall create_module get_kernel_syms getpmsg nfsservctl putpmsg query_module security sysfs \
             tuxcall uselib ustat vserver",
        ),
        (
            "For security modules that the guest does not have",
            "lsm_get_self_attr lsm_list_modules lsm_set_self_attr",
        ),
    ];
    const ARGUMENTS: &str = "socket personality clone clone3";

    fn all(table: &[(&'static str, &'static str)]) -> BTreeSet<&'static str> {
        table.iter().flat_map(|(_, calls)| calls.split_ascii_whitespace()).collect()
    }

    #[test]
    fn every_call_of_the_machine_is_in_one_place() {
        let (always, with, never) = (all(&ALWAYS), all(&WITH), all(&NEVER));
        let known: BTreeSet<_> =
            (0..1024).filter_map(syscalls::x86_64::Sysno::new).map(|call| call.name()).collect();
        for call in &known {
            let places = [&always, &with, &never].iter().filter(|table| table.contains(call)).count();
            let by_argument = ARGUMENTS.split(' ').any(|name| name == *call) && !never.contains(call);
            assert!(places == 1 || (by_argument && places <= 1), "{call} is in {places} tables");
        }
        let compat: BTreeSet<_> =
            (0..1024).filter_map(syscalls::x86::Sysno::new).map(|call| call.name()).collect();
        for call in always.iter().chain(&with).chain(&never) {
            let exists = known.contains(call) || compat.contains(call);
            assert!(
                exists || ["fstatat64", "recv", "send", "umount", "sendfile64"].contains(call),
                "{call} is no call"
            );
        }
    }

    #[test]
    fn capabilities_bring_their_calls() {
        let names = |capabilities: &[&str]| -> BTreeSet<_> {
            let profile = Profile::default_with(capabilities);
            profile
                .syscalls
                .iter()
                .filter(|rule| rule.args.is_empty() && rule.errno_ret.is_none())
                .flat_map(|rule| rule.names.clone())
                .collect()
        };
        let none = names(&[]);
        for (capability, call) in
            [("CAP_SYS_ADMIN", "mount"), ("CAP_PERFMON", "perf_event_open"), ("CAP_BPF", "bpf")]
        {
            assert!(!none.contains(call) && names(&[capability]).contains(call), "{call}");
        }
        assert!(names(&["CAP_SYS_ADMIN"]).contains("clone3"));
    }

    #[test]
    fn the_program_is_short() {
        // The kernel checks, tries and compiles each instruction at each start.
        let program = Program::compile(&Profile::default_with(&["CAP_SYS_CHROOT"])).unwrap();
        let length = program.instructions.len();
        assert!((100..320).contains(&length), "{length} instructions");
    }
}
