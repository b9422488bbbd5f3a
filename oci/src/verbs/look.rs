//! `state`, `list`, `ps`, `events`.

use std::io::Write;
use std::time::Duration;

use bulkhead_protocol::agent::{ContainerRequest, ListProcessesResponse, StatsResponse};
use bulkhead_runtime::{Context as _, Error, Result};
use serde_json::{Value, json};

use super::{agent, in_state};
use crate::Context;
use crate::args::{Events, Format, List, Ps};
use crate::store::{Container, Status};

/// Prints, unless nobody reads any more.
fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context(|| "cannot write to standard output".into())
        }
        _ => Ok(()),
    }
}

/// What `state` and `list` say of a container: runtime-spec's state and runc's additions.
fn summary(container: &Container) -> Value {
    let mut state = container.state(container.status());
    if let Some(fields) = state.as_object_mut() {
        fields.insert("rootfs".into(), json!(container.rootfs));
        fields.insert("created".into(), json!(container.created));
        fields.insert(
            "owner".into(),
            if container.owner == 0 { "root".into() } else { json!(container.owner.to_string()) },
        );
    }
    state
}

/// Prints a container's state.
///
/// # Errors
/// It does not exist.
pub fn state(context: &Context, id: &str) -> Result<()> {
    let state = summary(&context.root.load(id)?);
    print(&serde_json::to_string_pretty(&state).context(|| "cannot encode the state".into())?)
}

/// Prints all containers.
///
/// # Errors
/// The root cannot be read.
pub fn list(context: &Context, wish: &List) -> Result<()> {
    // One that is just being made or removed has no state to show.
    let ids = context.root.ids()?;
    let containers: Vec<_> = ids.iter().filter_map(|id| context.root.load(id).ok()).collect();
    if wish.quiet {
        return containers.iter().try_for_each(|container| print(&container.id));
    }
    if wish.format == Format::Json {
        let all: Vec<_> = containers.iter().map(summary).collect();
        return print(&json!(all).to_string());
    }
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    for container in &containers {
        let state = summary(container);
        let field = |name: &str| {
            state.get(name).map_or_else(String::new, |value| {
                value.as_str().map_or_else(|| value.to_string(), str::to_owned)
            })
        };
        rows.push(["id", "pid", "status", "bundle", "created", "owner"].map(field));
    }
    print(&table(&rows))
}

/// Columns as wide as their widest entry, the last one open.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        cells.join("   ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Prints the processes of a container: pids of the guest, as nothing of them exists on the host. As JSON, which engines
/// read and look up in the host's list of processes (`docker top`), it is the one of the host's that stands for them all.
///
/// # Errors
/// It does not exist, or its guest does not answer.
pub fn ps(context: &Context, wish: &Ps) -> Result<()> {
    let container = context.root.load(&wish.id)?;
    let lives = container.lives();
    if wish.format == Format::Json {
        return print(&json!(lives.then_some([container.pid])).to_string());
    }
    let request = ContainerRequest { container: container.in_guest() };
    // Of one that has ended there are none, which is no error for runc either.
    let listed = if lives {
        agent(&container)?
            .call("ListProcesses", &request)
            .context(|| format!("cannot list the processes of {}", wish.id))?
    } else {
        ListProcessesResponse::default()
    };
    let mut rows = vec![["UID", "PID", "PPID", "RSS", "CMD"].map(str::to_owned)];
    for process in &listed.processes {
        // Another kernel's words: nothing in them may act on a terminal.
        let command: String = process.command.chars().filter(|c| !c.is_control()).collect();
        let numbers = [process.uid, process.container_pid, process.ppid].map(|number| number.to_string());
        let [uid, pid, ppid] = numbers;
        rows.push([uid, pid, ppid, (process.rss_bytes / 1024).to_string(), command]);
    }
    print(&table(&rows))
}

/// Prints resource usage, once or again and again, as runc does.
///
/// # Errors
/// The container does not run.
pub fn events(context: &Context, wish: &Events) -> Result<()> {
    let interval = interval(&wish.interval)?;
    loop {
        let container = match in_state(context, &wish.id, &[Status::Running, Status::Paused], "watch") {
            // It has ended between two reports.
            Err(_)
                if !wish.stats
                    && context.root.load(&wish.id).is_ok_and(|c| c.status() == Status::Stopped) =>
            {
                return Ok(());
            }
            container => container?,
        };
        let request = ContainerRequest { container: container.in_guest() };
        let stats: StatsResponse = agent(&container)?
            .call("Stats", &request)
            .context(|| format!("cannot measure container {}", wish.id))?;
        print(&json!({"type": "stats", "id": wish.id, "data": data(&stats)}).to_string())?;
        if wish.stats {
            return Ok(());
        }
        std::thread::sleep(interval);
    }
}

/// The fields of runc's `events` that a guest has.
fn data(stats: &StatsResponse) -> Value {
    json!({
        "cpu": {
            "usage": {"total": stats.cpu_usage_ns, "user": stats.cpu_user_ns, "kernel": stats.cpu_system_ns},
            "throttling": {"throttledTime": stats.throttled_ns},
        },
        "memory": {
            "usage": {
                "usage": stats.memory_usage_bytes,
                "limit": stats.memory_limit_bytes,
                "max": stats.memory_peak_bytes,
            },
            "oom_kills": stats.oom_kills,
        },
        "pids": {"current": stats.pids_current, "limit": stats.pids_limit},
        "blkio": {"read_bytes": stats.read_bytes, "write_bytes": stats.write_bytes},
    })
}

/// `5s`, `500ms`, `1m`, or seconds.
fn interval(text: &str) -> Result<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().unwrap_or(0);
    let interval = match unit {
        "ms" => Duration::from_millis(number),
        "" | "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        _ => Duration::ZERO,
    };
    if interval.is_zero() {
        return Err(Error::Usage(format!("--interval {text}: write a duration above 0, like 5s or 500ms")));
    }
    Ok(interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        assert_eq!(interval("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(interval("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(interval("7").unwrap(), Duration::from_secs(7));
        for bad in ["", "0s", "5h", "x"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tables_line_up() {
        let rows = [["A".to_owned(), "B".to_owned()], ["longer".to_owned(), "x".to_owned()]];
        assert_eq!(table(&rows), "A        B\nlonger   x");
    }
}
