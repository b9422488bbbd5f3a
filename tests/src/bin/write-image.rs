//! Writes a container image from directories, one a layer. Used by `tests/images/build`.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result};
use bulkhead_tests::oci_image::{Image, Layer, Owners};
use clap::Parser;
use serde_json::json;

/// Writes a container image, one layer per directory, as OCI layout and as `docker save` would.
#[derive(Parser)]
struct Arguments {
    /// Reference, like busybox:latest
    #[arg(long)]
    name: String,
    /// Directory of a layer, lowest first
    #[arg(long, required = true)]
    layer: Vec<PathBuf>,
    /// PATH=UID:GID, PATH without leading slash
    #[arg(long, value_parser = owner)]
    chown: Vec<(PathBuf, (u64, u64))>,
    /// KEY=VALUE
    #[arg(long)]
    env: Vec<String>,
    /// One word of the entrypoint
    #[arg(long, allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// One word of the default command
    #[arg(long, allow_hyphen_values = true)]
    cmd: Vec<String>,
    /// Working directory
    #[arg(long)]
    workdir: Option<String>,
    /// User
    #[arg(long)]
    user: Option<String>,
    /// Signal that asks it to stop
    #[arg(long)]
    stop_signal: Option<String>,
    /// Where the OCI archive goes
    #[arg(long)]
    oci: Option<PathBuf>,
    /// Where the docker archive goes
    #[arg(long)]
    docker: Option<PathBuf>,
}

fn owner(text: &str) -> Result<(PathBuf, (u64, u64)), String> {
    let parsed = text.split_once('=').and_then(|(path, ids)| {
        let (uid, gid) = ids.split_once(':')?;
        Some((PathBuf::from(path), (uid.parse().ok()?, gid.parse().ok()?)))
    });
    parsed.ok_or_else(|| format!("'{text}' is not PATH=UID:GID"))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let owners: Owners = arguments.chown.into_iter().collect();
    let layers = arguments.layer.iter().map(|dir| Layer::from_dir(dir, &owners)).collect::<Result<_>>()?;
    let mut config = json!({"Env": arguments.env});
    for (name, words) in [("Entrypoint", arguments.entrypoint), ("Cmd", arguments.cmd)] {
        if !words.is_empty() {
            config[name] = json!(words);
        }
    }
    let words =
        [("WorkingDir", arguments.workdir), ("User", arguments.user), ("StopSignal", arguments.stop_signal)];
    for (name, word) in words {
        if let Some(word) = word {
            config[name] = json!(word);
        }
    }
    let image = Image { name: arguments.name, layers, config };
    let create = |path: &PathBuf| {
        File::create(path).map(BufWriter::new).with_context(|| format!("create {}", path.display()))
    };
    if let Some(path) = &arguments.oci {
        image.write_oci(create(path)?)?;
    }
    if let Some(path) = &arguments.docker {
        image.write_docker(create(path)?)?;
    }
    Ok(())
}
