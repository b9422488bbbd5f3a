//! Many containers, one after the other and at once. What they leave behind is found by the framework.

use anyhow::{Result, ensure};
use bulkhead_tests::host::Host;
use bulkhead_tests::test;

use crate::BUSYBOX;

test!(fifty_one_after_the_other, BUSYBOX.deadline(120));
fn fifty_one_after_the_other(host: &Host) -> Result<()> {
    for number in 0..50 {
        let number = number.to_string();
        host.bulkhead(["run", "--rm", "busybox", "echo", &number])?
            .ok()?
            .stdout_is(&format!("{number}\n"))?;
    }
    Ok(())
}

test!(eight_at_once, BUSYBOX.deadline(120));
fn eight_at_once(host: &Host) -> Result<()> {
    let mut running = Vec::new();
    for number in 0..8 {
        let name = format!("c{number}");
        let script = format!("echo {name}; read word; echo {name} $word");
        let run = host.bulkhead_program(["run", "--rm", "-i", "--memory", "256m", "--name", &name]);
        running.push((name, run.args(["busybox", "sh", "-c", &script]).open_stdin().spawn()?));
    }
    for (name, run) in &mut running {
        run.wait_for(name, std::time::Duration::from_secs(60))?;
    }
    let listed = host.bulkhead(["ps", "-q"])?.ok()?.stdout();
    ensure!(listed.lines().count() == 8, "ps lists: {listed}");
    for (name, mut run) in running {
        run.send("over\n")?;
        run.wait()?.ok()?.stdout_is(&format!("{name}\n{name} over\n"))?;
    }
    Ok(())
}
