use proptest::prelude::*;

use super::*;

const SHIPPED: &str = include_str!("../../config.toml");

/// The shipped file with its keys in force: in it `#key = value` is a key, and `# ` begins an explanation.
fn uncommented() -> String {
    let line = |line: &str| match line.strip_prefix('#') {
        Some(key) if !key.starts_with(' ') && !key.is_empty() => format!("{key}\n"),
        _ => format!("{line}\n"),
    };
    SHIPPED.lines().map(line).collect()
}

#[test]
fn the_file_that_is_installed_has_every_key_with_its_default() {
    assert_eq!(Settings::parse(SHIPPED).unwrap(), Settings::default());
    let all = uncommented();
    assert_eq!(Settings::parse(&all).unwrap(), Settings::default());
    // Not one key is left out, and each is as it is written by default.
    let told: toml::Table = toml::from_str(&all).unwrap();
    assert_eq!(serde_json::to_value(told).unwrap(), serde_json::to_value(Settings::default()).unwrap());
}

#[test]
fn what_makes_no_sense_is_told_with_line_and_key() {
    for (text, line, words) in [
        ("[machine]\nmemroy = \"1g\"\n", 2, ["memroy", "memory"]),
        ("[machin]\n", 1, ["machin", "machine"]),
        ("\n[machine]\nmemory = 5\n", 3, ["memory = 5", "string"]),
        ("[machine]\nmemory = \"5\"", 2, ["memory = \"5\"", "128m to 1t"]),
        ("[machine]\nmemory = \"much\"", 2, ["memory = \"much\"", "512m"]),
        ("[machine]\n\n\nvcpus = 33\n[run]", 4, ["vcpus = 33", "1 to 32"]),
        ("[machine]\nvcpus = -1\n", 2, ["vcpus = -1", "1 to 32"]),
        ("[machine]\nkernel = \"vmlinux\"", 2, ["kernel", "absolute"]),
        ("[machine]\nkernel_parameters = \"\\n\"", 2, ["kernel_parameters", "printable"]),
        ("[machine]\nspare_drives = 9", 2, ["spare_drives", "0 to 8"]),
        ("[machine]\nboot_timeout = 0", 2, ["boot_timeout", "1 to 3600"]),
        ("[isolation]\njail = \"maybe\"", 2, ["jail", "required"]),
        ("[isolation]\nfirst_uid = 0", 2, ["first_uid", "65536 to 2000000000"]),
        ("[isolation]\nuids = 0", 2, ["uids", "1 to 1000000"]),
        ("[run]\nstorage = \"1k\"", 2, ["storage", "4m to 16t"]),
        ("[run]\nnetwork = \"host\"", 2, ["network", "passt"]),
        ("[programs]\npasst = true", 2, ["passt", "string"]),
        ("[paths]\ndata = \"\"", 2, ["data", "absolute"]),
        (
            "[paths]\nrun = \"/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"",
            2,
            ["run", "60"],
        ),
        ("[log]\nlevel = \"loud\"", 2, ["level", "warning"]),
        ("[log\n", 1, ["[log", ""]),
        ("[log]\nlevel = \"error\"\nlevel = \"debug\"", 3, ["level", "duplicate"]),
    ] {
        let error = Settings::parse(text).unwrap_err();
        assert!(error.starts_with(&format!("{line}: ")), "{text:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{text:?}: {error}");
    }
}

#[test]
fn a_file_that_is_named_has_to_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    assert_eq!(Settings::read(&path, false).unwrap(), Settings::default());
    let error = Settings::read(&path, true).unwrap_err().chain();
    assert!(error.contains("config.toml") && error.contains(VARIABLE), "{error}");
    std::fs::write(&path, "[machine]\nvcpus = 2\n").unwrap();
    assert_eq!(Settings::read(&path, true).unwrap().machine.vcpus, 2);
    std::fs::write(&path, "[machine]\nvcpus = 0\n").unwrap();
    let error = Settings::read(&path, false).unwrap_err().chain();
    assert!(error.contains("config.toml:2: `vcpus = 0`: "), "{error}");
    std::fs::write(&path, "#".repeat(2 << 20)).unwrap();
    assert!(Settings::read(&path, false).is_err());
}

#[test]
fn of_a_broken_file_the_directories_are_known_all_the_same() {
    let good = "[paths]\nrun = \"/run/other\" # here\n";
    for broken in [
        "[machine]\nmemroy = \"1g\"\n",
        "[machine]\nvcpus = = 2\n",
        "[log\n",
        "x\n",
        "[run]\nnetwork = \"\"\"\n",
    ] {
        for text in
            [format!("{broken}{good}"), format!("{good}{broken}"), format!("{good}\n  {broken}[run] # last")]
        {
            assert!(Settings::parse(&text).is_err(), "{text}");
            // What follows without a head of its own is of the section, and may spoil it.
            if broken != "x\n" {
                assert_eq!(Settings::salvage(&text).paths.run, Path::new("/run/other"), "{text}");
            }
        }
    }
    assert_eq!(Settings::salvage("[paths]\nrun = 5\n[programs]\noci = \"/o\"").programs.oci, Path::new("/o"));
    assert_eq!(Settings::salvage("[paths]\nrun = 5\n").paths, Paths::default());
    assert_eq!(Settings::salvage("[paths]\nrun = \"/a\"\n[machine]\nvcpus = 9").machine, Machine::default());
}

proptest! {
    #[test]
    fn nothing_panics(text in "\\PC{0,40}", section in "(\\[(machine|run|log)\\])?\n", key in "[a-z]{0,8} ?=? ?") {
        let text = format!("{section}{key}{text}");
        let _ = (Settings::parse(&text), Settings::salvage(&text));
    }
}
