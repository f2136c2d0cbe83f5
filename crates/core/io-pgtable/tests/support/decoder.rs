//! A second reading of AMD 48882 2.2.3 (Tables 14 to 18), independent of the crate: it knows
//! nothing but a root, a Mode and physical memory.

use lychgate_types::{Memory, PhysAddr};

/// Where the walk of one address ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Decoded {
    pub phys: u64,
    pub page: u64,
    pub read: bool,
    pub write: bool,
    pub force_coherent: bool,
}

/// What hardware would log as IO_PAGE_FAULT with RZ=0 or ILLEGAL, or what no driver should do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Malformed(pub String);

fn bad<T>(why: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(why.into()))
}

/// Walks for `iova`; `Ok(None)` where an entry is not present.
pub(crate) fn decode(
    memory: &dyn Memory,
    root: u64,
    mode: u32,
    iova: u64,
) -> Result<Option<Decoded>, Malformed> {
    if !(1..=6).contains(&mode) {
        return bad(format!("mode {mode}"));
    }
    if mode < 6 && iova >> (12 + 9 * mode) != 0 {
        return Ok(None);
    }
    let (mut table, mut level) = (root, mode);
    let (mut read, mut write) = (true, true);
    loop {
        let default = 12 + 9 * (level - 1);
        let index = (iova >> default) & 0x1ff;
        let load = |index: u64| {
            memory
                .load_u64(PhysAddr::new(table + 8 * index))
                .map_err(|error| Malformed(error.to_string()))
        };
        let entry = load(index)?;
        if entry & 1 == 0 {
            return if entry == 0 { Ok(None) } else { bad(format!("leftover {entry:#x}")) };
        }
        read &= entry >> 61 & 1 == 1;
        write &= entry >> 62 & 1 == 1;
        let address = entry & 0x000f_ffff_ffff_f000;
        match (entry >> 9 & 7) as u32 {
            next @ (0 | 7) => {
                if entry >> 52 & 0x7f != 0 {
                    return bad(format!("reserved bits of leaf {entry:#x}"));
                }
                if level == 6 || (next == 0 && level == 4) {
                    return bad(format!("leaf at level {level}"));
                }
                let mut shift = default;
                if next == 7 {
                    let lowest_zero = (12..52).find(|bit| entry >> bit & 1 == 0);
                    let Some(lowest_zero) = lowest_zero else {
                        return bad("no size in address");
                    };
                    shift = lowest_zero + 1;
                    if shift <= default || shift >= default + 9 {
                        return bad(format!("size 2^{shift} at level {level}"));
                    }
                    let copies = 1 << (shift - default);
                    let first = index & !(copies - 1);
                    for copy in first..first + copies {
                        if (load(copy)? ^ entry) & !0x60 != 0 {
                            return bad(format!("copies differ in {table:#x}"));
                        }
                    }
                }
                let within = (1u64 << shift) - 1;
                if next == 0 && address & within != 0 {
                    return bad(format!("unaligned leaf {entry:#x}"));
                }
                return Ok(Some(Decoded {
                    phys: address & !within | iova & within,
                    page: 1 << shift,
                    read,
                    write,
                    force_coherent: entry >> 60 & 1 == 1,
                }));
            }
            next => {
                if next >= level {
                    return bad(format!("next level {next} at level {level}"));
                }
                if entry >> 52 & 0x1ff != 0 {
                    return bad(format!("reserved bits of table entry {entry:#x}"));
                }
                let skipped = (12 + 9 * next)..default;
                if skipped.into_iter().any(|bit| iova >> bit & 1 != 0) {
                    return bad("skipped levels");
                }
                table = address;
                level = next;
            }
        }
    }
}
