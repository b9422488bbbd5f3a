//! How a person says which network a container gets.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::NamespaceRef;
use crate::{Error, Result};

/// `--network`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkWish {
    /// A loopback interface and nothing else.
    #[default]
    None,
    /// That of a namespace which somebody has prepared.
    Namespace(NamespaceRef),
    /// User-mode networking through the program passt, which needs no rights.
    Passt,
}

/// What `--network` can be, in messages.
const CHOICES: &str = "there are none (loopback only), ns:PATH (a network namespace like /run/netns/NAME) and passt (through \
                       this host's own connections, no rights needed)";

impl NetworkWish {
    /// Parses `none`, `ns:PATH` or `passt`.
    ///
    /// # Errors
    /// Anything else; `host` with the reason why not.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: String| Err(Error::Usage(format!("--network {text}: {why}")));
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "passt" || text == "pasta" => Ok(Self::Passt),
            None if text == "host" => bad(format!(
                "the container has a kernel of its own, and with it a network of its own: the host's cannot be shared. \
                 {CHOICES}"
            )),
            Some(("ns", path)) if path.starts_with('/') => {
                Ok(Self::Namespace(NamespaceRef::Path(PathBuf::from(path))))
            }
            Some(("ns", path)) => bad(format!("{path:?} is not an absolute path, like /run/netns/NAME")),
            _ => bad(CHOICES.to_owned()),
        }
    }

    /// Whether the container gets more than a loopback interface.
    #[must_use]
    pub fn is_some(&self) -> bool {
        *self != Self::None
    }
}

/// `-p [IP:]HOST:CONTAINER[/PROTOCOL]`: a port of the host that leads to one of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Address of the host on which it is open; all when absent.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The container's port.
    pub container: u16,
    /// UDP rather than TCP.
    pub udp: bool,
}

impl Port {
    /// Parses `[IP:]HOST:CONTAINER[/tcp|/udp]`; an IPv6 address is in brackets.
    ///
    /// # Errors
    /// Not of this form.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| Error::Usage(format!("-p {text}: {why}"));
        let form = "write it as [IP:]HOST:CONTAINER[/udp], like 8080:80 or 127.0.0.1:5353:53/udp";
        let (ports, udp) = match text.split_once('/') {
            None => (text, false),
            Some((ports, "tcp")) => (ports, false),
            Some((ports, "udp")) => (ports, true),
            Some((_, other)) => return Err(bad(&format!("{other:?} is neither tcp nor udp"))),
        };
        let (rest, container) = ports.rsplit_once(':').ok_or_else(|| bad(form))?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => {
                let inner =
                    address.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(address);
                (Some(inner.parse().map_err(|_| bad(&format!("{address:?} is not an address")))?), host)
            }
        };
        let number = |digits: &str| match digits.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(bad(form)),
        };
        Ok(Self { address, host: number(host)?, container: number(container)?, udp })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn networks() {
        assert_eq!(NetworkWish::parse("none").unwrap(), NetworkWish::None);
        let wish = NetworkWish::Namespace(NamespaceRef::Path("/run/netns/x".into()));
        assert_eq!(NetworkWish::parse("ns:/run/netns/x").unwrap(), wish);
        for (text, why) in
            [("host", "kernel of its own"), ("bridge", "passt"), ("ns:x", "absolute"), ("", "none")]
        {
            let error = NetworkWish::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let json = serde_json::to_string(&wish).unwrap();
        assert_eq!(serde_json::from_str::<NetworkWish>(&json).unwrap(), wish);
    }

    #[test]
    fn ports() {
        let port = |address: Option<&str>, host, container, udp| Port {
            address: address.map(|address| address.parse().unwrap()),
            host,
            container,
            udp,
        };
        assert_eq!(Port::parse("8080:80").unwrap(), port(None, 8080, 80, false));
        assert_eq!(Port::parse("127.0.0.1:53:53/udp").unwrap(), port(Some("127.0.0.1"), 53, 53, true));
        assert_eq!(Port::parse("[::1]:1:2/tcp").unwrap(), port(Some("::1"), 1, 2, false));
        for bad in ["", "80", "x:80", "0:80", "80:70000", "80:80/sctp", "1.2.3:1:2", "a:b:c:d"] {
            assert!(Port::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC{0,20}") {
            let _ = (NetworkWish::parse(&text), Port::parse(&text));
        }
    }
}
