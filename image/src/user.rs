//! Who a container's process is: `user[:group]` looked up in the image's own files, as runc and docker do it.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The numbers behind a `user[:group]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups, the primary one first. Docker lists the primary one too, so that dropping
    /// supplementary groups cannot widen access (CVE-2022-36109).
    pub additional_gids: Vec<u32>,
    /// The home directory; `/` for users without an entry.
    pub home: String,
}

/// A user or group number is a non-negative `i32`, as for runc.
const MAX_NUMBER: u32 = i32::MAX as u32;

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Looks `spec` up in the text of `/etc/passwd` and `/etc/group`. An empty user is root.
///
/// # Errors
/// [`Error::NoUser`] for a name without an entry, [`Error::BadUserNumber`] for a number out of range.
pub(crate) fn resolve(spec: &str, passwd: &str, group: &str) -> Result<User> {
    let (user_part, group_part) = spec.split_once(':').unwrap_or((spec, ""));
    let user_part = if user_part.is_empty() { "0" } else { user_part };
    let number = number(user_part)?;
    let entry = passwd
        .lines()
        .filter_map(passwd_entry)
        .find(|entry| entry.name == user_part || Some(entry.uid) == number);
    let (uid, mut gid, home) = match (&entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid, entry.home),
        (None, Some(number)) => (number, 0, ""),
        (None, None) => {
            return Err(Error::NoUser { kind: "user", name: user_part.to_owned(), file: "/etc/passwd" });
        }
    };
    let mut supplementary = Vec::new();
    if !group_part.is_empty() {
        gid = resolve_group(group_part, group)?;
    } else if let Some(entry) = &entry {
        let member = |group: &Group<'_>| group.members.split(',').any(|member| member == entry.name);
        supplementary.extend(group.lines().filter_map(group_entry).filter(member).map(|group| group.gid));
    }
    let mut additional_gids = vec![gid];
    for other in supplementary {
        if !additional_gids.contains(&other) {
            additional_gids.push(other);
        }
    }
    let home = if home.is_empty() { "/" } else { home };
    Ok(User { uid, gid, additional_gids, home: home.to_owned() })
}

/// Looks one group up, by name or number, in the text of `/etc/group`.
pub(crate) fn resolve_group(spec: &str, group: &str) -> Result<u32> {
    let number = number(spec)?;
    let entry =
        group.lines().filter_map(group_entry).find(|entry| entry.name == spec || Some(entry.gid) == number);
    entry.map(|entry| entry.gid).or(number).ok_or_else(|| Error::NoUser {
        kind: "group",
        name: spec.to_owned(),
        file: "/etc/group",
    })
}

/// A number in range, none if it is a name.
fn number(text: &str) -> Result<Option<u32>> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let number = text.parse().ok().filter(|number| *number <= MAX_NUMBER);
    number.map(Some).ok_or_else(|| Error::BadUserNumber { number: text.chars().take(40).collect() })
}

fn passwd_entry(line: &str) -> Option<Passwd<'_>> {
    let mut fields = line.trim().split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let _gecos = fields.next();
    Some(Passwd { name, uid, gid, home: fields.next().unwrap_or("") })
}

fn group_entry(line: &str) -> Option<Group<'_>> {
    let mut fields = line.trim().split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    Some(Group { name, gid: fields.next()?.parse().ok()?, members: fields.next().unwrap_or("") })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken line\n\nredis:x:999:1000::/var/lib/redis:/bin/false\n\
                          bin:x:2:2:bin:/bin:/sbin/nologin\n1000:x:77:78::/odd:/bin/sh\nnohome:x:5:6\n";
    const GROUP: &str =
        "root:x:0:root\nredis:x:1000:\nadm:x:4:syslog,redis\nssl:x:101:redis\nbad\nx:y:z:redis\n";

    fn ids(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let user = resolve(spec, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.additional_gids, user.home)
    }

    #[test]
    fn names_numbers_and_groups() {
        assert_eq!(ids(""), (0, 0, vec![0], "/root".into()));
        assert_eq!(ids("redis"), (999, 1000, vec![1000, 4, 101], "/var/lib/redis".into()));
        assert_eq!(ids("999"), (999, 1000, vec![1000, 4, 101], "/var/lib/redis".into()));
        assert_eq!(ids("redis:adm"), (999, 4, vec![4], "/var/lib/redis".into()));
        assert_eq!(ids("redis:12345"), (999, 12345, vec![12345], "/var/lib/redis".into()));
        assert_eq!(ids(":adm"), (0, 4, vec![4], "/root".into()));
        assert_eq!(ids("4242"), (4242, 0, vec![0], "/".into()));
        assert_eq!(ids("4242:1000"), (4242, 1000, vec![1000], "/".into()));
        assert_eq!(ids("1000").0, 77, "a user may be called 1000");
        assert_eq!(ids("nohome").3, "/");
    }

    #[test]
    fn unknown_names_and_absurd_numbers_are_errors() {
        assert!(matches!(resolve("nobody", PASSWD, GROUP), Err(Error::NoUser { kind: "user", .. })));
        assert!(matches!(resolve("redis:nogroup", PASSWD, GROUP), Err(Error::NoUser { kind: "group", .. })));
        assert!(matches!(resolve("2147483648", PASSWD, GROUP), Err(Error::BadUserNumber { .. })));
        assert!(matches!(resolve("0:99999999999999999999", PASSWD, GROUP), Err(Error::BadUserNumber { .. })));
        assert!(matches!(resolve("-1", PASSWD, GROUP), Err(Error::NoUser { .. })));
    }

    #[test]
    fn images_without_the_files_still_have_numbers() {
        assert_eq!(resolve("", "", "").unwrap().home, "/");
        assert_eq!(resolve("5:6", "", "").unwrap().gid, 6);
    }

    proptest! {
        #[test]
        fn never_panics(spec in "\\PC{0,20}", passwd in "[a-z0-9:,\n]{0,200}", group in "[a-z0-9:,\n]{0,200}") {
            let _ = resolve(&spec, &passwd, &group);
        }
    }
}
