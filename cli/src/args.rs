//! The command line. Flags have docker's names and meanings.

use std::net::IpAddr;
use std::path::PathBuf;

use bulkhead_runtime::binds::{Bind, Mounting};
use bulkhead_runtime::network::{NetworkWish, Port};
use bulkhead_runtime::options::{
    SecurityOption, Tmpfs, Ulimit, parse_capability, parse_cpus, parse_signal, parse_size, parse_sysctl,
};
use clap::{Args, Parser, Subcommand};

use crate::table::Format;

/// Containers that share no kernel: each runs in a microVM of its own.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    after_help = "Examples:\n  bulkhead image load busybox.tar\n  bulkhead run --rm busybox uname -r\n  \
                  bulkhead run -it --memory 512m --cpus 2 busybox sh\n  bulkhead doctor"
)]
pub struct Cli {
    /// Keep images, containers and sockets under this directory instead of /var/lib/bulkhead and /run/bulkhead.
    #[arg(long, global = true, value_name = "DIR", env = "BULKHEAD_ROOT")]
    pub root: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a container from an image and run a command in it.
    Run(Box<RunArgs>),
    /// Run one more command in a running container.
    Exec(ExecArgs),
    /// List containers.
    Ps(PsArgs),
    /// List the processes of a container.
    Top(OneArgs),
    /// Show what containers use.
    Stats(StatsArgs),
    /// Show all about containers, as JSON.
    Inspect(InspectArgs),
    /// Show what a container wrote.
    Logs(LogsArgs),
    /// End containers: their stop signal, then SIGKILL.
    Stop(StopArgs),
    /// Send a signal to containers.
    Kill(KillArgs),
    /// Remove containers that have ended.
    Rm(RmArgs),
    /// Wait until containers end and print their exit status.
    Wait(ManyArgs),
    /// Copy files between a container and the host; `-` is not supported.
    Cp(CpArgs),
    /// Save a running container, its machine and all, to a directory; it goes on.
    Snapshot(SnapshotArgs),
    /// Make a container that goes on where a saved one was; as often as you like.
    Restore(RestoreArgs),
    /// Make copies of a running container that go on from the same moment, each in a microVM of its own.
    Fork(ForkArgs),
    /// Machines that are ready before anybody asks for their container.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Images.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Check whether this host can run sandboxes, and say what to do if not.
    Doctor(DoctorArgs),
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Keep standard input open.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Run in the background and print the container's id.
    #[arg(short, long)]
    pub detach: bool,
    /// Remove the container when it has ended.
    #[arg(long)]
    pub rm: bool,
    /// Name of the container.
    #[arg(long)]
    pub name: Option<String>,
    /// Replace the image's entrypoint.
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Set an environment variable; a name alone takes the caller's value.
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Read environment variables from a file, a line each.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, by name or number.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Memory limit, like 512m. Sizes the microVM.
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Number of CPUs, like 1.5. Sizes the microVM.
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus)]
    pub cpus: Option<u64>,
    /// Make the root file system read-only.
    #[arg(long)]
    pub read_only: bool,
    /// Show a directory or file of the host in the container. A directory that does not exist is made.
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]", value_parser = Bind::parse_volume)]
    pub volume: Vec<Bind>,
    /// Mount something, like type=bind,source=/host/dir,target=/dir,readonly or type=tmpfs,target=/dir.
    #[arg(long, value_name = "KEY=VALUE,…", value_parser = Mounting::parse)]
    pub mount: Vec<Mounting>,
    /// Mount a tmpfs.
    #[arg(long, value_name = "DIR[:OPTIONS]", value_parser = Tmpfs::parse)]
    pub tmpfs: Vec<Tmpfs>,
    /// Host name.
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Add a capability, or ALL.
    #[arg(long, value_name = "CAPABILITY", value_parser = parse_capability)]
    pub cap_add: Vec<String>,
    /// Take a capability away, or ALL.
    #[arg(long, value_name = "CAPABILITY", value_parser = parse_capability)]
    pub cap_drop: Vec<String>,
    /// Give the container all that its guest has: every capability and device, every system call.
    #[arg(long)]
    pub privileged: bool,
    /// seccomp=unconfined, seccomp=PROFILE.json, no-new-privileges, or systempaths=unconfined.
    #[arg(long, value_name = "OPTION", value_parser = SecurityOption::parse)]
    pub security_opt: Vec<SecurityOption>,
    /// Limit a resource, like nofile=1024:2048.
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = Ulimit::parse)]
    pub ulimit: Vec<Ulimit>,
    /// Set a kernel parameter in the container's namespaces.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_sysctl)]
    pub sysctl: Vec<(String, String)>,
    /// Largest number of processes; -1 for no limit.
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub pids_limit: Option<i64>,
    /// Size of the writable layer, like 2g; 0 keeps it in the guest's memory [default: 10g, taken as it is used].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub storage: Option<u64>,
    /// Most bytes a second that each of its disks (image, writable layer) reads and writes, like 10m [default: no limit].
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0", hide_default_value = true)]
    pub storage_bps: u64,
    /// Most requests a second that each of its disks has [default: no limit].
    #[arg(long, value_name = "NUMBER", default_value = "0", hide_default_value = true)]
    pub storage_iops: u64,
    /// Signal that `stop` sends.
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// Keys that leave a terminal with the container running [default: ctrl-p,ctrl-q].
    #[arg(long, value_name = "KEYS")]
    pub detach_keys: Option<String>,
    /// Network: none (loopback only), ns:PATH (a network namespace), or passt (user-mode, no rights needed)
    /// [default: none].
    #[arg(long, visible_alias = "net", value_name = "NETWORK", value_parser = NetworkWish::parse)]
    pub network: Option<NetworkWish>,
    /// With --network passt: let a port of the host lead to one of the container.
    #[arg(short, long, value_name = "[IP:]HOST:CONTAINER[/udp]", value_parser = Port::parse)]
    pub publish: Vec<Port>,
    /// Name server, instead of the host's.
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<IpAddr>,
    /// Boot the microVM, rather than start from one that has booted.
    #[arg(long)]
    pub no_template: bool,
    /// Make a microVM, rather than take one that waits in a pool.
    #[arg(long)]
    pub no_pool: bool,
    /// Image: a name, an id, or the beginning of an id.
    pub image: String,
    /// Command and arguments instead of the image's.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Keep standard input open.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the process a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Run in the background.
    #[arg(short, long)]
    pub detach: bool,
    /// Set an environment variable; a name alone takes the caller's value.
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Read environment variables from a file, a line each.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory.
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, by name or number.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Give the process every capability.
    #[arg(long)]
    pub privileged: bool,
    /// Keys that leave a terminal with the process running [default: ctrl-p,ctrl-q].
    #[arg(long, value_name = "KEYS")]
    pub detach_keys: Option<String>,
    /// Name, id, or the beginning of an id.
    pub container: String,
    /// Command and arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Compress memory and disk: copies take longer to start and share no memory.
    #[arg(long)]
    pub compress: bool,
    /// Save only what differs from this snapshot. Copies need both; they can be moved together.
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Name, id, or the beginning of an id.
    pub container: String,
    /// The directory to make.
    pub directory: PathBuf,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Run in the background and print the container's id.
    #[arg(short, long)]
    pub detach: bool,
    /// Remove the container when it has ended.
    #[arg(long)]
    pub rm: bool,
    /// Name of the container.
    #[arg(long)]
    pub name: Option<String>,
    /// Let these ports of the host lead to the container, instead of those of the saved one.
    #[arg(short, long, value_name = "[IP:]HOST:CONTAINER[/udp]", value_parser = Port::parse)]
    pub publish: Vec<Port>,
    /// Network namespace to be in, of a container that was in one; without it the same.
    #[arg(long, value_name = "ns:PATH", value_parser = NetworkWish::parse)]
    pub network: Option<NetworkWish>,
    /// Keys that leave a terminal with the container running [default: ctrl-p,ctrl-q].
    #[arg(long, value_name = "KEYS")]
    pub detach_keys: Option<String>,
    /// What `bulkhead snapshot` made.
    pub directory: PathBuf,
}

#[derive(Debug, Args)]
pub struct ForkArgs {
    /// How many.
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Name of the copy; of several: NAME-1, NAME-2, …
    #[arg(long)]
    pub name: Option<String>,
    /// Remove each when it has ended.
    #[arg(long)]
    pub rm: bool,
    /// Name, id, or the beginning of an id.
    pub container: String,
}

#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also those that have ended.
    #[arg(short, long)]
    pub all: bool,
    /// Only ids.
    #[arg(short, long)]
    pub quiet: bool,
    /// Ids in full.
    #[arg(long)]
    pub no_trunc: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct StatsArgs {
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Containers; all that run when none is named.
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct OneArgs {
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Name, id, or the beginning of an id.
    pub container: String,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Names, ids, or beginnings of ids; with --isolation also pid:PID, a monitor or the process that started one.
    #[arg(required = true)]
    pub containers: Vec<String>,
    /// Show what of the jail is in force for living containers, as the kernel tells it.
    #[arg(long)]
    pub isolation: bool,
    /// With --isolation: table (the default) or json. Without: JSON is all there is; accepted for scripts.
    #[arg(long, value_enum)]
    pub format: Option<Format>,
}

#[derive(Debug, Args)]
pub struct ManyArgs {
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
    /// JSON is all there is; accepted for scripts.
    #[arg(long, value_enum)]
    pub format: Option<Format>,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the container ends.
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines.
    #[arg(short = 'n', long, value_name = "NUMBER")]
    pub tail: Option<usize>,
    /// Put the time before each line.
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only what was written in the last seconds.
    #[arg(long, value_name = "SECONDS")]
    pub since: Option<u64>,
    /// Name, id, or the beginning of an id.
    pub container: String,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds to wait before SIGKILL; -1 waits for ever.
    #[arg(short, long, default_value_t = 10, allow_negative_numbers = true)]
    pub time: i64,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct KillArgs {
    /// Signal, by name or number.
    #[arg(short, long, default_value = "KILL", value_parser = parse_signal)]
    pub signal: u32,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// End a running container first; no error for one that does not exist.
    #[arg(short, long)]
    pub force: bool,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub containers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CpArgs {
    /// `CONTAINER:PATH` or a path of the host.
    pub from: String,
    /// `CONTAINER:PATH` or a path of the host.
    pub to: String,
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Make a pool of microVMs that wait for containers of an image, and fill it; or change how many wait.
    Warm(WarmArgs),
    /// List pools.
    Ls(FormatArgs),
    /// End pools, and all microVMs that wait in them; containers that took one run on.
    #[command(visible_alias = "cool")]
    Rm(CoolArgs),
}

#[derive(Debug, Args)]
pub struct WarmArgs {
    /// Image: a name, an id, or the beginning of an id.
    #[arg(long, value_name = "IMAGE")]
    pub image: String,
    /// How many microVMs wait.
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 1)]
    pub count: u32,
    /// As the containers will be run.
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// As the containers will be run.
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus)]
    pub cpus: Option<u64>,
    /// As the containers will be run.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub storage: Option<u64>,
    /// As the containers will be run: none, or passt without published ports.
    #[arg(long, visible_alias = "net", value_name = "NETWORK", value_parser = NetworkWish::parse)]
    pub network: Option<NetworkWish>,
}

#[derive(Debug, Args)]
pub struct CoolArgs {
    /// All pools.
    #[arg(short, long, conflicts_with = "pools")]
    pub all: bool,
    /// Ids, beginnings of ids, or names of images.
    #[arg(required_unless_present = "all")]
    pub pools: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Add the images of an OCI layout or docker-save archive.
    Load(LoadArgs),
    /// Fetch an image from a registry.
    Pull(PullArgs),
    /// List images.
    Ls(ImageLsArgs),
    /// Show all about images, as JSON.
    Inspect(ImagesArgs),
    /// Remove images.
    Rm(ImageRmArgs),
    /// Give an image one more name.
    Tag(TagArgs),
    /// Read images, all or some, and compare them with the digests that were written down when they came.
    Verify(VerifyArgs),
    /// Remove images without a name, and layers that nothing needs.
    Prune(PruneArgs),
}

#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Only the ids of what was loaded.
    #[arg(short, long)]
    pub quiet: bool,
    /// Also: the archive, as docker has it.
    #[arg(short, long, value_name = "FILE", conflicts_with = "file")]
    pub input: Option<PathBuf>,
    /// The archive, or an OCI layout directory; `-` is standard input.
    #[arg(required_unless_present = "input")]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Names, ids, or beginnings of ids; all images when none is given.
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// No progress, only the id.
    #[arg(short, long)]
    pub quiet: bool,
    /// Speak plain HTTP to the registry (loopback registries are spoken to so by default).
    #[arg(long)]
    pub plain_http: bool,
    /// Like registry.example/name:tag or name@sha256:…
    pub reference: String,
}

#[derive(Debug, Args)]
pub struct ImageLsArgs {
    /// Only ids.
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ImageRmArgs {
    /// Also images that containers use.
    #[arg(short, long)]
    pub force: bool,
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
pub struct TagArgs {
    /// Name, id, or the beginning of an id.
    pub image: String,
    /// The new name.
    pub name: String,
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// All images that no container uses, with or without a name.
    #[arg(short, long)]
    pub all: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Look at containerd, docker and podman too, and print the lines to add to their settings.
    #[arg(long)]
    pub engines: bool,
    #[command(flatten)]
    pub format: FormatArgs,
}

#[derive(Debug, Args)]
pub struct FormatArgs {
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}
