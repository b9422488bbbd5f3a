//! Runs one microVM.
fn main() {
    let timeline = std::sync::Arc::new(vmm::timeline::Timeline::new());
    timeline.mark("main");
    let path = std::env::args().nth(1).unwrap();
    let r = vmm::config::Config::read(path.as_ref()).and_then(|config| {
        timeline.mark("config-read");
        let m = vmm::machine::Machine::build(config, timeline.clone())?;
        m.run()
    });
    match r {
        Ok((o, report)) => {
            if let Some(c) = report.complaint(&o) {
                eprintln!("{c}");
            }
            eprintln!("{}", serde_json::to_string(&report).unwrap());
            std::process::exit(o.exit_status().into());
        }
        Err(e) => {
            eprintln!("{e}: {:?}", e);
            std::process::exit(e.exit_status().into())
        }
    }
}
