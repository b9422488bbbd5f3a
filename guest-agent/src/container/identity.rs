//! Who a process is: its user, found by number or in the container's own /etc/passwd and /etc/group.

use std::fs;

use rustix::fs::{Gid, Uid};

use super::spec::User;
use crate::error::{Context, Error, Result};

/// A longer passwd or group file is not read to its end: the image chose its size.
const MAX_FILE: u64 = 4 << 20;

/// A user as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, for `$HOME`.
    pub home: String,
}

impl Identity {
    /// Finds the user in the current root.
    ///
    /// # Errors
    /// `NOT_FOUND`: a name that the container does not know.
    pub fn resolve(user: &User) -> Result<Self> {
        let passwd = read("/etc/passwd");
        if user.username.is_empty() {
            let home = home_of(&passwd, user.uid);
            return Ok(Self { uid: user.uid, gid: user.gid, groups: user.additional_gids.clone(), home });
        }
        Self::lookup(&user.username, &user.additional_gids, &passwd, &read("/etc/group"))
    }

    /// Docker's `user[:group]`: names or numbers; a number need not be listed.
    fn lookup(text: &str, additional: &[u32], passwd: &str, group: &str) -> Result<Self> {
        let (user, wanted_group) =
            text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let number = user.parse::<u32>().ok();
        let by_name = lines(passwd).find(|f| f.first() == Some(&user));
        let entry = by_name.or_else(|| lines(passwd).find(|f| number.is_some() && field(f, 2) == number));
        let uid = match (&entry, number) {
            (Some(entry), _) => field(entry, 2),
            (None, number) => number,
        };
        let uid = uid.ok_or_else(|| {
            Error::not_found(format!("unable to find user {user}: no matching entries in passwd file"))
        })?;
        let name = entry.as_ref().and_then(|entry| entry.first().copied());
        let mut gid = entry.as_ref().and_then(|entry| field(entry, 3)).unwrap_or(0);
        let mut groups = additional.to_vec();
        if let Some(wanted) = wanted_group.filter(|group| !group.is_empty()) {
            let listed = lines(group).find(|f| f.first() == Some(&wanted)).and_then(|f| field(&f, 2));
            gid = listed.or_else(|| wanted.parse().ok()).ok_or_else(|| {
                Error::not_found(format!("unable to find group {wanted}: no matching entries in group file"))
            })?;
        } else if let Some(name) = name {
            let member =
                |f: &Vec<&str>| f.get(3).is_some_and(|members| members.split(',').any(|m| m == name));
            groups.extend(lines(group).filter(member).filter_map(|f| field(&f, 2)));
        }
        Ok(Self { uid, gid, groups, home: home_of(passwd, uid) })
    }

    /// Becomes this user. Capabilities of the permitted set survive until they are set anew.
    ///
    /// # Errors
    /// An id that the user namespace does not map.
    pub fn assume(&self) -> Result<()> {
        let groups: Vec<_> = self.groups.iter().map(|&gid| gid_of(gid)).collect::<Result<_>>()?;
        rustix::thread::set_thread_groups(&groups).context(|| format!("set groups {:?}", self.groups))?;
        let (uid, gid) = (uid_of(self.uid)?, gid_of(self.gid)?);
        rustix::thread::set_thread_res_gid(gid, gid, gid).context(|| format!("become group {}", self.gid))?;
        rustix::thread::set_keep_capabilities(true).context(|| "keep capabilities")?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).context(|| format!("become user {}", self.uid))?;
        rustix::thread::set_keep_capabilities(false).context(|| "stop keeping capabilities")
    }
}

fn uid_of(uid: u32) -> Result<Uid> {
    if uid == u32::MAX { Err(Error::invalid("uid 4294967295 is reserved")) } else { Ok(Uid::from_raw(uid)) }
}

fn gid_of(gid: u32) -> Result<Gid> {
    if gid == u32::MAX { Err(Error::invalid("gid 4294967295 is reserved")) } else { Ok(Gid::from_raw(gid)) }
}

fn read(path: &str) -> String {
    use std::io::Read;
    let mut text = Vec::new();
    if let Ok(file) = fs::File::open(path)
        && file.metadata().is_ok_and(|meta| meta.is_file())
    {
        let _ = file.take(MAX_FILE).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.trim().split(':').collect())
}

fn field(fields: &[&str], index: usize) -> Option<u32> {
    fields.get(index)?.parse().ok()
}

fn home_of(passwd: &str, uid: u32) -> String {
    let entry = lines(passwd).find(|f| field(f, 2) == Some(uid));
    let home = entry.and_then(|f| f.get(5).map(|&home| home.to_owned()));
    home.filter(|home| home.starts_with('/')).unwrap_or_else(|| "/".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nredis:x:101:102::/var/lib/redis:/bin/false\nbad\n";
    const GROUP: &str = "root:x:0:\nredis:x:102:\nssl:x:110:www,redis\nwheel:x:10:root\n";

    #[test]
    fn finds_users_as_docker_does() {
        let find = |text| Identity::lookup(text, &[7], PASSWD, GROUP);
        let redis = Identity { uid: 101, gid: 102, groups: vec![7, 110], home: "/var/lib/redis".into() };
        assert_eq!(find("redis").unwrap(), redis);
        assert_eq!(find("101").unwrap(), redis);
        assert_eq!(find("redis:wheel").unwrap(), Identity { gid: 10, groups: vec![7], ..redis.clone() });
        assert_eq!(
            find("4242:4343").unwrap(),
            Identity { uid: 4242, gid: 4343, groups: vec![7], home: "/".into() }
        );
        assert_eq!(find("4242").unwrap().gid, 0);
        assert!(find("nobody").unwrap_err().message.contains("no matching entries in passwd file"));
        assert!(find("redis:nope").unwrap_err().message.contains("no matching entries in group file"));
    }

    proptest! {
        #[test]
        fn noise_never_panics(user in ".{0,20}", passwd in "[a-z0-9:\n]{0,80}", group in "[a-z0-9:,\n]{0,80}") {
            let _ = Identity::lookup(&user, &[], &passwd, &group);
        }
    }
}
