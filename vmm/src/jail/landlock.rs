//! Landlock: no file is opened, no TCP port used, no abstract socket reached and no process outside signalled, by whatever path.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
};

/// Forbids all that the kernel's landlock knows. Descriptors that are open stay so. Answers which version that is, for people.
///
/// # Errors
/// When the kernel has none.
pub(super) fn restrict() -> io::Result<String> {
    let all = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(all))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(all)))
        .and_then(|rules| rules.scope(Scope::from_all(all)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(io::Error::other)?;
    match ruleset.ruleset {
        RulesetStatus::FullyEnforced => Ok("files, network, signals and abstract sockets".to_owned()),
        RulesetStatus::PartiallyEnforced => {
            Ok("files, and what else the kernel's version of it knows".to_owned())
        }
        RulesetStatus::NotEnforced => Err(io::Error::other("the host's kernel has none, or not enabled")),
    }
}
