//! The command line: runc's verbs, flags and defaults.
//!
//! Not by the crate liboci-cli: it has no `--rootless` and no `--pidfd-socket`, insists on a signal for `kill`, and calls
//! `checkpoint` `checkpointt` (docs/decisions/0011).

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs OCI containers, each in a microVM with a kernel of its own.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-oci", disable_version_flag = true, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

#[derive(Debug, Args)]
pub struct Global {
    /// Print version and supported runtime-spec.
    #[arg(short = 'v', long)]
    pub version: bool,
    /// Log what is done.
    #[arg(long)]
    pub debug: bool,
    /// Log file; default: standard error.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// How the log is written.
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Directory of the containers' state (on a tmpfs); default: /run/bulkhead-oci.
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// cgroupsPath is `slice:prefix:name`, as systemd has it.
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Ignore failures to set cgroups up: true, false or auto.
    #[arg(long, value_name = "BOOL", default_value = "auto")]
    pub rootless: String,
    /// Has no meaning here: a microVM is saved as a whole, without CRIU.
    #[arg(long, value_name = "PATH", hide = true)]
    pub criu: Option<PathBuf>,
}

/// As logrus writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a container; its process waits for `start`.
    Create(Create),
    /// Let a created container's process go.
    Start(Id),
    /// Create and start a container, and wait for its end unless detached.
    Run(Run),
    /// Print a container's state.
    State(Id),
    /// Send a signal to a container's process.
    Kill(Kill),
    /// Remove a container.
    Delete(Delete),
    /// Run one more process in a container.
    Exec(Box<Exec>),
    /// List the processes of a container.
    Ps(Ps),
    /// List the containers of this root.
    List(List),
    /// Print resource usage.
    Events(Events),
    /// Suspend all processes of a container.
    Pause(Id),
    /// Let them go on.
    Resume(Id),
    /// Change a container's limits.
    Update(Box<Update>),
    /// Save a container, microVM and all, to go on from; it ends unless it is left running.
    Checkpoint(Box<Checkpoint>),
    /// Have a container go on from a checkpoint, under this id.
    Restore(Box<Restore>),
    /// Write a config.json to start from.
    Spec(Spec),
    /// Print what this runtime can do.
    Features,
}

#[derive(Debug, Args)]
pub struct Id {
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Create {
    /// The bundle: a directory with config.json.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Unix socket that is sent the terminal's master.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that is sent a pidfd of the container's process.
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// Where to write the pid.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Has no meaning here: the root is in the guest.
    #[arg(long)]
    pub no_pivot: bool,
    /// Has no meaning here: the guest has keyrings of its own.
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Refused unless 0: a descriptor cannot go to another kernel.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// The root file system is on this disk or in this image of one, and the bundle's root an empty directory:
    /// {"type", "source", "options"} as containerd has them. Or on EROFS files, one for each layer, with a disk for what
    /// is written: {"layers": [lowest, …], "upper": DIR, "writable": PATH, "otherwise": a mount as above}. Not of runc's; for the shim.
    #[arg(long, value_name = "JSON")]
    pub root_disk: Option<String>,
    /// The process is that of a checkpoint, and goes on with `start`. Not of runc's; for the shim, see `restore`.
    #[arg(long, value_name = "DIR")]
    pub image_path: Option<PathBuf>,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub create: Create,
    /// Return as soon as it runs.
    #[arg(short, long)]
    pub detach: bool,
    /// Keep the state after the end.
    #[arg(long)]
    pub keep: bool,
    /// Has no meaning here.
    #[arg(long)]
    pub no_subreaper: bool,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Every process of the container.
    #[arg(short, long)]
    pub all: bool,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// Name or number.
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Kill it if it runs; no error if it does not exist.
    #[arg(short, long)]
    pub force: bool,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// A file with the process of runtime-spec.
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Give it a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Return as soon as it runs.
    #[arg(short, long)]
    pub detach: bool,
    /// Where to write the pid.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Unix socket that is sent the terminal's master.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Unix socket that is sent a pidfd of the process.
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// `UID[:GID]`.
    #[arg(short, long)]
    pub user: Option<String>,
    /// Working directory.
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// `KEY=value`.
    #[arg(short, long)]
    pub env: Vec<String>,
    /// More groups.
    #[arg(short = 'g', long)]
    pub additional_gids: Vec<u32>,
    /// More capabilities.
    #[arg(short, long)]
    pub cap: Vec<String>,
    /// Never gain privileges.
    #[arg(long)]
    pub no_new_privs: bool,
    /// Ignored: the guest has no AppArmor.
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// Ignored: the guest has no SELinux.
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
    /// Refused: processes run in the container's own group.
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// Refused unless 0: a descriptor cannot go to another kernel.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Also in a paused container; it runs when that is resumed.
    #[arg(long)]
    pub ignore_paused: bool,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// How it is written.
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: Format,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// Taken for runc's sake; the columns are always the same.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "PS OPTIONS")]
    pub options: Vec<String>,
}

#[derive(Debug, Args)]
pub struct List {
    /// How it is written.
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: Format,
    /// Ids only.
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Seconds between two reports.
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    pub interval: String,
    /// One report, then end.
    #[arg(long)]
    pub stats: bool,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Update {
    /// File with linux.resources as JSON, `-` for standard input; the other flags are then ignored.
    #[arg(short, long, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Memory limit, bytes.
    #[arg(long)]
    pub memory: Option<i64>,
    /// Memory kept free of reclaim, bytes.
    #[arg(long)]
    pub memory_reservation: Option<i64>,
    /// Memory and swap, bytes.
    #[arg(long)]
    pub memory_swap: Option<i64>,
    /// CPU period, microseconds.
    #[arg(long)]
    pub cpu_period: Option<u64>,
    /// CPU time in a period, microseconds.
    #[arg(long)]
    pub cpu_quota: Option<i64>,
    /// Relative CPU weight, 2 to 262144.
    #[arg(long)]
    pub cpu_share: Option<u64>,
    /// CPUs to use.
    #[arg(long)]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use.
    #[arg(long)]
    pub cpuset_mems: Option<String>,
    /// Most processes.
    #[arg(long, allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    /// Relative I/O weight, 10 to 1000.
    #[arg(long)]
    pub blkio_weight: Option<u16>,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// What `checkpoint` and `restore` have in common: runc's words for CRIU's.
#[derive(Debug, Args)]
pub struct Criu {
    /// Directory of the checkpoint; one that is to be made may be there, empty. Default: ./checkpoint.
    #[arg(long, value_name = "DIR")]
    pub image_path: Option<PathBuf>,
    /// Has no meaning here: there are no other files than those of the image.
    #[arg(long, value_name = "DIR")]
    pub work_path: Option<PathBuf>,
    /// Connections are always saved; they go on where the addresses are the same.
    #[arg(long)]
    pub tcp_established: bool,
    /// Has no meaning here: no socket of the guest's leads to another kernel.
    #[arg(long)]
    pub ext_unix_sk: bool,
    /// Has no meaning here: terminals are always saved.
    #[arg(long)]
    pub shell_job: bool,
    /// Has no meaning here: locks are always saved.
    #[arg(long)]
    pub file_locks: bool,
    /// Has no meaning here: those of the guest are saved, the host's is made as config.json says.
    #[arg(long, value_name = "MODE", value_parser = ["", "soft", "full", "strict", "ignore"])]
    pub manage_cgroups_mode: Option<String>,
    /// `network`: it is always a new one.
    #[arg(long, value_name = "NAMESPACE")]
    pub empty_ns: Vec<String>,
    /// Has no meaning here.
    #[arg(long)]
    pub auto_dedup: bool,
    /// Refused: there are no earlier images.
    #[arg(long, value_name = "DIR", default_value = "", hide_default_value = true)]
    pub parent_path: String,
    /// Refused: memory is in the image.
    #[arg(long)]
    pub lazy_pages: bool,
    /// Refused, too.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "", hide_default_value = true)]
    pub page_server: String,
}

#[derive(Debug, Args)]
pub struct Checkpoint {
    #[command(flatten)]
    pub criu: Criu,
    /// The container goes on instead of ending.
    #[arg(long)]
    pub leave_running: bool,
    /// Refused: a checkpoint is made in one go.
    #[arg(long)]
    pub pre_dump: bool,
    /// Refused unless negative: it is for --lazy-pages.
    #[arg(long, value_name = "FD", allow_hyphen_values = true, default_value_t = -1, hide_default_value = true)]
    pub status_fd: i64,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    pub criu: Criu,
    /// The bundle: a directory with config.json, for what is of the host's.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Unix socket that is sent the terminal's master.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Return as soon as it runs.
    #[arg(short, long)]
    pub detach: bool,
    /// Where to write the pid.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Has no meaning here: the root is in the guest.
    #[arg(long)]
    pub no_pivot: bool,
    /// Has no meaning here.
    #[arg(long)]
    pub no_subreaper: bool,
    /// Ignored: the guest has no such module.
    #[arg(long, value_name = "PROFILE")]
    pub lsm_profile: Option<String>,
    /// Ignored: the guest has no such module.
    #[arg(long, value_name = "CONTEXT")]
    pub lsm_mount_context: Option<String>,
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// The words of the command line as this parser takes them: containerd's shim for runc says `-no-subreaper`, as Go's parsers take long
/// flags.
pub fn as_getopt(words: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    let mut restores = false;
    words.map(move |word| {
        restores |= word == "restore";
        if restores && word == "-no-subreaper" { "--no-subreaper".into() } else { word }
    })
}

#[derive(Debug, Args)]
pub struct Spec {
    /// Where to write it.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// For a caller that is not root.
    #[arg(long)]
    pub rootless: bool,
}
