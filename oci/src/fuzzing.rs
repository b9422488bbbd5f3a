//! What the fuzz targets in `fuzz/` need of this crate's inside. Not part of its interface.

use std::path::Path;

use bulkhead_runtime::settings::Level;
use clap::Parser;

use crate::args::Arguments;
use crate::config::Bundle;
use crate::log::Log;

/// Reads the bundle in `dir`, and makes of it what a container is made of, without touching anything.
///
/// # Errors
/// The words that its owner gets.
pub fn bundle(dir: &Path) -> Result<(), String> {
    let arguments =
        Arguments::try_parse_from(["bulkhead-oci", "state", "x"]).map_err(|error| error.to_string())?;
    let log = Log::open(&arguments.global).map_err(|error| error.chain())?.at(Level::Error);
    let bundle = Bundle::read(dir, &log).map_err(|error| error.chain())?;
    let _ = (bundle.name_server(), bundle.needs_shares(), bundle.may_be_joined(), bundle.view());
    let disks: Vec<String> = (0..bundle.disks().len()).map(|number| format!("/dev/vd{number}")).collect();
    for number in 0..disks.len() {
        let _ = bundle.name_of_disk(number);
    }
    bundle
        .share(|path, _| Ok(path.display().to_string()), &[], &disks)
        .map(drop)
        .map_err(|error| error.chain())
}
