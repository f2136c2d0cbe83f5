//! A naive reading of AMD 48882: what a request comes to when nothing is cached. It is written with
//! shifts on plain words and shares no code with the model, the driver or the page tables.

use lychgate_types::{Memory, PhysAddr};

/// One page-table walk's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// Physical address of the very byte.
    pub phys: u64,
    /// Size of the page in bytes.
    pub size: u64,
    /// Reads are allowed by every entry.
    pub read: bool,
    /// Writes are allowed by every entry.
    pub write: bool,
}

/// Walks host page tables (2.2.3 Tables 14 to 18) of `mode` levels from `root`. `None` wherever
/// hardware would log a fault.
pub fn walk(memory: &dyn Memory, root: u64, mode: u32, iova: u64) -> Option<Page> {
    if mode < 6 && iova >> (12 + 9 * mode) != 0 {
        return None;
    }
    let (mut table, mut level) = (root, mode);
    let (mut read, mut write) = (true, true);
    loop {
        let shift = 12 + 9 * (level - 1);
        let index = iova >> shift & 0x1ff;
        let entry = memory.load_u64(PhysAddr::new(table.wrapping_add(8 * index))).ok()?;
        if entry & 1 == 0 {
            return None;
        }
        read &= entry >> 61 & 1 != 0;
        write &= entry >> 62 & 1 != 0;
        let address = entry & 0x000f_ffff_ffff_f000;
        let next = (entry >> 9 & 7) as u32;
        if next == 0 || next == 7 {
            if entry >> 52 & 0x7f != 0 || level == 6 {
                return None;
            }
            let size_shift = if next == 0 { shift } else { sized(address)? };
            if next == 7 && (size_shift <= shift || size_shift >= shift + 9) {
                return None;
            }
            let within = (1 << size_shift) - 1;
            let phys = address & !within | iova & within;
            return Some(Page { phys, size: within + 1, read, write });
        }
        if next >= level || entry >> 52 & 0x1ff != 0 {
            return None;
        }
        let below = 12 + 9 * next;
        if iova & ((1 << shift) - (1 << below)) != 0 {
            return None;
        }
        (table, level) = (address, next);
    }
}

/// log2 of the size that the address field of a NextLevel 7 entry encodes; a first zero at bit 51
/// or above names no page.
fn sized(address: u64) -> Option<u32> {
    (12..51).find(|bit| address >> bit & 1 == 0).map(|bit| bit + 1)
}

/// The registers and features that translations depend on.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    /// Control Register.
    pub control: u64,
    /// Device Table Base Address Register.
    pub device_table: u64,
    /// Exclusion Base Register.
    pub exclusion_base: u64,
    /// Exclusion Range Limit Register.
    pub exclusion_limit: u64,
    /// Extended Feature Register.
    pub efr: u64,
    /// Extended Feature 2 Register.
    pub efr2: u64,
}

/// Where each byte of a request of `device` for `len` bytes from `start` leads, adjacent runs made
/// one, or `None` when the request does not pass.
pub fn translate(
    memory: &dyn Memory,
    registers: &Registers,
    device: u16,
    pasid: bool,
    start: u64,
    len: u64,
    write: bool,
) -> Option<Vec<(u64, u64)>> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    if len == 0 {
        return Some(runs);
    }
    let last = start.checked_add(len - 1)?;
    if registers.control & 1 == 0 {
        return Some(vec![(start, len)]);
    }
    let entry = entry(memory, registers, device)?;
    let mut at = start;
    loop {
        // Nothing changes inside of 4 KiB.
        let end = (at | 0xfff).min(last);
        let phys = page(memory, registers, &entry, pasid, at, write)?;
        match runs.last_mut() {
            Some((first, sum)) if first.checked_add(*sum) == Some(phys) => *sum += end - at + 1,
            _ => runs.push((phys, end - at + 1)),
        }
        if end == last {
            return Some(runs);
        }
        at = end + 1;
    }
}

/// A device table entry with V that is legal, or one without V (2.2.2 Table 7).
fn entry(memory: &dyn Memory, registers: &Registers, device: u16) -> Option<[u64; 4]> {
    let offset = u64::from(device) * 32;
    if offset >= ((registers.device_table & 0x1ff) + 1) << 12 {
        return None;
    }
    let base = registers.device_table & 0x000f_ffff_ffff_f000;
    let mut words = [0; 4];
    for (index, word) in (0..).zip(&mut words) {
        *word = memory.load_u64(PhysAddr::new(base.wrapping_add(offset + 8 * index))).ok()?;
    }
    if words[0] & 1 == 0 {
        return Some(words);
    }
    let reserved = words[0] & (1 << 63 | 0x7c) != 0 || words[1] >> 42 & 1 != 0;
    // PPR, GPRP, GIoV and GV need features that are absent.
    let absent = words[0] >> 52 & 0xf != 0;
    let accessed = registers.efr >> 49 & 1 != 0;
    let dirty = registers.efr >> 52 & 1 != 0;
    let had = match words[0] >> 7 & 3 {
        0 => true,
        1 => accessed,
        3 => accessed && dirty,
        _ => false,
    };
    let levels = match registers.efr >> 10 & 3 {
        3 => 0,
        hats => hats + 4,
    };
    let mode = words[0] >> 9 & 7 <= levels;
    let glx = words[0] >> 56 & 3 != 3;
    let port_io = words[1] >> 35 & 3 != 3;
    (!reserved && !absent && had && mode && glx && port_io).then_some(words)
}

/// Where one address leads (2.1.2 Table 3, 2.2.2 Table 8).
fn page(
    memory: &dyn Memory,
    registers: &Registers,
    entry: &[u64; 4],
    pasid: bool,
    at: u64,
    write: bool,
) -> Option<u64> {
    let valid = entry[0] & 1 != 0;
    let special = match at {
        0xfee0_0000..=0xfeef_ffff => return None,
        0xfd_0000_0000..=0xff_ffff_ffff if registers.efr2 >> 11 & 1 == 0 => Some(at),
        _ => None,
    };
    let forwarded = match special {
        None => !valid,
        Some(0xfd_f910_0000..=0xfd_f91f_ffff) if valid => match entry[1] >> 40 & 3 {
            1 => true,
            3 => false,
            _ => return None,
        },
        Some(0xfd_fc00_0000..=0xfd_fdff_ffff) if valid => match entry[1] >> 35 & 3 {
            0 => return None,
            1 => true,
            _ => false,
        },
        Some(0xfd_f910_0000..=0xfd_f91f_ffff | 0xfd_fc00_0000..=0xfd_fdff_ffff) => true,
        Some(_) => return None,
    };
    let excluded = registers.exclusion_base & 1 != 0
        && (registers.exclusion_base >> 1 & 1 != 0 || entry[1] >> 39 & 1 != 0)
        && at >= registers.exclusion_base & 0x000f_ffff_ffff_f000
        && at <= registers.exclusion_limit & 0x000f_ffff_ffff_f000 | 0xfff;
    if forwarded || excluded {
        return Some(at);
    }
    if entry[0] & 2 == 0 || pasid {
        return None;
    }
    let (read_allowed, write_allowed) = (entry[0] >> 61 & 1 != 0, entry[0] >> 62 & 1 != 0);
    if !(if write { write_allowed } else { read_allowed }) {
        return None;
    }
    let mode = (entry[0] >> 9 & 7) as u32;
    if mode == 0 {
        return Some(at);
    }
    let page = walk(memory, entry[0] & 0x000f_ffff_ffff_f000, mode, at)?;
    (if write { page.write } else { page.read }).then_some(page.phys)
}
