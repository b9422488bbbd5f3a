//! Which pages of its memory the process has: the kernel tells in a file that a monitor in its jail could not open any more.

use std::fs::File;
use std::io;
use std::sync::OnceLock;

static PAGEMAP: OnceLock<File> = OnceLock::new();

/// `/proc/self/pagemap`, opened once. In a forked child it is still its parent's, which has every page that the child had when it
/// was forked: nothing is ever taken out of guest memory.
///
/// # Errors
/// When it cannot be opened.
pub fn pagemap() -> io::Result<&'static File> {
    if let Some(file) = PAGEMAP.get() {
        return Ok(file);
    }
    let file = File::open("/proc/self/pagemap")?;
    Ok(PAGEMAP.get_or_init(|| file))
}
