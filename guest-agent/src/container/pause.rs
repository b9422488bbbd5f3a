//! A process that does nothing: it holds the namespaces of a pod that has no container of its own for this. What it would
//! be a program for otherwise, in an image of its own, the agent's child does where it would execute one.

/// Lives until somebody signals it, and buries what others of its pid namespace leave behind.
pub fn pause() -> ! {
    // SAFETY: the set is initialised by sigfillset before it is used, the name is a C string; descriptors that are closed
    // are never used again, since nothing of this process but the loop below goes on, and that ends it by _exit.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"pause".as_ptr());
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        // Blocked signals reach the first process of a pid namespace, too, and end nothing by themselves.
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        // The agent takes the end of the channel among these for the program's start.
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        loop {
            match libc::sigwaitinfo(&raw const all, std::ptr::null_mut()) {
                libc::SIGTERM | libc::SIGINT | libc::SIGHUP | libc::SIGQUIT => libc::_exit(0),
                libc::SIGCHLD => while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {},
                _ => {}
            }
        }
    }
}
