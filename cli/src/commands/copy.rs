//! `bulkhead cp`.

use std::path::Path;

use bulkhead_runtime::{Error, Layout, copy};

use super::lookup;
use crate::args::CpArgs;
use crate::failure::{Failure, Outcome};

pub fn cp(layout: &Layout, args: &CpArgs) -> Outcome {
    let result = match (in_container(&args.from), in_container(&args.to)) {
        (Some((container, path)), None) => lookup(layout, container)
            .and_then(|record| copy::out_of_container(layout, &record, &path, Path::new(&args.to))),
        (None, Some((container, path))) => lookup(layout, container)
            .and_then(|record| copy::into_container(layout, &record, Path::new(&args.from), &path)),
        (Some(_), Some(_)) => {
            Err(Error::Usage("cp copies between a container and the host, not between containers".into()))
        }
        (None, None) => Err(Error::Usage(
            "cp needs CONTAINER:PATH on one side; write ./FILE for a host file with a colon".into(),
        )),
    };
    result.map(|()| 0).map_err(Failure::plain)
}

/// `CONTAINER:PATH`; a path that begins with `.` or `/` is the host's. The container's paths are absolute.
fn in_container(text: &str) -> Option<(&str, String)> {
    if text.starts_with(['/', '.']) {
        return None;
    }
    let (container, path) = text.split_once(':')?;
    Some((container, if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        assert_eq!(in_container("web:/etc/x"), Some(("web", "/etc/x".into())));
        assert_eq!(in_container("web:x"), Some(("web", "/x".into())));
        for host in ["/a:b", "./a:b", "a", "."] {
            assert_eq!(in_container(host), None);
        }
    }
}
