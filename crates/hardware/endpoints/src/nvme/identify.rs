//! Identify data structures (5.15).

use super::Limits;
use super::log::{ASYNC_EVENT_REQUESTS, ERROR_LOG_ENTRIES, FIRMWARE_REVISION, put};
use super::namespace::Namespace;
use super::pci;
use super::spec::{CQE_SIZE_LOG2, SQE_SIZE_LOG2, Status, VERSION};

/// Bytes of every Identify data structure.
pub(crate) const IDENTIFY_LEN: usize = 4096;

/// Who the controller says it is.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    pub(crate) serial: String,
    pub(crate) model: String,
}

/// Identify Controller, CNS 01.
pub(crate) fn controller(names: &Names, limits: &Limits, namespaces: usize) -> Vec<u8> {
    const OAES_NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
    const CONTROLLER_TYPE_IO: u8 = 1;
    /// One slot, read-only.
    const FRMW: u8 = 1 | 1 << 1;
    const LPA_EFFECTS_AND_EXTENDED: u8 = 1 << 1 | 1 << 2;
    /// Compare, Dataset Management, Write Zeroes, Save and Select, Timestamp.
    const ONCS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6;
    /// Present; a Flush for all namespaces is supported.
    const VWC: u8 = 1 | 3 << 1;
    let count = u32::try_from(namespaces).unwrap_or(u32::MAX);
    let mut data = vec![0; IDENTIFY_LEN];
    put(&mut data, 0, &pci::HEADER.vendor.to_le_bytes());
    put(&mut data, 2, &pci::HEADER.subsystem_vendor.to_le_bytes());
    put(&mut data, 4, &padded::<20>(&names.serial));
    put(&mut data, 24, &padded::<40>(&names.model));
    put(&mut data, 64, FIRMWARE_REVISION);
    // Recommended Arbitration Burst, 2^6 commands; a 0 in CMIC: one port, one controller.
    put(&mut data, 72, &[6]);
    put(&mut data, 77, &[limits.mdts]);
    put(&mut data, 80, &VERSION.to_le_bytes());
    put(&mut data, 92, &OAES_NAMESPACE_ATTRIBUTE.to_le_bytes());
    put(&mut data, 111, &[CONTROLLER_TYPE_IO]);
    // Abort Command Limit 0-based, Asynchronous Event Request Limit 0-based, firmware, logs.
    put(&mut data, 258, &[3, ASYNC_EVENT_REQUESTS - 1, FRMW, LPA_EFFECTS_AND_EXTENDED]);
    put(&mut data, 262, &[ERROR_LOG_ENTRIES - 1]);
    // Warning and critical composite temperature, in kelvins.
    put(&mut data, 266, &343_u16.to_le_bytes());
    put(&mut data, 268, &373_u16.to_le_bytes());
    put(&mut data, 512, &[nibbles(SQE_SIZE_LOG2), nibbles(CQE_SIZE_LOG2)]);
    put(&mut data, 516, &count.to_le_bytes());
    put(&mut data, 520, &ONCS.to_le_bytes());
    put(&mut data, 525, &[VWC]);
    put(&mut data, 768, subsystem_name(&names.serial).as_bytes());
    data
}

/// Identify Namespace, CNS 00.
pub(crate) fn namespace(namespace: &Namespace) -> Vec<u8> {
    /// Deallocated blocks read as zeros, and Write Zeroes may deallocate.
    const DLFEAT: u8 = 1 | 1 << 3;
    const READ_ONLY: u8 = 1;
    let mut data = vec![0; IDENTIFY_LEN];
    let blocks = namespace.blocks().to_le_bytes();
    put(&mut data, 0, &blocks);
    put(&mut data, 8, &blocks);
    put(&mut data, 16, &blocks);
    put(&mut data, 33, &[DLFEAT]);
    put(&mut data, 99, &[if namespace.storage.read_only() { READ_ONLY } else { 0 }]);
    put(&mut data, 104, &namespace.nguid);
    // The one LBA format: no metadata.
    put(&mut data, 128 + 2, &[namespace.lba_shift]);
    data
}

/// Active Namespace ID list, CNS 02: the ids above `nsid`, ascending.
pub(crate) fn active_list(nsid: u32, namespaces: usize) -> Result<Vec<u8>, Status> {
    if nsid >= 0xffff_fffe {
        return Err(Status::INVALID_NAMESPACE);
    }
    let last = u32::try_from(namespaces).unwrap_or(u32::MAX);
    let mut data = vec![0; IDENTIFY_LEN];
    for (to, id) in data.as_chunks_mut::<4>().0.iter_mut().zip(nsid + 1..=last) {
        *to = id.to_le_bytes();
    }
    Ok(data)
}

/// Namespace Identification Descriptor list, CNS 03.
pub(crate) fn descriptors(namespace: &Namespace) -> Vec<u8> {
    const NGUID: u8 = 2;
    let mut data = vec![0; IDENTIFY_LEN];
    if namespace.nguid != [0; 16] {
        put(&mut data, 0, &[NGUID, 16]);
        put(&mut data, 4, &namespace.nguid);
    }
    data
}

/// Required and maximum entry size.
fn nibbles(log2: u32) -> u8 {
    let log2 = log2.to_le_bytes()[0];
    log2 | log2 << 4
}

/// ASCII, padded with spaces (1.5).
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    let printable = text.bytes().map(|byte| if (0x20..0x7f).contains(&byte) { byte } else { b'?' });
    for (to, from) in field.iter_mut().zip(printable) {
        *to = from;
    }
    field
}

/// The NVM Subsystem NVMe Qualified Name, in the UUID form (7.9). Linux refuses two controllers
/// with the same name and controller id, so the UUID is made of the serial number.
fn subsystem_name(serial: &str) -> String {
    let hash = |seed: u64| {
        serial
            .bytes()
            .fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    };
    // RFC 9562 version 8, variant 10.
    let high = hash(0xcbf2_9ce4_8422_2325) & !0xf000 | 0x8000;
    let low = hash(0x6c62_272e_07bb_0142) & !(0b11 << 62) | 0b10 << 62;
    format!(
        "nqn.2014-08.org.nvmexpress:uuid:{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_active_list_starts_above_the_given_id_and_is_ascending() {
        let ids = |nsid| {
            let data = active_list(nsid, 3).unwrap();
            let ids = data.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id));
            ids.take_while(|id| *id != 0).collect::<Vec<_>>()
        };
        assert_eq!(ids(0), [1, 2, 3]);
        assert_eq!(ids(2), [3]);
        assert_eq!(ids(3), []);
        assert_eq!(ids(0xffff_fffd), []);
        assert_eq!(active_list(0xffff_fffe, 3), Err(Status::INVALID_NAMESPACE));
    }

    #[test]
    fn subsystem_names_differ_with_the_serial_number_and_are_uuids() {
        let (a, b) = (subsystem_name("a"), subsystem_name("b"));
        assert_ne!(a, b);
        assert_eq!(a.len(), "nqn.2014-08.org.nvmexpress:uuid:".len() + 36);
        assert_eq!(a.as_bytes()[32 + 14], b'8');
        assert!(b"89ab".contains(&a.as_bytes()[32 + 19]));
    }
}
