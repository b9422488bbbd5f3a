//! `bulkhead run`.

use bulkhead_image::{Image, Store};
use bulkhead_runtime::binds::Mounting;
use bulkhead_runtime::launch::{self, Launched};
use bulkhead_runtime::network::{NetworkWish, Port};
use bulkhead_runtime::options::{RunOptions, StorageLimit};
use bulkhead_runtime::{Error, Layout, Settings, doctor, trace};

use super::{environment, store};
use crate::args::RunArgs;
use crate::failure::Outcome;
use crate::table;

pub fn run(layout: &Layout, settings: &Settings, args: RunArgs) -> Outcome {
    doctor::require_kvm(layout)?;
    trace::mark("kvm known to work");
    let store = store(layout)?;
    let (mut binds, mut tmpfs) = (args.volume, args.tmpfs);
    for mounting in args.mount {
        match mounting {
            Mounting::Bind(bind) => binds.push(bind),
            Mounting::Tmpfs(mount) => tmpfs.push(mount),
        }
    }
    let options = RunOptions {
        env: environment(&args.env_file, &args.env)?,
        pids_limit: pids_limit(args.pids_limit)?,
        command: args.command,
        entrypoint: args.entrypoint,
        interactive: args.interactive,
        tty: args.tty,
        detach: args.detach,
        auto_remove: args.rm,
        workdir: args.workdir,
        user: args.user,
        memory: memory(args.memory)?,
        milli_cpus: args.cpus,
        read_only: args.read_only,
        tmpfs,
        binds,
        hostname: args.hostname,
        cap_add: args.cap_add,
        cap_drop: args.cap_drop,
        privileged: args.privileged,
        security: args.security_opt.into_iter().collect(),
        ulimits: args.ulimit,
        sysctls: args.sysctl,
        storage: args.storage,
        storage_limit: StorageLimit { bytes: args.storage_bps, requests: args.storage_iops },
        stop_signal: args.stop_signal,
        detach_keys: args.detach_keys,
        network: network(args.network.map_or_else(|| settings.run.network(), Ok)?, &args.publish)?,
        publish: args.publish,
        dns: args.dns,
        no_template: args.no_template,
        no_pool: args.no_pool,
    };
    let image = find_or_pull(layout, &store, &args.image)?;
    trace::mark("image resolved");
    let detach = options.detach;
    finish(launch::run(layout, &image, &args.image, options, args.name.as_deref(), settings)?, detach)
}

/// What is said when a container has ended, or runs in the background.
pub fn finish(launched: Launched, detach: bool) -> Outcome {
    match launched {
        Launched::Detached { id } if detach => {
            table::print(&format!("{id}\n"))?;
            Ok(0)
        }
        Launched::Detached { .. } => Ok(0),
        Launched::Exited { code, error } => {
            if !error.is_empty() {
                eprintln!("bulkhead: {error}");
            }
            Ok(code)
        }
    }
}

/// Ports are published by passt; whoever prepares a namespace does that there himself.
fn network(wish: NetworkWish, publish: &[Port]) -> Result<NetworkWish, Error> {
    if publish.is_empty() || wish == NetworkWish::Passt {
        return Ok(wish);
    }
    Err(Error::Usage(
        "-p publishes a port with --network passt only: without a network there is nothing to lead to, and in a network \
         namespace it is for whoever made that to forward ports"
            .into(),
    ))
}

/// An image that is not here is fetched, as with docker; by a process of its own, because `run` forks and so must
/// not have made threads.
pub fn find_or_pull(layout: &Layout, store: &Store, name: &str) -> Result<Image, Error> {
    match store.resolve(name) {
        Err(bulkhead_image::Error::NotFound { .. }) => {
            eprintln!("bulkhead: image {name:?} is not here, fetching it");
            let pulled = std::env::current_exe().and_then(|program| {
                std::process::Command::new(program)
                    .arg("--root")
                    .arg(&layout.data)
                    .args(["image", "pull", "--", name])
                    .stdout(std::process::Stdio::null())
                    .status()
            });
            match pulled {
                Ok(status) if status.success() => Ok(store.resolve(name)?),
                _ => Err(Error::Usage(format!(
                    "there is no image {name:?} here and it could not be fetched; `bulkhead image ls` lists what is \
                     here, `bulkhead image load FILE` adds an archive"
                ))),
            }
        }
        other => Ok(other?),
    }
}

/// Docker's smallest.
const MIN_MEMORY: u64 = 6 << 20;

pub fn memory(limit: Option<u64>) -> Result<Option<u64>, Error> {
    match limit {
        Some(0) => Ok(None),
        Some(bytes) if bytes < MIN_MEMORY => {
            Err(Error::Usage(format!("--memory {bytes}: at least {} MiB are needed", MIN_MEMORY >> 20)))
        }
        Some(bytes) if bytes > 1 << 40 => Err(Error::Usage("--memory: at most 1 TiB".into())),
        other => Ok(other),
    }
}

fn pids_limit(limit: Option<i64>) -> Result<Option<u64>, Error> {
    match limit {
        None | Some(-1 | 0) => Ok(None),
        Some(limit) => u64::try_from(limit)
            .map(Some)
            .map_err(|_| Error::Usage(format!("--pids-limit {limit}: write a number of processes, or -1"))),
    }
}
