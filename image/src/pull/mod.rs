//! Fetching images from registries.
//!
//! A blob goes from the network through the digest check, the decompressor and the converter into its EROFS file
//! without being kept in between. When a connection breaks, the download goes on from where it was.

mod auth;
mod download;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference as RemoteReference};
use oci_spec::image::Descriptor;
use tokio::runtime;

use crate::layer::{Expected, add_layer};
use crate::manifest::{Document, MAX_NESTING, Plan, PlannedLayer, choose, digest_of};
use crate::store::{LayerRecord, Lock};
use crate::{Digest, Error, LoadedImage, Platform, Progress, Reference, Result, Store};

/// Layers fetched at once.
const PARALLEL: usize = 3;

const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// How to pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// HTTP instead of HTTPS. Registries on this machine (`localhost`, `127.…`, `[::1]`) are spoken to by HTTP anyhow.
    pub plain_http: bool,
    /// Do not check the registry's certificate.
    pub insecure: bool,
    /// Which image of a multi-platform one.
    pub platform: Platform,
    /// Instead of the files that docker and podman keep credentials in.
    pub auth_file: Option<PathBuf>,
    /// User and password, instead of any file.
    pub credentials: Option<(String, String)>,
}

/// The registry and the image on it.
struct Remote {
    client: Client,
    auth: RegistryAuth,
    reference: Reference,
    plain_http: bool,
}

pub(crate) fn pull(
    store: &Store,
    reference: &str,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<LoadedImage> {
    let remote = Remote::new(Reference::parse(reference)?, options)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| remote.error("pull", format!("the network runtime cannot start: {error}")))?;
    // Whatever can be refused is refused before the store is touched.
    let plan = runtime.block_on(remote.plan(options, store.limits().layers))?;
    let lock = Lock::shared(store, progress)?;
    let result = add_layers(store, &remote, &runtime, &plan, progress)
        .and_then(|(records, fresh)| crate::load::commit(store, plan, &records, &fresh));
    // The connections' tasks are of no use any more.
    runtime.shutdown_background();
    if result.is_err() {
        crate::load::clean_up(store, &lock, progress);
    }
    result
}

/// Where systems keep the certificate authorities they trust.
fn authorities() -> impl Iterator<Item = PathBuf> {
    let named = ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let usual = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
        "/var/lib/ca-certificates/ca-bundle.pem",
    ];
    named.chain(usual.map(PathBuf::from))
}

impl Remote {
    fn new(reference: Reference, options: &PullOptions) -> Result<Self> {
        // An error means that it was installed before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain_http = options.plain_http || is_local(reference.domain());
        let config = ClientConfig {
            protocol: if plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
            accept_invalid_certificates: options.insecure,
            connect_timeout: Some(std::time::Duration::from_secs(15)),
            read_timeout: Some(std::time::Duration::from_secs(60)),
            user_agent: concat!("bulkhead/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        if !authorities().any(|path| path.exists()) {
            // The client library would panic.
            return Err(Error::Registry {
                action: "prepare to pull",
                reference: reference.to_string(),
                why: "this machine has no list of certificate authorities; install the package ca-certificates, or \
                      set SSL_CERT_FILE"
                    .into(),
            });
        }
        let auth = match auth::credentials(&reference, options)? {
            Some((user, password)) => RegistryAuth::Basic(user, password),
            None => RegistryAuth::Anonymous,
        };
        let client = Client::try_from(config).map_err(|error| Error::Registry {
            action: "prepare to pull",
            reference: reference.to_string(),
            why: chain(&error),
        })?;
        Ok(Self { client, auth, reference, plain_http })
    }

    /// Fetches manifests and configuration.
    async fn plan(&self, options: &PullOptions, max_layers: u64) -> Result<Plan> {
        let (domain, repository) =
            (self.reference.domain().to_owned(), self.reference.repository().to_owned());
        let remote = match (self.reference.digest(), self.reference.tag()) {
            (Some(digest), _) => RemoteReference::with_digest(domain, repository, digest.to_string()),
            (None, tag) => RemoteReference::with_tag(domain, repository, tag.unwrap_or("latest").to_owned()),
        };
        let (top, mut bytes) = self.manifest(&remote, self.reference.digest()).await?;
        let mut digest = top;
        for _ in 0..=MAX_NESTING {
            let what = format!("manifest {digest} of {}", self.reference);
            match Document::parse(&what, &bytes)? {
                Document::Index(index) => {
                    let chosen = choose(&self.reference.to_string(), &index, &options.platform)?;
                    // Only those without a platform can be several; the first is what others take too.
                    let inner =
                        chosen.first().ok_or_else(|| self.error("pull", "it lists no images".to_owned()))?;
                    let wanted = digest_of(inner)?;
                    (digest, bytes) = self.manifest(&self.by_digest(&wanted), Some(wanted)).await?;
                }
                Document::Manifest(manifest) => {
                    let config = self.small_blob(manifest.config()).await?;
                    let layer =
                        |layer: &Descriptor| Ok((Some(digest_of(layer)?), layer.size(), String::new()));
                    let layers = manifest.layers().iter().map(layer).collect::<Result<_>>()?;
                    let mut plan = Plan::new(
                        &self.reference.to_string(),
                        config,
                        Some((digest, bytes)),
                        layers,
                        max_layers,
                    )?;
                    if !plan.suits(&options.platform) {
                        return Err(Error::NoPlatform {
                            what: self.reference.to_string(),
                            wanted: options.platform.to_string(),
                            available: format!("{}/{}", plan.config.os, plan.config.architecture),
                        });
                    }
                    plan.names = vec![self.reference.stored_name(), self.by_digest_name(&top)];
                    return Ok(plan);
                }
            }
        }
        Err(self.error("pull", "its indexes are nested too deeply".to_owned()))
    }

    async fn manifest(&self, remote: &RemoteReference, wanted: Option<Digest>) -> Result<(Digest, Vec<u8>)> {
        let fetched = self.client.pull_manifest_raw(remote, &self.auth, &MANIFEST_TYPES).await;
        let (bytes, _) = fetched.map_err(|error| self.explain("pull", &error))?;
        let actual = Digest::of(&bytes);
        match wanted {
            Some(expected) if expected != actual => Err(Error::DigestMismatch {
                what: format!("manifest of {}", self.reference),
                expected,
                actual,
            }),
            _ => Ok((actual, bytes.to_vec())),
        }
    }

    fn by_digest(&self, digest: &Digest) -> RemoteReference {
        let (domain, repository) =
            (self.reference.domain().to_owned(), self.reference.repository().to_owned());
        RemoteReference::with_digest(domain, repository, digest.to_string())
    }

    fn by_digest_name(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.reference.domain(), self.reference.repository())
    }

    fn error(&self, action: &'static str, why: String) -> Error {
        Error::Registry { action, reference: self.reference.to_string(), why }
    }

    /// What a failure means for the person who wants the image.
    fn explain(&self, action: &'static str, error: &OciDistributionError) -> Error {
        let said = chain(error);
        let domain = self.reference.domain();
        let status = match error {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => 401,
            OciDistributionError::ImageManifestNotFoundError(_) => 404,
            OciDistributionError::ServerError { code, .. } => *code,
            OciDistributionError::RegistryError { envelope, .. } => {
                let codes = format!("{:?}", envelope.errors).to_ascii_lowercase();
                match () {
                    () if codes.contains("unauthorized") || codes.contains("denied") => 401,
                    () if codes.contains("unknown") => 404,
                    () => 0,
                }
            }
            _ => 0,
        };
        let hint = match status {
            401 | 403 => match self.auth {
                RegistryAuth::Anonymous => {
                    format!(
                        "{domain} wants credentials, or has no such image: `podman login {domain}` or `docker login {domain}` keeps them where we look"
                    )
                }
                _ => format!("{domain} does not accept the credentials that we found for it"),
            },
            404 => "there is no such image or tag".to_owned(),
            429 => "too many requests: wait, or log in".to_owned(),
            _ if said.contains("dns error") => {
                format!("the name {domain} cannot be resolved: mistyped, or no network")
            }
            _ if said.contains("refused") => format!("nothing listens at {domain}"),
            _ if !self.plain_http && said.contains("InvalidContentType") => {
                format!("{domain} does not speak TLS; --plain-http if that is meant to be so")
            }
            _ if said.contains("certificate") => {
                format!("the certificate of {domain} is not trusted; --insecure if that is meant to be so")
            }
            _ => return self.error(action, said),
        };
        self.error(action, format!("{hint} ({said})"))
    }
}

fn is_local(domain: &str) -> bool {
    let host = domain.rsplit_once(':').map_or(domain, |(host, _)| host);
    host == "localhost" || host.starts_with("127.") || host == "[::1]" || domain == "[::1]"
}

/// The whole chain of causes; the libraries' own text often leaves out the cause.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Fetches and converts what is not there yet.
fn add_layers(
    store: &Store,
    remote: &Remote,
    runtime: &runtime::Runtime,
    plan: &Plan,
    progress: &dyn Progress,
) -> Result<(BTreeMap<Digest, LayerRecord>, Vec<Digest>)> {
    let mut records = BTreeMap::new();
    let mut missing: BTreeMap<Digest, &PlannedLayer> = BTreeMap::new();
    for layer in &plan.layers {
        match store.existing_layer(&layer.diff_id)? {
            Some(record) => drop(records.insert(layer.diff_id, record)),
            None => drop(missing.insert(layer.diff_id, layer)),
        }
    }
    let fresh = missing.keys().copied().collect();
    thread::scope(|scope| {
        let jobs =
            stream::iter(missing.into_values().map(|layer| add_one(store, remote, layer, progress, scope)));
        // The first failure drops the other downloads, which ends their converters.
        runtime.block_on(jobs.buffer_unordered(PARALLEL).try_for_each(|record| {
            records.insert(record.diff_id, record);
            std::future::ready(Ok(()))
        }))
    })?;
    Ok((records, fresh))
}

/// One layer: the download here, the conversion in a thread of its own.
async fn add_one<'scope>(
    store: &'scope Store,
    remote: &Remote,
    layer: &PlannedLayer,
    progress: &'scope dyn Progress,
    scope: &'scope thread::Scope<'scope, '_>,
) -> Result<LayerRecord> {
    let blob = layer.blob.ok_or_else(|| remote.error("pull", "a layer has no digest".to_owned()))?;
    let expected = Expected { blob: Some(blob), diff_id: layer.diff_id, size: layer.size };
    let (sender, mut reader) = download::channel();
    let task = progress.start(&format!("layer {}", layer.diff_id.short()), Some(layer.size));
    let (done, finished) = tokio::sync::oneshot::channel();
    scope.spawn(move || {
        let result = add_layer(store, &mut reader, &expected, progress, task.as_ref());
        if result.is_ok() {
            task.finish("done");
        }
        // Nobody waits any more after another layer failed.
        let _ = done.send(result);
    });
    remote.send_blob(&blob, layer.size, sender).await?;
    finished
        .await
        .unwrap_or_else(|_| Err(remote.error("pull", "the converter ended without a result".to_owned())))
}
