//! Pulling from Debian's `docker-registry` on loopback.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]
#![cfg(feature = "pull")]

mod common;

use std::fs;
use std::io::{self, Read as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_image::progress::Silent;
use bulkhead_image::{Digest, Error, LoadedImage, PullOptions, Store};
use common::{Layer, TestImage, descriptor, files, noise, sample};
use serde_json::json;

struct Registry {
    child: Child,
    address: SocketAddr,
    data: PathBuf,
    scratch: tempfile::TempDir,
}

impl Registry {
    /// None where the program is not installed.
    fn start(auth: bool) -> Option<Self> {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        // A port that was free a moment ago.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = json!({"version": 0.1, "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": data}}, "http": {"addr": address.to_string()}});
        if auth {
            let users = scratch.path().join("users");
            // The password is U*U, a published test vector of bcrypt.
            fs::write(&users, "tester:$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\n")
                .unwrap();
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": users}});
        }
        let path = scratch.path().join("config.yml");
        // JSON is YAML.
        fs::write(&path, config.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                eprintln!("SKIPPED: docker-registry: {error} (apt-get install docker-registry)");
                return None;
            }
        };
        let registry = Self { child, address, data, scratch };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.data.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    fn put_blob(&self, repository: &str, kind: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        write(&self.blob_path(&digest), bytes);
        let link =
            format!("docker/registry/v2/repositories/{repository}/{kind}/sha256/{}/link", digest.hex());
        write(&self.data.join(link), digest.to_string().as_bytes());
        digest
    }

    fn put_manifest(&self, repository: &str, tag: Option<&str>, bytes: &[u8]) -> Digest {
        let digest = self.put_blob(repository, "_manifests/revisions", bytes);
        if let Some(tag) = tag {
            let tags = format!("docker/registry/v2/repositories/{repository}/_manifests/tags/{tag}");
            write(&self.data.join(format!("{tags}/current/link")), digest.to_string().as_bytes());
            let index = format!("{tags}/index/sha256/{}/link", digest.hex());
            write(&self.data.join(index), digest.to_string().as_bytes());
        }
        digest
    }

    /// Puts an image where `docker push` would have.
    fn put(&self, repository: &str, tag: Option<&str>, image: &TestImage) -> Digest {
        for blob in image.blobs.iter().chain([&image.config]) {
            self.put_blob(repository, "_layers", blob);
        }
        self.put_manifest(repository, tag, &image.manifest())
    }

    fn store(&self) -> (PathBuf, Store) {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let root = self.scratch.path().join(format!("store-{}", COUNTER.fetch_add(1, Ordering::Relaxed)));
        let store = Store::open(&root).unwrap();
        (root, store)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn pull(store: &Store, reference: &str) -> Result<LoadedImage, Error> {
    // No credentials of whoever runs the test.
    let options = PullOptions { auth_file: Some(empty_auth()), ..PullOptions::default() };
    store.pull(reference, &options, &Silent)
}

fn empty_auth() -> PathBuf {
    let path = std::env::temp_dir().join(format!("bulkhead-test-auth-{}.json", std::process::id()));
    fs::write(&path, "{}").unwrap();
    path
}

/// Passes connections on, cutting each after some bytes of answer.
fn cutting_proxy(to: SocketAddr, budget: u64) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&connections);
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            counter.fetch_add(1, Ordering::Relaxed);
            let Ok(server) = TcpStream::connect(to) else { continue };
            let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || {
                let _ = io::copy(&mut from_client, &mut to_server);
                let _ = to_server.shutdown(Shutdown::Write);
            });
            thread::spawn(move || {
                let _ = io::copy(&mut server.take(budget), &mut &client);
                let _ = client.shutdown(Shutdown::Both);
            });
        }
    });
    (address, connections)
}

#[test]
fn an_image_is_pulled_by_tag_and_by_digest() {
    let Some(registry) = Registry::start(false) else { return };
    let image = sample();
    let digest = registry.put("team/sample", Some("1"), &image);
    let (_, store) = registry.store();
    let name = format!("localhost:{}/team/sample", registry.address.port());
    let pulled = pull(&store, &format!("{name}:1")).unwrap();
    assert_eq!((pulled.id, pulled.new_layers), (image.id(), 3));
    for name in [format!("{name}:1"), format!("{name}@{digest}"), image.id().short()] {
        assert_eq!(store.resolve(&name).unwrap().id, image.id(), "{name}");
    }
    assert_eq!(store.inspect(&format!("{name}:1")).unwrap().manifest, Some(digest));
    assert_eq!(pull(&store, &format!("{name}:1")).unwrap().new_layers, 0);
    let (_, other) = registry.store();
    assert_eq!(pull(&other, &format!("{name}@{digest}")).unwrap().id, image.id());
    // A pulled and a loaded layer are the same file.
    let (a, b) = (store.resolve(&image.id().hex()).unwrap(), other.resolve(&image.id().hex()).unwrap());
    assert_eq!(fs::read(&a.layers[0]).unwrap(), fs::read(&b.layers[0]).unwrap());
    // The name with the digest goes with the last tag.
    store.remove(&format!("{name}:1"), false, &|_| false).unwrap();
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn the_platform_is_chosen_from_an_index() {
    let Some(registry) = Registry::start(false) else { return };
    let image = sample();
    registry.put("multi", None, &image);
    let mut amd64 = descriptor("application/vnd.oci.image.manifest.v1+json", &image.manifest());
    amd64["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut arm64 = descriptor("application/vnd.oci.image.manifest.v1+json", b"never fetched");
    arm64["platform"] = json!({"os": "linux", "architecture": "arm64", "variant": "v8"});
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [arm64, amd64]});
    registry.put_manifest("multi", Some("latest"), index.to_string().as_bytes());
    let (_, store) = registry.store();
    let name = format!("{}/multi", registry.address);
    let options = |platform: &str| PullOptions {
        platform: platform.parse().unwrap(),
        auth_file: Some(empty_auth()),
        ..PullOptions::default()
    };
    assert_eq!(store.pull(&name, &options("linux/amd64"), &Silent).unwrap().id, image.id());
    let error = store.pull(&name, &options("linux/s390x"), &Silent).unwrap_err().to_string();
    assert!(error.contains("linux/arm64/v8, linux/amd64"), "{error}");
}

#[test]
fn failures_say_what_to_do_and_leave_nothing() {
    let Some(registry) = Registry::start(false) else { return };
    let image = sample();
    registry.put("sample", Some("1"), &image);
    let (root, store) = registry.store();
    let fails = |reference: &str, expected: &str| {
        let error = pull(&store, reference).unwrap_err().to_string();
        assert!(error.contains(expected), "{reference}: {error}");
        assert_eq!(files(&root), Vec::<String>::new(), "{reference}");
    };
    let name = format!("{}/sample", registry.address);
    fails(&format!("{name}:2"), "no such image or tag");
    fails(&format!("{}/absent", registry.address), "no such image or tag");
    fails(&format!("{name}@{}", Digest::of(b"nothing")), "no such image or tag");
    fails("127.0.0.1:1/sample", "nothing listens at 127.0.0.1:1");
    fails("NOT A NAME", "is not an image name");

    fails("registry.invalid/sample", "cannot be resolved");

    // A blob and then a manifest that are not what their digests say.
    for (blob, what) in
        [(&image.blobs[1], "layer blob"), (&image.config, "configuration"), (&image.manifest(), "")]
    {
        let digest = Digest::of(blob);
        let mut damaged = blob.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        write(&registry.blob_path(&digest), &damaged);
        fails(&format!("{name}:1"), &format!("{what} {digest}"));
        write(&registry.blob_path(&digest), blob);
    }
    fs::remove_file(registry.blob_path(&Digest::of(&image.blobs[0]))).unwrap();
    fails(&format!("{name}:1"), "fetch a blob");
}

#[test]
fn credentials_are_used() {
    let Some(registry) = Registry::start(true) else { return };
    registry.put("secret", Some("1"), &sample());
    let (root, store) = registry.store();
    let name = format!("{}/secret:1", registry.address);
    let error = pull(&store, &name).unwrap_err().to_string();
    assert!(error.contains("wants credentials"), "{error}");
    let with = |password: &str| PullOptions {
        credentials: Some(("tester".to_owned(), password.to_owned())),
        ..PullOptions::default()
    };
    let error = store.pull(&name, &with("wrong"), &Silent).unwrap_err().to_string();
    assert!(error.contains("does not accept the credentials"), "{error}");
    assert_eq!(files(&root), Vec::<String>::new());
    store.pull(&name, &with("U*U"), &Silent).unwrap();

    let auth_file = registry.scratch.path().join("auth.json");
    let auth = json!({"auths": {registry.address.to_string(): {"auth": "dGVzdGVyOlUqVQ=="}}});
    fs::write(&auth_file, auth.to_string()).unwrap();
    let (_, store) = registry.store();
    let options = PullOptions { auth_file: Some(auth_file), ..PullOptions::default() };
    store.pull(&name, &options, &Silent).unwrap();
}

#[test]
fn broken_connections_are_resumed() {
    let Some(registry) = Registry::start(false) else { return };
    let layers = ["a", "b"].map(|name| Layer::new().file(name, &noise(400_000)).tar());
    let image = TestImage::new("flaky", layers.to_vec(), json!({}));
    registry.put("flaky", Some("1"), &image);
    let (address, connections) = cutting_proxy(registry.address, 100_000);
    let (_, store) = registry.store();
    assert_eq!(pull(&store, &format!("{address}/flaky:1")).unwrap().id, image.id());
    let connections = connections.load(Ordering::Relaxed);
    assert!(
        (8..40).contains(&connections),
        "{connections} connections: from where it was, not from the start"
    );
}

#[test]
fn a_registry_that_dies_is_an_error_and_leaves_nothing() {
    let Some(mut registry) = Registry::start(false) else { return };
    let layers = ["a", "b"].map(|name| Layer::new().file(name, &noise(3_000_000)).tar());
    let image = TestImage::new("dying", layers.to_vec(), json!({}));
    registry.put("dying", Some("1"), &image);
    let (address, connections) = cutting_proxy(registry.address, 200_000);
    let (root, store) = registry.store();
    let error = thread::scope(|scope| {
        let result = scope.spawn(|| pull(&store, &format!("{address}/dying:1")));
        while connections.load(Ordering::Relaxed) < 4 {
            thread::sleep(Duration::from_millis(5));
        }
        registry.child.kill().unwrap();
        result.join().unwrap().unwrap_err().to_string()
    });
    assert!(error.contains("broke off after"), "{error}");
    assert_eq!(files(&root), Vec::<String>::new());
}
