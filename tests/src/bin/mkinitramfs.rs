//! Writes the guest's initramfs around an agent: `mkinitramfs AGENT OUTPUT`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

/// Writes the guest's initramfs, an uncompressed cpio with AGENT as its /init.
#[derive(Parser)]
struct Arguments {
    /// The guest-agent binary
    agent: PathBuf,
    /// Where the initramfs goes; replaced whole, and only when it would change
    output: PathBuf,
}

fn main() -> Result<()> {
    let Arguments { agent, output } = Arguments::parse();
    let agent = fs::read(&agent).with_context(|| format!("read the agent {}", agent.display()))?;
    bulkhead_tests::initramfs::write_file(&agent, &output)
}
