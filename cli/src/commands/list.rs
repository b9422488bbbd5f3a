//! `bulkhead ps`, `top`, `stats` and `inspect`.

use bulkhead_runtime::state::{self, Files, Record, Status};
use bulkhead_runtime::{Layout, Result, isolation, names, stop};
use serde::Serialize;
use serde_json::{Value, json};

use super::lookup;
use crate::args::{InspectArgs, OneArgs, PsArgs, StatsArgs};
use crate::failure::{Failure, Outcome, each};
use crate::table::{self, Format};

/// A container in `ps --format json`.
#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    name: &'a str,
    image: &'a str,
    command: &'a [String],
    status: &'static str,
    exit_code: Option<u8>,
    created_ns: u64,
    started_ns: u64,
    finished_ns: u64,
    pid: u32,
}

pub fn ps(layout: &Layout, args: &PsArgs) -> Outcome {
    let mut records = state::list(layout).map_err(Failure::plain)?;
    records.retain(|record| args.all || record.status != Status::Exited);
    if args.quiet {
        let ids: String =
            records.iter().map(|record| shown_id(record, args.no_trunc).to_owned() + "\n").collect();
        table::print(&ids)?;
        return Ok(0);
    }
    match args.format {
        Format::Json => {
            let rows: Vec<_> = records
                .iter()
                .map(|record| Row {
                    id: &record.id,
                    name: &record.name,
                    image: &record.image,
                    command: &record.command,
                    status: record.status.name(),
                    exit_code: record.exit.as_ref().map(|exit| exit.code),
                    created_ns: record.created_ns,
                    started_ns: record.started_ns,
                    finished_ns: record.finished_ns,
                    pid: record.monitor_pid,
                })
                .collect();
            table::print_json(&rows)?;
        }
        Format::Table => {
            let rows: Vec<_> = records
                .iter()
                .map(|record| {
                    vec![
                        shown_id(record, args.no_trunc).to_owned(),
                        record.image.clone(),
                        shown_command(&record.command, args.no_trunc),
                        table::ago(record.created_ns),
                        shown_status(record),
                        record.name.clone(),
                    ]
                })
                .collect();
            table::print_table(&["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "NAME"], &rows)?;
        }
    }
    Ok(0)
}

fn shown_id(record: &Record, whole: bool) -> &str {
    if whole { &record.id } else { names::short(&record.id) }
}

fn shown_command(command: &[String], whole: bool) -> String {
    const WIDTH: usize = 30;
    let text: String = command.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if whole || text.chars().count() <= WIDTH {
        text
    } else {
        text.chars().take(WIDTH - 1).chain(['…']).collect()
    }
}

fn shown_status(record: &Record) -> String {
    match (&record.exit, record.status) {
        (Some(exit), _) => format!("exited ({}) {}", exit.code, table::ago(record.finished_ns)),
        (None, Status::Running) => format!("running since {}", table::ago(record.started_ns)),
        (None, status) => status.name().to_owned(),
    }
}

pub fn top(layout: &Layout, args: &OneArgs) -> Outcome {
    let record = lookup(layout, &args.container).map_err(Failure::plain)?;
    let listed = stop::processes(layout, &record).map_err(Failure::plain)?;
    let rows: Vec<Vec<String>> = listed
        .processes
        .iter()
        .map(|process| {
            vec![
                process.container_pid.to_string(),
                process.ppid.to_string(),
                process.uid.to_string(),
                table::size(process.rss_bytes),
                format!("{:.2}s", process.cpu_ns as f64 / 1e9),
                process.command.chars().filter(|c| !c.is_control()).take(200).collect(),
            ]
        })
        .collect();
    let headings = ["PID", "PPID", "UID", "RSS", "CPU", "COMMAND"];
    match args.format {
        Format::Table => table::print_table(&headings, &rows)?,
        Format::Json => {
            let rows: Vec<Value> = listed
                .processes
                .iter()
                .map(|process| {
                    json!({"pid": process.container_pid, "ppid": process.ppid, "uid": process.uid,
                        "rss_bytes": process.rss_bytes, "cpu_ns": process.cpu_ns, "command": process.command})
                })
                .collect();
            table::print_json(&rows)?;
        }
    }
    Ok(0)
}

pub fn stats(layout: &Layout, args: &StatsArgs) -> Outcome {
    let records: Vec<Record> = if args.containers.is_empty() {
        let all = state::list(layout).map_err(Failure::plain)?;
        all.into_iter().filter(|record| record.status == Status::Running).collect()
    } else {
        args.containers
            .iter()
            .map(|name| lookup(layout, name))
            .collect::<Result<_>>()
            .map_err(Failure::plain)?
    };
    let mut values = Vec::new();
    let mut rows = Vec::new();
    for record in &records {
        let stats = stop::stats(layout, record).map_err(Failure::plain)?;
        rows.push(vec![
            names::short(&record.id).to_owned(),
            record.name.clone(),
            format!("{:.2}s", stats.cpu_usage_ns as f64 / 1e9),
            format!("{} / {}", table::size(stats.memory_usage_bytes), table::size(stats.memory_limit_bytes)),
            stats.pids_current.to_string(),
            format!("{} / {}", table::size(stats.read_bytes), table::size(stats.write_bytes)),
        ]);
        values.push(json!({
            "id": record.id, "name": record.name, "cpu_usage_ns": stats.cpu_usage_ns,
            "cpu_user_ns": stats.cpu_user_ns, "cpu_system_ns": stats.cpu_system_ns,
            "memory_usage_bytes": stats.memory_usage_bytes, "memory_limit_bytes": stats.memory_limit_bytes,
            "memory_peak_bytes": stats.memory_peak_bytes, "oom_kills": stats.oom_kills,
            "pids_current": stats.pids_current, "pids_limit": stats.pids_limit,
            "read_bytes": stats.read_bytes, "write_bytes": stats.write_bytes,
        }));
    }
    match args.format {
        Format::Json => table::print_json(&values)?,
        Format::Table => {
            table::print_table(&["CONTAINER ID", "NAME", "CPU TIME", "MEMORY", "PIDS", "I/O"], &rows)?
        }
    }
    Ok(0)
}

pub fn inspect(layout: &Layout, args: &InspectArgs) -> Outcome {
    if args.isolation {
        return isolation(layout, args);
    }
    let mut found = Vec::new();
    let status = each(&args.containers, |name| {
        let record = lookup(layout, name)?;
        let files = Files::new(layout, &record.id);
        let mut value = serde_json::to_value(&record).unwrap_or_default();
        if let Some(fields) = value.as_object_mut() {
            fields.insert("log_path".into(), json!(files.log()));
            fields.insert("scratch_path".into(), json!(files.scratch()));
            fields.insert("state_dir".into(), json!(files.dir));
            if record.status != Status::Exited {
                fields.insert("control_socket".into(), json!(files.control()));
                fields.insert("vsock_socket".into(), json!(files.vsock()));
            }
        }
        found.push(value);
        Ok(())
    })?;
    table::print_json(&found)?;
    Ok(status)
}

fn isolation(layout: &Layout, args: &InspectArgs) -> Outcome {
    let mut found = Vec::new();
    let status = each(&args.containers, |name| {
        let pid = name.strip_prefix("pid:").and_then(|pid| pid.parse().ok());
        found.push(match pid {
            Some(pid) => isolation::of_process(pid)?,
            None => {
                let record = lookup(layout, name)?;
                isolation::of_container(&record, &Files::new(layout, &record.id))?
            }
        });
        Ok(())
    })?;
    match args.format.unwrap_or_default() {
        Format::Json => table::print_json(&found)?,
        Format::Table => {
            for (number, one) in found.iter().enumerate() {
                if number > 0 {
                    table::print("\n")?;
                }
                let servers = one.file_servers.iter().map(|_| "FILE SERVER");
                let headings: Vec<_> = ["", "MONITOR"].into_iter().chain(servers).collect();
                table::print_table(&headings, &one.rows())?;
            }
        }
    }
    Ok(status)
}
