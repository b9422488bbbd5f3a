//! Makes the partition table of a composite disk: protective MBR, primary and backup GPT (UEFI specification 2.10,
//! chapter 5). The same layers give the same bytes.

use super::disk::SECTOR;

/// Sectors before the first partition: MBR, header and entries take 34, then up to the layer alignment.
const FIRST_SECTOR: u64 = 40;
/// Sectors after the last partition: entries and header take 33; the disk's size stays a multiple of 4 KiB.
const BACKUP_SECTORS: u64 = 40;
/// Most entries, for which there is room.
const ENTRIES: u32 = 128;
/// So many fit behind the header into the disk's first 4 KiB, and before the other one into its last: a kernel that looks for
/// partitions reads two pages then instead of ten, which is 1.4 ms of a container's start in the emulated host.
const FEW: u32 = 24;
const ENTRY_BYTES: u32 = 128;
const ENTRY_SECTORS: u64 = 32;
const HEADER_BYTES: u32 = 92;
const REVISION: u32 = 0x0001_0000;
/// "Linux filesystem data", 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is stored.
const LINUX_DATA: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];
const ATTRIBUTE_READ_ONLY: u64 = 1 << 60;
const MBR_GPT: u8 = 0xee;

/// What comes before and after the partitions.
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    /// The disk's first bytes, up to the first partition.
    pub primary: Vec<u8>,
    /// The disk's last bytes, after the last partition.
    pub backup: Vec<u8>,
}

/// Makes the table for partitions of these lengths in bytes, multiples of a sector, one after the other. `id` makes the
/// disk's and the partitions' identifiers.
pub fn build(id: &str, lengths: &[u64]) -> Table {
    let count = if lengths.len() <= FEW as usize { FEW } else { ENTRIES };
    let mut entries = Vec::with_capacity((count * ENTRY_BYTES) as usize);
    let mut next = FIRST_SECTOR;
    for (number, length) in (1_u32..).zip(lengths.iter().take(ENTRIES as usize)) {
        let sectors = length / SECTOR;
        entries.extend(LINUX_DATA);
        entries.extend(identifier(id, number));
        entries.extend(next.to_le_bytes());
        entries.extend((next + sectors - 1).to_le_bytes());
        entries.extend(ATTRIBUTE_READ_ONLY.to_le_bytes());
        let name: Vec<u8> = format!("layer-{number}").encode_utf16().flat_map(u16::to_le_bytes).collect();
        entries.extend(&name);
        entries.resize(number as usize * ENTRY_BYTES as usize, 0);
        next += sectors;
    }
    entries.resize((count * ENTRY_BYTES) as usize, 0);

    let disk = Layout { guid: identifier(id, 0), end: next, count, sum: crc32(&entries) };
    let mut primary = mbr(disk.sectors());
    primary.extend(disk.header(1, disk.last(), 2));
    primary.extend(&entries);
    primary.resize((FIRST_SECTOR * SECTOR) as usize, 0);

    // Right before the header, however many there are: the room kept free for them is the same.
    let sectors = entries.len() as u64 / SECTOR;
    let mut backup = vec![0; ((BACKUP_SECTORS - 1 - sectors) * SECTOR) as usize];
    backup.extend(&entries);
    backup.extend(disk.header(disk.last(), 1, disk.last() - sectors));
    Table { primary, backup }
}

/// What both headers say.
struct Layout {
    guid: [u8; 16],
    /// First sector after the partitions.
    end: u64,
    /// Number of entries.
    count: u32,
    /// Checksum of the entries.
    sum: u32,
}

impl Layout {
    fn sectors(&self) -> u64 {
        self.end + BACKUP_SECTORS
    }

    fn last(&self) -> u64 {
        self.sectors() - 1
    }

    /// The header that is at sector `own`, whose twin is at `other`, with its entries from `entries` on: one sector.
    fn header(&self, own: u64, other: u64, entries: u64) -> Vec<u8> {
        let mut header = Vec::with_capacity(SECTOR as usize);
        header.extend(b"EFI PART");
        header.extend(REVISION.to_le_bytes());
        header.extend(HEADER_BYTES.to_le_bytes());
        header.extend([0; 8]);
        header.extend(own.to_le_bytes());
        header.extend(other.to_le_bytes());
        header.extend((2 + ENTRY_SECTORS).to_le_bytes());
        header.extend((self.last() - ENTRY_SECTORS - 1).to_le_bytes());
        header.extend(self.guid);
        header.extend(entries.to_le_bytes());
        header.extend(self.count.to_le_bytes());
        header.extend(ENTRY_BYTES.to_le_bytes());
        header.extend(self.sum.to_le_bytes());
        let sum = crc32(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header.resize(SECTOR as usize, 0);
        header
    }
}

/// The protective MBR: one partition of type 0xee over the whole disk.
fn mbr(sectors: u64) -> Vec<u8> {
    let mut mbr = vec![0; 446];
    mbr.extend([0, 0, 2, 0, MBR_GPT, 0xff, 0xff, 0xff]);
    mbr.extend(1_u32.to_le_bytes());
    mbr.extend(u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes());
    mbr.resize(510, 0);
    mbr.extend([0x55, 0xaa]);
    mbr
}

/// A GUID of version 8 (RFC 9562: made by the application's own rules) from the disk's name and a number.
fn identifier(id: &str, number: u32) -> [u8; 16] {
    // FNV-1a, twice with different starts: the names are ours, so that no one tries to make two alike.
    let hash = |start: u64| {
        id.bytes()
            .chain(number.to_le_bytes())
            .fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    };
    let mut guid = [0; 16];
    guid[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_le_bytes());
    guid[8..].copy_from_slice(&hash(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    // Version in the high bits of the third field, which is little-endian; variant in the fourth.
    guid[7] = (guid[7] & 0x0f) | 0x80;
    guid[8] = (guid[8] & 0x3f) | 0x80;
    guid
}

/// CRC-32 (ISO 3309), bit by bit: it sums 17 KiB per disk, once.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn partitions_follow_each_other_aligned() {
        let table = build("layers", &[4096, 8192, 12288]);
        assert_eq!(table.primary.len() % 4096, 0);
        assert_eq!(table.backup.len() % 4096, 0);
        let entry = |n: usize, at: usize| {
            let start = 1024 + n * 128 + at;
            u64::from_le_bytes(table.primary[start..start + 8].try_into().unwrap())
        };
        assert_eq!([entry(0, 32), entry(0, 40)], [40, 47]);
        assert_eq!([entry(1, 32), entry(1, 40)], [48, 63]);
        assert_eq!([entry(2, 32), entry(2, 40)], [64, 87]);
        assert_eq!(entry(3, 32), 0);
    }

    #[test]
    fn both_headers_lead_to_the_same_entries() {
        for layers in [1, FEW as usize, FEW as usize + 1, ENTRIES as usize] {
            let table = build("layers", &vec![4096; layers]);
            let sectors = 80 + 8 * layers as u64;
            let backup_at = (sectors - BACKUP_SECTORS) * SECTOR;
            let number =
                |header: &[u8], at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
            let word = |header: &[u8], at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let primary = &table.primary[512..1024];
            let backup = &table.backup[table.backup.len() - 512..];
            assert_eq!([number(primary, 24), number(primary, 32)], [1, sectors - 1]);
            assert_eq!([number(backup, 24), number(backup, 32)], [sectors - 1, 1]);
            let bytes = word(primary, 80) as usize * 128;
            assert!(bytes >= layers * 128 && bytes == word(backup, 80) as usize * 128);
            let first = number(primary, 72) * SECTOR;
            let second = number(backup, 72) * SECTOR - backup_at;
            let entries = &table.primary[first as usize..first as usize + bytes];
            assert_eq!(entries, &table.backup[second as usize..second as usize + bytes]);
            assert_eq!([crc32(entries), crc32(entries)], [word(primary, 88), word(backup, 88)]);
            assert_eq!(number(entries, (layers - 1) * 128 + 40), sectors - BACKUP_SECTORS - 1);
            // Few layers: all in one page at each end.
            if layers <= FEW as usize {
                assert!(first as usize + bytes <= 4096 && second >= 4 * 4096, "{layers}");
            }
        }
    }

    #[test]
    fn the_same_layers_give_the_same_bytes() {
        assert_eq!(build("a", &[4096]), build("a", &[4096]));
        assert_ne!(build("a", &[4096]), build("b", &[4096]));
    }
}
