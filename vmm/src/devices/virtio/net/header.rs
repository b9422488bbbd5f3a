//! The header before every packet (`struct virtio_net_hdr`, section 5.1.6): what is left to do to the frame.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of a header, with `num_buffers`, which version 1 of the standard always has.
pub const HEADER_BYTES: usize = 12;
/// Where in it `num_buffers` is: how many receive buffers a packet takes.
pub const NUM_BUFFERS: usize = 10;
/// Bytes of an Ethernet header, without which a frame is none.
const ETHERNET_HEADER: usize = 14;

/// Feature: the device completes checksums.
pub const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
/// Feature: the driver does.
pub const GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
/// Features: segmentation of TCP, either way.
pub const TSO: u64 = 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6;
/// Features: the same with explicit congestion notification.
pub const ECN: u64 = 1 << VIRTIO_NET_F_HOST_ECN | 1 << VIRTIO_NET_F_GUEST_ECN;
/// Features: fragmentation of UDP, either way.
pub const UFO: u64 = 1 << VIRTIO_NET_F_HOST_UFO | 1 << VIRTIO_NET_F_GUEST_UFO;
/// Features: segmentation of UDP, either way.
pub const USO: u64 = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
/// Features with which the guest can receive packets longer than its MTU.
pub const GUEST_SEGMENTS: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Whether a driver accepted with each feature what that one needs (section 5.1.3.1). The host's kernel refuses others, too.
pub fn go_together(features: u64) -> bool {
    let has = |feature: u32| features & 1 << feature != 0;
    let any = |list: &[u32]| list.iter().any(|feature| has(*feature));
    let (host_tso, guest_tso) = (
        any(&[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6]),
        any(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]),
    );
    let host = host_tso || any(&[VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO]);
    (!host || has(VIRTIO_NET_F_CSUM))
        && (features & GUEST_SEGMENTS == 0 || has(VIRTIO_NET_F_GUEST_CSUM))
        && (!has(VIRTIO_NET_F_HOST_ECN) || host_tso)
        && (!has(VIRTIO_NET_F_GUEST_ECN) || guest_tso)
}

/// What the guest's header of a packet of `frame` bytes says, with nothing in it that it may not say; `None` when the
/// packet is to be dropped.
pub fn checked(header: [u8; HEADER_BYTES], frame: usize, features: u64) -> Option<[u8; HEADER_BYTES]> {
    let [flags, gso, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = header;
    let has = |feature: u32| features & 1 << feature != 0;
    let number = |low, high| usize::from(u16::from_le_bytes([low, high]));
    if frame < ETHERNET_HEADER {
        return None;
    }
    let mut checked = [0; HEADER_BYTES];
    let partial = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if partial {
        let (start, offset) = (number(s0, s1), number(o0, o1));
        if !has(VIRTIO_NET_F_CSUM) || start < ETHERNET_HEADER || start + offset + 2 > frame {
            return None;
        }
        checked[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        checked[6..10].copy_from_slice(&[s0, s1, o0, o1]);
    }
    let ecn = u32::from(gso) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let kind = u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN;
    let allowed = match kind {
        VIRTIO_NET_HDR_GSO_NONE => return (!ecn).then_some(checked),
        VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
        VIRTIO_NET_HDR_GSO_UDP => has(VIRTIO_NET_F_HOST_UFO) && !ecn,
        VIRTIO_NET_HDR_GSO_UDP_L4 => has(VIRTIO_NET_F_HOST_USO) && !ecn,
        _ => false,
    };
    let (headers, size) = (number(h0, h1), number(g0, g1));
    if !allowed || !partial || (ecn && !has(VIRTIO_NET_F_HOST_ECN)) || size == 0 || headers > frame {
        return None;
    }
    checked[1] = gso;
    checked[2..6].copy_from_slice(&[h0, h1, g0, g1]);
    Some(checked)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = CSUM | TSO | ECN | UFO | USO;

    #[test]
    fn what_drivers_send_passes() {
        assert_eq!(checked([0; 12], 60, 0), Some([0; 12]));
        // DATA_VALID and num_buffers mean nothing in this direction.
        assert_eq!(checked([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], 60, 0), Some([0; 12]));
        let tcp = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        assert_eq!(checked(tcp, 3000, ALL), Some(tcp));
    }

    #[test]
    fn what_was_not_negotiated_does_not_pass() {
        let tcp = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        assert_eq!(checked(tcp, 3000, CSUM), None);
        assert_eq!(checked([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], 60, 0), None);
        for (at, value) in [(0, 0), (1, 0x81), (1, 2), (2, 0xff), (4, 0), (6, 13), (7, 0xff), (9, 0xff)] {
            let mut bad = tcp;
            bad[at] = value;
            if at == 4 {
                bad[5] = 0;
            }
            if at == 2 {
                bad[3] = 0xff;
            }
            assert_eq!(checked(bad, 3000, CSUM | TSO), None, "byte {at} is {value}");
        }
        assert_eq!(checked([0; 12], 13, ALL), None);
    }

    proptest! {
        #[test]
        fn a_checked_header_stays_within_its_frame(header in any::<[u8; 12]>(), frame in 0_usize..70000, features in any::<u64>()) {
            if let Some(checked) = checked(header, frame, features) {
                let number = |at: usize| usize::from(u16::from_le_bytes([checked[at], checked[at + 1]]));
                prop_assert!(frame >= ETHERNET_HEADER);
                prop_assert!(checked[0] == 0 || number(6) + number(8) + 2 <= frame);
                prop_assert!(number(2) <= frame && number(10) == 0);
                prop_assert!(checked[1] == 0 || (checked[0] == 1 && number(4) > 0));
            }
        }
    }
}
