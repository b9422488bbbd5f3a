//! Disks of the machine that a container has as devices. The configuration knows them by the numbers that they have on the
//! host; here they have others.

use std::collections::BTreeMap;

use super::spec::Spec;
use crate::error::{Context, Error, Result};

/// Gives devices that are disks of this machine, and the rules about them, the numbers that they have here.
///
/// # Errors
/// The machine has no such disk.
pub fn renumber(spec: &mut Spec) -> Result<()> {
    renumber_by(spec, |disk| {
        let about = rustix::fs::stat(disk).context(|| format!("find the disk {disk}"))?;
        Ok((rustix::fs::major(about.st_rdev), rustix::fs::minor(about.st_rdev)))
    })
}

fn renumber_by(spec: &mut Spec, numbers: impl Fn(&str) -> Result<(u32, u32)>) -> Result<()> {
    let mut known = BTreeMap::new();
    for device in &mut spec.linux.devices {
        let Some(disk) = &device.disk else { continue };
        if disk.strip_prefix("/dev/vd").is_none_or(|letter| letter.len() != 1) {
            return Err(Error::invalid(format!("linux.devices {}: {disk:?} is no disk", device.path)));
        }
        let here = numbers(disk)?;
        known.insert((i64::from(device.major), i64::from(device.minor)), here);
        (device.major, device.minor) = here;
    }
    // Each rule once: the numbers of one disk here may be those of another on the host.
    for rule in spec.linux.resources.devices.iter_mut().flatten().filter(|rule| rule.kind == "b") {
        let (Some(major), Some(minor)) = (rule.major, rule.minor) else { continue };
        if let Some((major, minor)) = known.get(&(major, minor)) {
            (rule.major, rule.minor) = (Some((*major).into()), Some((*minor).into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_their_rules_get_the_numbers_of_this_machine() {
        let text = r#"{"linux":{"devices":[
            {"path":"/dev/a","type":"b","major":7,"minor":0,"disk":"/dev/vdb"},
            {"path":"/dev/b","type":"b","major":8,"minor":16,"disk":"/dev/vdc"},
            {"path":"/dev/fuse","type":"c","major":10,"minor":229}],
            "resources":{"devices":[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"b","major":7,"minor":0,"access":"rw"},
            {"allow":true,"type":"b","major":8,"minor":16,"access":"r"},
            {"allow":true,"type":"c","major":7,"minor":0,"access":"r"}]}}}"#;
        let mut spec: Spec = serde_json::from_str(text).unwrap();
        // The first one's here are the second one's there.
        let numbers = |disk: &str| Ok(if disk == "/dev/vdb" { (8, 16) } else { (254, 32) });
        renumber_by(&mut spec, numbers).unwrap();
        let devices: Vec<_> = spec.linux.devices.iter().map(|device| (device.major, device.minor)).collect();
        assert_eq!(devices, [(8, 16), (254, 32), (10, 229)]);
        let rules = spec.linux.resources.devices.unwrap();
        let rules: Vec<_> = rules.iter().map(|rule| (rule.major, rule.minor)).collect();
        assert_eq!(rules, [(None, None), (Some(8), Some(16)), (Some(254), Some(32)), (Some(7), Some(0))]);
        let bad = text.replace("/dev/vdc", "/dev/vd/../mem");
        assert!(renumber_by(&mut serde_json::from_str(&bad).unwrap(), numbers).is_err());
    }
}
