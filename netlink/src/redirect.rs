//! Redirecting everything that comes in on one interface out of another: an `ingress` qdisc with one `matchall` filter
//! whose action is `mirred egress redirect` (`tc-matchall(8)`, `tc-mirred(8)`).
//!
//! A filter carries its maker's tag as its handle and has the priority [`PRIORITY`], by which it is told from filters of
//! others.

use std::io;

use libc::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, RTM_DELQDISC, RTM_GETQDISC, RTM_GETTFILTER};
use libc::{RTM_NEWQDISC, RTM_NEWTFILTER, TCA_KIND, TCA_OPTIONS};

use crate::Socket;
use crate::message::{Attributes, Message, Request, u32_at};

/// Bytes of `struct tcmsg`.
const FIXED: usize = 20;
/// The place of the `ingress` qdisc, and its handle, which is its filters' parent.
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MIN_INGRESS` of a `clsact` qdisc, which has the same handle.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// Priority of our filters.
pub const PRIORITY: u16 = 0xb41c;
/// `ETH_P_ALL` in network byte order, as a filter's protocol is.
const ALL_PROTOCOLS: u32 = 0x0003_u16.to_be() as u32;

/// Attribute types of `matchall`, of actions and of `mirred`.
const MATCHALL_ACTIONS: u16 = 2;
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARAMETERS: u16 = 2;
/// `TC_ACT_STOLEN`: nobody else sees the packet.
const STOLEN: u32 = 4;
/// `TCA_EGRESS_REDIR`.
const EGRESS_REDIRECT: u32 = 1;

/// A queueing discipline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qdisc {
    /// Number of its interface.
    pub link: u32,
    /// Where it is: `TC_H_…`.
    pub parent: u32,
    /// `ingress`, `clsact`, `noqueue`, …
    pub kind: String,
}

impl Qdisc {
    fn parse(message: &Message) -> Option<Self> {
        Some(Self {
            link: u32_at(&message.payload, 4)?,
            parent: u32_at(&message.payload, 12)?,
            kind: message.attributes(FIXED).text(TCA_KIND)?,
        })
    }

    /// Whether it handles what comes in.
    pub fn is_ingress(&self) -> bool {
        self.parent == INGRESS
    }
}

/// A filter for what comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Number of its interface.
    pub link: u32,
    /// Its handle: of ours the maker's tag.
    pub tag: u32,
    /// Its place among the others.
    pub priority: u16,
    /// `matchall`, `u32`, `bpf`, …
    pub kind: String,
    /// Number of the interface to which it redirects; 0 when that is gone.
    pub target: Option<u32>,
}

impl Filter {
    fn parse(message: &Message) -> Option<Self> {
        let attributes = message.attributes(FIXED);
        let options = Attributes::of(attributes.get(TCA_OPTIONS).unwrap_or_default());
        let target = options.get(MATCHALL_ACTIONS).and_then(|actions| {
            let (_, action) = Attributes::of(actions).next()?;
            let options = Attributes::of(action).get(ACTION_OPTIONS)?;
            u32_at(Attributes::of(options).get(MIRRED_PARAMETERS)?, 24)
        });
        Some(Self {
            link: u32_at(&message.payload, 4)?,
            tag: u32_at(&message.payload, 8)?,
            priority: (u32_at(&message.payload, 16)? >> 16) as u16,
            kind: attributes.text(TCA_KIND)?,
            target,
        })
    }

    /// Whether [`Socket::redirect`] made it. The kernel lists every `matchall` filter twice: once without its handle.
    pub fn is_ours(&self) -> bool {
        self.priority == PRIORITY && self.kind == "matchall"
    }
}

/// `struct tcmsg`.
fn fixed(link: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut fixed = vec![0; 4];
    for value in [link, handle, parent, info] {
        fixed.extend(value.to_ne_bytes());
    }
    fixed
}

fn filter_request(from: u32, to: u32, tag: u32) -> Request {
    let info = u32::from(PRIORITY) << 16 | ALL_PROTOCOLS;
    // struct tc_mirred: index, capabilities, action, two counters, direction, interface.
    let parameters: Vec<u8> =
        [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, to].into_iter().flat_map(u32::to_ne_bytes).collect();
    Request::new(
        RTM_NEWTFILTER,
        NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        &fixed(from, tag, INGRESS_HANDLE, info),
    )
    .text(TCA_KIND, "matchall")
    .nested(TCA_OPTIONS, |options| {
        options.nested(MATCHALL_ACTIONS, |actions| {
            actions.nested(1, |action| {
                action
                    .text(ACTION_KIND, "mirred")
                    .nested(ACTION_OPTIONS, |options| options.attribute(MIRRED_PARAMETERS, &parameters))
            })
        })
    })
}

impl Socket {
    /// The queueing disciplines of all interfaces.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn qdiscs(&mut self) -> io::Result<Vec<Qdisc>> {
        let messages = self.list(&Request::new(RTM_GETQDISC, NLM_F_DUMP, &[0; FIXED]))?;
        Ok(messages.iter().filter_map(Qdisc::parse).collect())
    }

    /// The filters for what comes in on an interface, which must have an ingress or clsact qdisc.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ingress_filters(&mut self, qdisc: &Qdisc) -> io::Result<Vec<Filter>> {
        let parent = if qdisc.kind == "clsact" { CLSACT_INGRESS } else { INGRESS_HANDLE };
        let messages =
            self.list(&Request::new(RTM_GETTFILTER, NLM_F_DUMP, &fixed(qdisc.link, 0, parent, 0)))?;
        let filters = messages.iter().filter_map(Filter::parse);
        Ok(filters.filter(|filter| filter.tag != 0).collect())
    }

    /// Gives an interface an ingress qdisc.
    ///
    /// # Errors
    /// It has one, or what else the kernel says.
    pub fn add_ingress(&mut self, link: u32) -> io::Result<()> {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let request = Request::new(RTM_NEWQDISC, flags, &fixed(link, INGRESS_HANDLE, INGRESS, 0));
        self.execute(request.text(TCA_KIND, "ingress"))
    }

    /// Takes an interface's ingress qdisc away, and its filters with it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn delete_ingress(&mut self, link: u32) -> io::Result<()> {
        self.execute(Request::new(RTM_DELQDISC, NLM_F_ACK, &fixed(link, INGRESS_HANDLE, INGRESS, 0)))
    }

    /// Lets everything that comes in on `from`, which has an ingress qdisc, go out of `to`. `tag` must not be 0.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn redirect(&mut self, from: u32, to: u32, tag: u32) -> io::Result<()> {
        self.execute(filter_request(from, to, tag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::messages;

    #[test]
    fn redirects_are_read_as_written() {
        let bytes = filter_request(2, 5, 0x1234_5678).finish(1);
        let filter = Filter::parse(&messages(&bytes)[0]).unwrap();
        assert!(filter.is_ours());
        assert_eq!((filter.link, filter.tag, filter.target), (2, 0x1234_5678, Some(5)));
    }
}
