//! Doing something in another network namespace.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::NamespaceRef;
use crate::{Context, Error, Result};

/// Runs `work` in a thread of its own in the namespace. The rest of the process stays where it is.
///
/// # Errors
/// There is no such namespace, it is the caller's own or the host's, it cannot be entered; or what `work` says.
pub(super) fn within<T: Send>(
    namespace: &NamespaceRef,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let path = namespace.path();
    let file = File::open(&path).context(|| {
        format!("cannot open the {namespace} (`ip netns` lists those with a name, `lsns -t net` all)")
    })?;
    refuse_own(namespace, &file)?;
    let enter = || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|errno| {
            let source = io::Error::from(errno);
            match errno {
                rustix::io::Errno::INVAL => {
                    Error::Usage(format!("{} is not a network namespace", path.display()))
                }
                rustix::io::Errno::PERM => Error::Io {
                    what: format!(
                        "cannot enter the {namespace}: that takes root, or the right in its user namespace"
                    ),
                    source,
                },
                _ => Error::Io { what: format!("cannot enter the {namespace}"), source },
            }
        })
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("network".into())
            .spawn_scoped(scope, || enter().and_then(|()| work()))
            .context(|| "cannot start a thread".into())?;
        thread.join().unwrap_or_else(|_| {
            Err(Error::Usage(format!(
                "the work in the {namespace} ended unexpectedly; this is an error of bulkhead's"
            )))
        })
    })
}

/// Redirecting the host's own interfaces would cut the host off.
fn refuse_own(namespace: &NamespaceRef, file: &File) -> Result<()> {
    let identity = |about: fs::Metadata| (about.dev(), about.ino());
    let wanted = identity(file.metadata().context(|| format!("cannot look at the {namespace}"))?);
    for (whose, path) in
        [("this process's own", "/proc/thread-self/ns/net"), ("the host's", "/proc/1/ns/net")]
    {
        if fs::metadata(path).is_ok_and(|about| identity(about) == wanted) {
            return Err(Error::Usage(format!(
                "the {namespace} is {whose}: a sandbox takes all traffic of the interfaces it is given, which would \
                 cut the host off. Make one for it (`ip netns add NAME`)"
            )));
        }
    }
    Ok(())
}
