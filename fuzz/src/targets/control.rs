//! Lines of the control socket in both directions, and the monitor's configuration.

use vmm::config::Config;
use vmm::control::{Answer, Request};

use crate::{Target, seed};

/// See the module.
pub const REQUESTS: Target = Target {
    name: "control",
    surface: "lines of the control socket, both ways; the monitor's configuration",
    run: |data| {
        if let Ok(request) = serde_json::from_slice::<Request>(data) {
            let text = serde_json::to_vec(&request).expect("a request that cannot be written");
            assert_eq!(serde_json::from_slice::<Request>(&text).ok(), Some(request));
        }
        if let Ok(answer) = serde_json::from_slice::<Answer>(data) {
            let text = serde_json::to_vec(&answer).expect("an answer that cannot be written");
            assert!(serde_json::from_slice::<Answer>(&text).is_ok());
        }
        if let Ok(config) = serde_json::from_slice::<Config>(data)
            && config.check().is_ok()
        {
            let text = serde_json::to_vec(&config).expect("a configuration that cannot be written");
            assert_eq!(serde_json::from_slice::<Config>(&text).ok(), Some(config));
        }
    },
    seeds: || {
        vec![
            seed("status", br#"{"id":1,"method":"status"}"#),
            seed("snapshot", br#"{"id":2,"method":{"snapshot":{"directory":"/d","disks":["a"],"durable":true}}}"#),
            seed("insert", br#"{"id":3,"method":{"insert-disk":{"layers":["/a","/b"]}}}"#),
            seed("eject", br#"{"id":4,"method":{"eject-disk":{"drive":"a","insertion":5,"retire":true}}}"#),
            seed("answer", br#"{"id":1,"result":{"a":[1.5,null,true]}}"#),
            seed("error", br#"{"id":1,"error":"why","progress":{"pause_ns":5}}"#),
            seed(
                "configuration",
                br#"{"boot":{"kernel":"k","cmdline":"c"},"machine":{"vcpus":2,"memory_mib":64},
                "disks":[{"id":"a","read_only":true,"layers":["l"]},{"id":"b","path":"p"}],"vsock":{"cid":3,"socket":"s"},
                "filesystems":[{"tag":"t","fd":7,"queues":2,"queue_size":64}],"console":{"ring_kib":1},
                "networks":[{"tap":"t","mac":"02:00:00:00:00:01","mtu":9000},{"empty":"stream"}],"serial":{"output":"stdout"}}"#,
            ),
        ]
    },
};
