use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::rules::matches;
use super::*;
use crate::options::Security;

fn policy(text: &str) -> Policy {
    Policy { file: "/etc/bulkhead/policy.toml".into(), rules: settings::parse_toml(text).unwrap() }
}

fn refused(result: Result<()>, rule: &str) {
    let text = result.unwrap_err().to_string();
    assert!(text.contains(rule) && text.contains("/etc/bulkhead/policy.toml"), "{text}");
}

#[test]
fn images_are_known_by_name_and_digest() {
    let id = format!("sha256:{}", "a".repeat(64));
    let names = |name: &str| vec![name.to_owned(), id.clone()];
    let rules = policy(
        "[images]\nallow = ['docker.io/library/*', 'registry.example.org/team/*:v*']\ndeny = ['*:latest']",
    );
    rules.image(&names("docker.io/library/busybox:1")).unwrap();
    rules.image(&names("registry.example.org/team/app:v2")).unwrap();
    refused(rules.image(&names("docker.io/library/busybox:latest")), "images.deny = \"*:latest\"");
    refused(rules.image(&names("docker.io/else/busybox:1")), "images.allow");
    refused(policy("[images]\nallow = []").image(&names("x")), "images.allow");
    policy(&format!("[images]\nallow = ['{id}']")).image(&names("x")).unwrap();
    policy("").image(&[]).unwrap();
}

#[test]
fn engines_may_have_to_say_what_they_run() {
    let rules = |engines: &str| policy(&format!("[images]\nallow = ['good:*']\nengines = '{engines}'"));
    policy("").engines_image(None).unwrap();
    rules("any").engines_image(None).unwrap();
    refused(rules("any").engines_image(Some("bad:1")), "images.allow");
    rules("named").engines_image(Some("good:1")).unwrap();
    refused(rules("named").engines_image(None), "images.engines = \"named\"");
    refused(rules("named").engines_image(Some("bad:1")), "images.allow");
    refused(rules("none").engines_image(Some("good:1")), "images.engines = \"none\"");
    settings::parse_toml::<Rules>("[images]\nengines = 'some'").unwrap_err();
}

#[test]
fn paths_count_with_what_lies_below_and_above() {
    let rules =
        policy("[mounts]\nallow = ['/srv', '/home']\ndeny = ['/srv/secret']\nread_only = ['/home/data']");
    let (read, write) = (Access::ReadOnly, Access::ReadWrite);
    rules.host_path(Path::new("/srv/a"), write).unwrap();
    rules.host_path(Path::new("/home/data/x"), read).unwrap();
    for (path, access, rule) in [
        ("/etc", read, "mounts.allow"),
        ("/srvx", read, "mounts.allow"),
        ("/srv/secret/key", read, "mounts.deny = \"/srv/secret\""),
        ("/srv", read, "mounts.deny"),
        ("/", read, "mounts.deny"),
        ("/home/data", write, "mounts.read_only"),
        ("/home", write, "mounts.read_only"),
    ] {
        refused(rules.host_path(Path::new(path), access), rule);
    }
    policy("").host_path(Path::new("/"), write).unwrap();
}

#[test]
fn privileges_and_sizes_have_bounds() {
    let rules = policy(
        "[containers]\nprivileged = false\ncap_add = ['net_admin']\nseccomp_unconfined = false\n\
         [limits]\nmemory = '1g'\nvcpus = 2\nstorage = '1g'",
    );
    let options = |cap: &str| RunOptions { cap_add: vec![cap.into()], ..RunOptions::default() };
    rules.wishes(&options("CAP_NET_ADMIN"), 1 << 30).unwrap();
    refused(rules.wishes(&options("CAP_SYS_ADMIN"), 0), "containers.cap_add");
    refused(rules.wishes(&options("ALL"), 0), "containers.cap_add");
    refused(rules.wishes(&RunOptions::default(), (1 << 30) + 1), "limits.storage");
    refused(
        rules.wishes(&RunOptions { privileged: true, ..RunOptions::default() }, 0),
        "containers.privileged",
    );
    let security = Security { seccomp: Seccomp::Unconfined, ..Security::default() };
    refused(
        rules.wishes(&RunOptions { security, ..RunOptions::default() }, 0),
        "containers.seccomp_unconfined",
    );
    rules.machine(1024, 2).unwrap();
    refused(rules.machine(1025, 1), "limits.memory");
    refused(rules.machine(512, 3), "limits.vcpus = 2");
    let allowed = format!("sha256:{}", "0".repeat(64));
    let kernels = policy(&format!("[kernels]\nallow = ['{allowed}']"));
    kernels.kernel(Path::new("/k"), &allowed).unwrap();
    refused(kernels.kernel(Path::new("/k"), "sha256:1"), "kernels.allow");
}

#[test]
fn a_policy_that_cannot_be_followed_forbids_everything() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("policy.toml");
    assert!(Policy::read(&path).is_ok(), "no file is no policy");
    for (text, words) in [
        ("[images", "policy.toml:1: "),
        ("[images]\nallowed = []", "policy.toml:2: `allowed = []`"),
        ("[mounts]\ndeny = ['relative']", "not an absolute path"),
        ("[mounts]\ndeny = ['/a/../b']", "not an absolute path"),
        ("[kernels]\nallow = ['sha256:12']", "64 hexadecimal digits"),
        ("[containers]\ncap_add = ['fly']", "not a capability"),
        ("[limits]\nmemory = 5", "policy.toml:2"),
    ] {
        std::fs::write(&path, text).unwrap();
        let owned = rustix::process::geteuid().is_root();
        let why = Policy::read(&path).unwrap_err();
        assert!(why.contains("nothing is started") && (!owned || why.contains(words)), "{text}: {why}");
    }
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    assert!(Policy::read(&path).unwrap_err().contains("others than root may write"));
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(Policy::read(&path).is_err());
}

proptest! {
    #[test]
    fn a_pattern_matches_what_it_was_made_of(parts in prop::collection::vec("[a-c/]{0,3}", 1..5), fill in prop::collection::vec("[a-c/]{0,3}", 5)) {
        let pattern = parts.join("*");
        let mut name = String::new();
        for (index, part) in parts.iter().enumerate() {
            if index > 0 { name.push_str(&fill[index]); }
            name.push_str(part);
        }
        let (longer, other) = (format!("{name}d"), format!("d{pattern}"));
        prop_assert!(matches(&pattern, &name), "{} {}", pattern, name);
        prop_assert!(parts.len() > 1 || !matches(&pattern, &longer));
        prop_assert!(!matches(&other, &name));
    }
}
