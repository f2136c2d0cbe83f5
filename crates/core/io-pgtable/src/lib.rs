//! I/O page tables: each format a file of facts, one walker for all.
//!
//! A [`Format`] says where bits lie; [`PageTable`] maps, unmaps and walks, compiled once per format
//! so that its shifts and masks are constants. Tables live in memory from
//! [`lychgate_types::Pages`] and are reached as 64-bit atomics.
//!
//! ```
//! use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Gather, PageTable};
//! use lychgate_types::{HeapPages, Iova, PhysAddr, PhysRun, Prot};
//!
//! let pages = HeapPages::new();
//! let table: PageTable<AmdV1, _> =
//!     PageTable::new(&pages, Config::new(48, AmdV1Options::default()))?;
//!
//! let mut gather = Gather::new();
//! let frames = [
//!     PhysRun { start: PhysAddr::new(0x20_0000), len: 0x20_0000 },
//!     PhysRun { start: PhysAddr::new(0x1234_5000), len: 0x1000 },
//! ];
//! let rw = Prot::READ | Prot::WRITE;
//! table.map_batch(Iova::new(0x4000_0000), &frames, rw, &mut gather)?;
//! assert!(gather.is_empty());
//!
//! let there = table.walk(Iova::new(0x4020_0042)).expect("just mapped");
//! assert_eq!(there.phys, PhysAddr::new(0x1234_5042));
//!
//! let unmapped = table.unmap(Iova::new(0x4000_0000), 0x20_1000, &mut gather)?;
//! assert_eq!(unmapped.bytes, 0x20_1000);
//! // Here a driver invalidates `gather.range()` and waits.
//! gather.release(&pages);
//! # Ok::<(), lychgate_io_pgtable::Error>(())
//! ```
//!
//! # Rules for callers
//!
//! - Every method takes `&self`. Calls on disjoint ranges may run at the same time; calls on
//!   overlapping ranges, walks included, must not run while one of them changes the range. A
//!   caller that breaks this gets wrong translations, not undefined behaviour. Cutting and joining
//!   change leaves, but no translation: walks may run meanwhile.
//! - [`PageTable::grow`] is serialised by the caller, together with whatever reads
//!   [`PageTable::root`] to hand it to hardware.
//! - A [`Gather`] that is not empty is followed by an invalidation and [`Gather::release`], after
//!   a failed map too.

#![no_std]
#![forbid(unsafe_code)]

mod cursor;
mod cut;
mod dirty;
mod error;
pub mod format;
mod gather;
mod join;
mod leaf;
mod ledger;
mod map;
mod table;
mod unmap;
mod walk;
mod words;

pub use cursor::Cursor;
pub use dirty::Dirty;
pub use error::Error;
pub use format::{
    ARM_MAIR, AmdV1, AmdV1Options, ArmLpae, ArmOptions, ArmStage1, ArmStage2, Format, Riscv,
    RiscvFirstStage, RiscvOptions, RiscvSecondStage, SizeChange, SizeChanges, VtdSecondStage,
    VtdSecondStageOptions, X86_64, X86_64Options,
};
pub use gather::Gather;
pub use join::Joined;
pub use table::{Config, PageTable, Root};
pub use unmap::{Stop, Unmapped};
pub use walk::{Path, Step, Translation};
