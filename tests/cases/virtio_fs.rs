//! Directories and files of the host in a container (`-v`, `--mount`), by virtio-fs.

use anyhow::Result;
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::{BUSYBOX, shell};

test!(a_directory_is_shared_both_ways, BUSYBOX.deadline(60));
fn a_directory_is_shared_both_ways(host: &Host) -> Result<()> {
    host.file("dir/in", "from the host\n")?;
    let volume = format!("{}:/data", host.work().join("dir").display());
    shell(host, &["-v", &volume], "cat /data/in; mount | grep /data; echo from the guest >/data/out")?
        .ok()?
        .stdout_has("from the host\n")?;
    anyhow::ensure!(std::fs::read_to_string(host.work().join("dir/out"))? == "from the guest\n");
    Ok(())
}
