//! What a person can ask of `run`, and how its values are written.

use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::binds::Bind;
use crate::network::{NetworkWish, Port};
pub use crate::seccomp::Seccomp;
use crate::{Error, Result};

/// The wishes of `bulkhead run`, after parsing and before the image has its say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunOptions {
    /// Program and arguments; empty takes the image's.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint; an empty string removes it.
    pub entrypoint: Option<String>,
    /// Keep standard input open.
    pub interactive: bool,
    /// Give the process a terminal.
    pub tty: bool,
    /// Run in the background.
    pub detach: bool,
    /// Remove everything when it has ended.
    pub auto_remove: bool,
    /// `KEY=value`, in order.
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    /// Bytes.
    pub memory: Option<u64>,
    /// CPUs, in thousandths.
    pub milli_cpus: Option<u64>,
    /// The root file system is read-only.
    pub read_only: bool,
    /// Mounts of tmpfs.
    pub tmpfs: Vec<Tmpfs>,
    /// Directories and files of the host.
    pub binds: Vec<Bind>,
    /// Host name.
    pub hostname: Option<String>,
    /// Capabilities added to the default set, upper case with `CAP_`; `ALL`.
    pub cap_add: Vec<String>,
    /// Capabilities taken from the default set.
    pub cap_drop: Vec<String>,
    /// As docker's: every capability, every device of the guest, no filter of system calls, nothing of the guest's kernel hidden. It is the
    /// guest that is exposed, not the host.
    pub privileged: bool,
    /// `--security-opt`.
    pub security: Security,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Kernel parameters, `name=value`.
    pub sysctls: Vec<(String, String)>,
    /// Largest number of processes.
    pub pids_limit: Option<u64>,
    /// Bytes of the writable layer; 0 keeps it in the guest's memory.
    pub storage: Option<u64>,
    /// Bytes and requests that its disks may move and have in a second; 0 of either is no limit.
    pub storage_limit: StorageLimit,
    /// Signal that `stop` sends, replaces the image's.
    pub stop_signal: Option<String>,
    /// What typing detaches from a terminal, in docker's notation.
    pub detach_keys: Option<String>,
    /// Which network it gets.
    pub network: NetworkWish,
    /// Ports of the host that lead to it.
    pub publish: Vec<Port>,
    /// Name servers, instead of the host's.
    pub dns: Vec<IpAddr>,
    /// Boot, rather than start from a machine that has.
    pub no_template: bool,
    /// Make a machine, rather than take one that waits in a pool.
    pub no_pool: bool,
}

impl RunOptions {
    /// Whether `path` of the container is on a directory or file of the host's.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        self.binds.iter().any(|bind| Path::new(path).starts_with(&bind.target))
    }
}

/// What a container may have its disks do in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StorageLimit {
    /// Bytes read and written, of each disk.
    pub bytes: u64,
    /// Requests, of each disk.
    pub requests: u64,
}

/// What `--security-opt` changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// Which system calls it may make.
    pub seccomp: Seccomp,
    /// No process gains privileges by what it executes.
    pub no_new_privileges: bool,
    /// Nothing in `/proc` and `/sys` is masked or made read-only.
    pub system_paths: bool,
}

/// One `--security-opt`.
#[derive(Clone, Debug, PartialEq)]
pub enum SecurityOption {
    /// `seccomp=…`
    Seccomp(Seccomp),
    /// `no-new-privileges[:true|false]`
    NoNewPrivileges(bool),
    /// `systempaths=unconfined`
    SystemPaths,
    /// Of a security module that guests do not have: there is nothing to switch off.
    Nothing,
}

impl SecurityOption {
    /// Parses one. A profile's file is read now.
    ///
    /// # Errors
    /// It is none of docker's, or asks for what a guest does not have.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Err(Error::Usage(format!("--security-opt {text}: {why}")));
        let split = text.find(['=', ':']).and_then(|at| Some((text.get(..at)?, text.get(at + 1..)?)));
        let (key, value) = split.map_or((text, None), |(key, value)| (key, Some(value)));
        match (key, value) {
            ("seccomp", Some(value)) => Seccomp::parse(value).map(Self::Seccomp),
            ("no-new-privileges", None | Some("true")) => Ok(Self::NoNewPrivileges(true)),
            ("no-new-privileges", Some("false")) => Ok(Self::NoNewPrivileges(false)),
            ("no-new-privileges", Some(_)) => bad("write true or false"),
            ("systempaths", Some("unconfined")) => Ok(Self::SystemPaths),
            ("apparmor", Some("unconfined")) | ("label", Some("disable")) => Ok(Self::Nothing),
            ("apparmor" | "label", Some(_)) => bad(
                "the guest's kernel has no such security module; the container has a kernel of its own instead",
            ),
            _ => bad(
                "there are seccomp=unconfined, seccomp=PROFILE.json, no-new-privileges and systempaths=unconfined",
            ),
        }
    }
}

impl FromIterator<SecurityOption> for Security {
    /// The last of its kind counts.
    fn from_iter<T: IntoIterator<Item = SecurityOption>>(options: T) -> Self {
        options.into_iter().fold(Self::default(), |mut all, option| {
            match option {
                SecurityOption::Seccomp(seccomp) => all.seccomp = seccomp,
                SecurityOption::NoNewPrivileges(on) => all.no_new_privileges = on,
                SecurityOption::SystemPaths => all.system_paths = true,
                SecurityOption::Nothing => {}
            }
            all
        })
    }
}

/// `--tmpfs PATH[:OPTIONS]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Where it is mounted.
    pub path: String,
    /// Mount options, like `size=64m`.
    pub options: Vec<String>,
}

/// `--ulimit NAME=SOFT[:HARD]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// As in `setrlimit(2)`: `RLIMIT_NOFILE`.
    pub name: String,
    /// The soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// The hard limit.
    pub hard: u64,
}

/// Names of the resource limits that a container can be given, without `RLIMIT_`.
const LIMITS: [&str; 15] = [
    "CORE",
    "CPU",
    "DATA",
    "FSIZE",
    "LOCKS",
    "MEMLOCK",
    "MSGQUEUE",
    "NICE",
    "NOFILE",
    "NPROC",
    "RSS",
    "RTPRIO",
    "RTTIME",
    "SIGPENDING",
    "STACK",
];

impl Tmpfs {
    /// Parses `PATH[:OPTIONS]`.
    ///
    /// # Errors
    /// The path is not absolute.
    pub fn parse(text: &str) -> Result<Self> {
        let (path, options) = text.split_once(':').unwrap_or((text, ""));
        if !path.starts_with('/') {
            return Err(Error::Usage(format!("--tmpfs {text}: {path:?} is not an absolute path")));
        }
        let options = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned).collect();
        Ok(Self { path: path.to_owned(), options })
    }
}

impl Ulimit {
    /// Parses `NAME=SOFT[:HARD]`; -1 or `unlimited` is no limit.
    ///
    /// # Errors
    /// An unknown name, not a number, a soft limit over the hard one.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::Usage(format!("--ulimit {text}: {why}"));
        let (name, values) = text.split_once('=').ok_or_else(|| bad("write it as name=soft[:hard]"))?;
        let upper = name.to_ascii_uppercase();
        if !LIMITS.contains(&upper.as_str()) {
            let known = LIMITS.map(str::to_ascii_lowercase).join(", ");
            return Err(bad(&format!("{name:?} is no resource limit; there are {known}")));
        }
        let number = |value: &str| match value {
            "-1" | "unlimited" => Ok(u64::MAX),
            _ => value.parse().map_err(|_| bad(&format!("{value:?} is not a number"))),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(bad("the soft limit is over the hard one"));
        }
        Ok(Self { name: format!("RLIMIT_{upper}"), soft, hard })
    }
}

/// Parses a size as docker writes it: a number with an optional unit b, k, m, g or t (powers of 1024).
///
/// # Errors
/// Not such a size.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad =
        || Error::Usage(format!("{text:?} is not a size: write a number with b, k, m, g or t, like 512m"));
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower.get(digits.len()..).unwrap_or_default() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let value: f64 = digits.parse().map_err(|_| bad())?;
    let bytes = value * f64::from(1u32 << shift.min(30)) * if shift == 40 { 1024.0 } else { 1.0 };
    if (0.0..9e18).contains(&bytes) && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // range checked above
        return Ok(bytes as u64);
    }
    Err(bad())
}

/// Parses a number of CPUs like `1.5` to thousandths.
///
/// # Errors
/// Not a positive number with at most three decimals, or more than 32.
pub fn parse_cpus(text: &str) -> Result<u64> {
    let bad = || Error::Usage(format!("--cpus {text}: write a number between 0.01 and 32, like 1.5"));
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 3 || (whole.is_empty() && part.is_empty()) {
        return Err(bad());
    }
    let number =
        |digits: &str| if digits.is_empty() { Ok(0) } else { digits.parse::<u64>().map_err(|_| bad()) };
    let milli = number(whole)?.checked_mul(1000).ok_or_else(bad)? + number(&format!("{part:0<3}"))?;
    if (10..=32_000).contains(&milli) { Ok(milli) } else { Err(bad()) }
}

/// Parses a signal: a number, `TERM` or `SIGTERM`.
///
/// # Errors
/// No such signal.
pub fn parse_signal(text: &str) -> Result<u32> {
    const NAMES: [(&str, u32); 31] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("STKFLT", 16),
        ("CHLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("TTIN", 21),
        ("TTOU", 22),
        ("URG", 23),
        ("XCPU", 24),
        ("XFSZ", 25),
        ("VTALRM", 26),
        ("PROF", 27),
        ("WINCH", 28),
        ("IO", 29),
        ("PWR", 30),
        ("SYS", 31),
    ];
    let bad =
        || Error::Usage(format!("{text:?} is not a signal: write a name like TERM or a number from 1 to 64"));
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(bad()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let realtime = |prefix: &str, base: i64, sign: i64| {
        let offset: i64 = name.strip_prefix(prefix)?.parse().ok()?;
        u32::try_from(base + sign * offset).ok().filter(|number| (34..=64).contains(number))
    };
    match name {
        "RTMIN" => Ok(34),
        "RTMAX" => Ok(64),
        _ => realtime("RTMIN+", 34, 1).or_else(|| realtime("RTMAX-", 64, -1)).ok_or_else(bad),
    }
}

/// Parses `name=value` for `--sysctl`.
///
/// # Errors
/// No `=`, or a name that is none.
pub fn parse_sysctl(text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((name, value))
            if !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b))
                && !name.contains("..") =>
        {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(Error::Usage(format!(
            "--sysctl {text}: write it as name=value, like net.core.somaxconn=1024"
        ))),
    }
}

/// Normalises a capability's name to `CAP_…` in upper case.
///
/// # Errors
/// No such capability.
pub fn parse_capability(text: &str) -> Result<String> {
    let upper = text.to_ascii_uppercase();
    if upper == "ALL" {
        return Ok(upper);
    }
    let name = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    if crate::spec::ALL_CAPABILITIES.contains(&name.as_str()) {
        Ok(name)
    } else {
        Err(Error::Usage(format!("{text:?} is not a capability; see capabilities(7), or write ALL")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512m", 512 << 20),
            ("1g", 1 << 30),
            ("1.5G", 3 << 29),
            ("64KiB", 64 << 10),
            ("7b", 7),
            ("2t", 2 << 40),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "m", "-1", "1x", "1e3", "99999999999999999999", "17179869184g", "inf", "nan"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn cpus() {
        for (text, milli) in [("1", 1000), ("1.5", 1500), (".25", 250), ("0.01", 10), ("32", 32_000)] {
            assert_eq!(parse_cpus(text).unwrap(), milli, "{text}");
        }
        for bad in ["", "0", "33", "-1", "1.2345", "x", "."] {
            assert!(parse_cpus(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn signals() {
        for (text, number) in [("9", 9), ("TERM", 15), ("sigint", 2), ("RTMIN+3", 37), ("SIGRTMAX-1", 63)] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for bad in ["", "0", "65", "SIGFOO", "RTMIN+99"] {
            assert!(parse_signal(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ulimits() {
        let limit = Ulimit::parse("nofile=1024:2048").unwrap();
        assert_eq!(limit, Ulimit { name: "RLIMIT_NOFILE".into(), soft: 1024, hard: 2048 });
        assert_eq!(Ulimit::parse("core=-1").unwrap().hard, u64::MAX);
        for bad in ["nofile", "nofile=x", "files=1", "nofile=2:1"] {
            assert!(Ulimit::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn capabilities() {
        assert_eq!(parse_capability("net_admin").unwrap(), "CAP_NET_ADMIN");
        assert_eq!(parse_capability("all").unwrap(), "ALL");
        assert!(parse_capability("CAP_FLY").is_err());
    }

    #[test]
    fn security_options_are_dockers() {
        let all = |texts: &[&str]| -> Result<Security> {
            texts.iter().map(|text| SecurityOption::parse(text)).collect()
        };
        assert_eq!(all(&[]).unwrap(), Security::default());
        let given =
            all(&["seccomp=unconfined", "no-new-privileges", "systempaths=unconfined", "label=disable"])
                .unwrap();
        assert_eq!(
            given,
            Security { seccomp: Seccomp::Unconfined, no_new_privileges: true, system_paths: true }
        );
        assert!(!all(&["no-new-privileges:true", "no-new-privileges=false"]).unwrap().no_new_privileges);
        assert_eq!(all(&["seccomp:unconfined", "seccomp=builtin"]).unwrap(), Security::default());
        for bad in [
            "seccomp",
            "no-new-privileges=x",
            "apparmor=docker-default",
            "label=user:x",
            "x=y",
            "",
            "seccomp=/no/such",
        ] {
            let error = all(&[bad]).unwrap_err().to_string();
            assert!(error.contains("--security-opt"), "{bad}: {error}");
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC{0,20}") {
            let _ = (parse_size(&text), parse_cpus(&text), parse_signal(&text), parse_sysctl(&text), Ulimit::parse(&text),
                     Tmpfs::parse(&text), parse_capability(&text));
            let _ = (SecurityOption::parse(&text), SecurityOption::parse(&format!("label={text}")));
        }
    }
}
