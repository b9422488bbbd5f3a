//! Real programs from Debian packages.

use std::time::Duration;

use anyhow::Result;
use bulkhead_tests::host::Host;
use bulkhead_tests::registry::Needs;
use bulkhead_tests::test;

test!(python_computes_and_uses_files, Needs::bulkhead().images(&["python"]).deadline(60));
fn python_computes_and_uses_files(host: &Host) -> Result<()> {
    let script = r#"
import hashlib, json, math, os, subprocess, sys, tempfile, threading
print(sum(n * n for n in range(100000)), math.factorial(25), round(math.pi, 10))
with tempfile.TemporaryDirectory() as d:
    path = os.path.join(d, "numbers")
    with open(path, "w") as f:
        for n in range(10000): f.write(f"{n}\n")
    os.rename(path, path + ".moved")
    with open(path + ".moved") as f: numbers = [int(line) for line in f]
    print(len(numbers), sum(numbers), os.stat(path + ".moved").st_size)
print(hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16])
done = []
threads = [threading.Thread(target=lambda n=n: done.append(n)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(done), subprocess.run(["echo", "child"], capture_output=True, text=True).stdout.strip())
sys.exit(7)
"#;
    let expected = "333328333350000 15511210043330985984000000 3.1415926536\n10000 49995000 48890\n";
    let run = host.bulkhead_program(["run", "--rm", "-i", "python", "python3", "-"]).stdin(script).run()?;
    run.status_is(7)?.stdout_has(expected)?.stdout_has("[0, 1, 2, 3, 4, 5, 6, 7] child\n")?;
    Ok(())
}

test!(upper_layers_hide_what_they_say, Needs::bulkhead().images(&["python"]));
fn upper_layers_hide_what_they_say(host: &Host) -> Result<()> {
    let script = "pwd; ls -A /opt/hidden; test ! -e /etc/base-only && echo deleted; ls -A /etc | grep -c wh; which python3";
    host.bulkhead(["run", "--rm", "python", "sh", "-c", script])?
        .ok()?
        .stdout_is("/srv\nabove\ndeleted\n0\n/usr/bin/python3\n")?;
    Ok(())
}

test!(redis_serves_and_exec_reaches_it, Needs::bulkhead().images(&["redis"]).deadline(120));
fn redis_serves_and_exec_reaches_it(host: &Host) -> Result<()> {
    host.bulkhead(["run", "-d", "--name", "store", "redis:7"])?.ok()?;
    let cli = |words: &[&str]| host.bulkhead_program(["exec", "store", "redis-cli"]).args(words).run();
    host.eventually("redis answers", Duration::from_secs(30), || Ok(cli(&["ping"])?.stdout() == "PONG\n"))?;
    cli(&["set", "key", "value"])?.ok()?.stdout_is("OK\n")?;
    cli(&["get", "key"])?.ok()?.stdout_is("value\n")?;
    // Its user is the image's, and its working directory.
    host.bulkhead(["exec", "store", "sh", "-c", "id -un; pwd"])?.ok()?.stdout_is("redis\n/data\n")?;
    host.bulkhead(["logs", "store"])?.ok()?.stdout_has("Ready to accept connections")?;
    // The image's stop signal is SIGINT, which redis takes as a request to end well.
    host.bulkhead(["stop", "store"])?.ok()?;
    host.bulkhead(["logs", "store"])?.ok()?.stdout_has("Redis is now ready to exit")?;
    host.bulkhead(["wait", "store"])?.ok()?.stdout_is("0\n")?;
    host.bulkhead(["rm", "store"])?.ok()?;
    Ok(())
}

test!(redis_answers_a_client_in_the_same_container, Needs::bulkhead().images(&["redis"]).deadline(120));
fn redis_answers_a_client_in_the_same_container(host: &Host) -> Result<()> {
    let script = "redis-server --save '' --daemonize yes >/dev/null; \
        until redis-cli ping >/dev/null 2>&1; do sleep 0.1; done; \
        redis-cli incrby counter 41; redis-cli incr counter; redis-cli -r 50 lpush list x | tail -1; redis-cli shutdown";
    host.bulkhead(["run", "--rm", "--entrypoint", "sh", "redis:7", "-c", script])?
        .ok()?
        .stdout_is("41\n42\n50\n")?;
    Ok(())
}
