//! The five capability sets.

use rustix::thread::{CapabilitySet, CapabilitySets};

use super::spec::Capabilities;
use crate::error::{Context, Error, Result};

/// CAP_CHECKPOINT_RESTORE, the last one that Linux 6.12 knows.
const LAST: u32 = 40;

/// The sets of a process, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sets {
    bounding: CapabilitySet,
    ambient: CapabilitySet,
    sets: CapabilitySets,
}

impl Sets {
    /// Reads `process.capabilities`.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a name that does not exist.
    pub fn from_spec(spec: &Capabilities) -> Result<Self> {
        Ok(Self {
            bounding: parse(&spec.bounding)?,
            ambient: parse(&spec.ambient)?,
            sets: CapabilitySets {
                effective: parse(&spec.effective)?,
                permitted: parse(&spec.permitted)?,
                inheritable: parse(&spec.inheritable)?,
            },
        })
    }

    /// Drops what is not in the bounding set; needs the privilege that [`Self::apply`] takes away.
    ///
    /// # Errors
    /// What prctl says.
    pub fn limit_bounding(&self) -> Result<()> {
        for number in 0..=LAST {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if !self.bounding.contains(capability) {
                rustix::thread::remove_capability_from_bounding_set(capability)
                    .context(|| "drop a capability from the bounding set")?;
            }
        }
        Ok(())
    }

    /// Sets the other four, after the change of user. An ambient capability that is not both permitted and inheritable
    /// cannot be raised, and is left out as runc does: buildah asks for such.
    ///
    /// # Errors
    /// What capset says: more than the bounding set allows, for one.
    pub fn apply(&self) -> Result<()> {
        rustix::thread::set_capabilities(None, self.sets).context(|| "set capabilities")?;
        for capability in self.raisable().iter() {
            rustix::thread::configure_capability_in_ambient_set(capability, true)
                .context(|| "raise an ambient capability")?;
        }
        Ok(())
    }

    fn raisable(&self) -> CapabilitySet {
        self.ambient & self.sets.permitted & self.sets.inheritable
    }
}

fn parse(names: &[String]) -> Result<CapabilitySet> {
    names.iter().try_fold(CapabilitySet::empty(), |set, name| {
        let short = name.strip_prefix("CAP_").and_then(CapabilitySet::from_name);
        short.map(|one| set | one).ok_or_else(|| Error::invalid(format!("unknown capability {name:?}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_permitted_and_inheritable_becomes_ambient() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let spec = Capabilities {
            ambient: list(&["CAP_CHOWN", "CAP_KILL", "CAP_FOWNER"]),
            permitted: list(&["CAP_CHOWN", "CAP_KILL"]),
            inheritable: list(&["CAP_KILL", "CAP_FOWNER"]),
            ..Capabilities::default()
        };
        assert_eq!(Sets::from_spec(&spec).unwrap().raisable(), CapabilitySet::KILL);
    }

    #[test]
    fn names_are_the_kernels() {
        let names = ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"].map(str::to_owned);
        assert_eq!(parse(&names).unwrap().bits(), 1 | 1 << 21 | 1 << 40);
        for wrong in ["CHOWN", "CAP_", "cap_chown", "CAP_EVERYTHING"] {
            assert!(parse(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }
}
