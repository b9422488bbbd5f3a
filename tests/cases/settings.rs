//! The configuration file, and what `make install` puts where: the host of every test is laid out by it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::BUSYBOX;

test!(the_configuration_file_is_in_force, BUSYBOX);
fn the_configuration_file_is_in_force(host: &Host) -> Result<()> {
    let prefix = host.kernel().ancestors().nth(3).context("no prefix")?.to_owned();
    let shipped = fs::read_to_string(prefix.join("etc/bulkhead/config.toml"))?;
    ensure!(shipped.contains("\n#memory = \"512m\"\n"), "{shipped}");
    // All of it is found from where the programs are.
    let found = |file: &str| prefix.join(file).canonicalize().map(|path| path.display().to_string());
    let doctor = host.bulkhead(["doctor"])?.ok()?.stdout_has("no /etc/bulkhead/config.toml: defaults")?;
    doctor.stdout_has(&found("bin/bulkhead-vmm")?)?.stdout_has("../share/bulkhead/vmlinux")?;

    let run = |file: &Path| {
        let script = "nproc; cat /proc/cmdline; grep MemTotal /proc/meminfo";
        host.bulkhead_program(["run", "--rm", "busybox", "sh", "-c", script])
            .env("BULKHEAD_CONFIG", file)
            .run()
    };
    let set = |text: &str| host.file("config.toml", text);
    run(&set(&shipped)?)?.ok()?.stdout_has("1\n")?;
    let file = set("[machine]\nvcpus = 2\nmemory = \"256m\"\nkernel_parameters = \"bulkhead.word\"\n")?;
    let said = run(&file)?.ok()?.stdout_has("2\n")?.stdout_has(" bulkhead.word")?.stdout();
    let kib = said.split_whitespace().nth_back(1).and_then(|kib| kib.parse::<u64>().ok());
    ensure!(kib.is_some_and(|kib| (200_000..262_144).contains(&kib)), "{said}");
    // The command line comes first, the variable of a program too.
    let words = ["run", "--rm", "--cpus", "1", "busybox", "nproc"];
    host.bulkhead_program(words).env("BULKHEAD_CONFIG", &file).run()?.ok()?.stdout_is("1\n")?;
    let named = set("[machine]\nkernel = \"/no/such\"\n")?;
    run(&named)?
        .status_is(125)?
        .stderr_has("machine.kernel in ")?
        .stderr_has("/no/such, which does not exist")?;
    let words = ["run", "--rm", "busybox", "true"];
    let program = host.bulkhead_program(words).env("BULKHEAD_CONFIG", &named);
    program.env("BULKHEAD_KERNEL", host.kernel()).run()?.ok()?;

    // What makes no sense stops everything but the doctor, which says why.
    let wrong = set("[machine]\n\nmemroy = \"1g\"\n")?;
    let told =
        format!("{}:3: `memroy = \"1g\"`: unknown field `memroy`, expected one of `memory`", wrong.display());
    run(&wrong)?.status_is(125)?.stderr_has(&told)?;
    let doctor = host.bulkhead_program(["doctor"]).env("BULKHEAD_CONFIG", &wrong).run()?;
    doctor.failed()?.stdout_has(&told)?;
    run(Path::new("/no/such.toml"))?.status_is(125)?.stderr_has("which BULKHEAD_CONFIG names")?;
    Ok(())
}
