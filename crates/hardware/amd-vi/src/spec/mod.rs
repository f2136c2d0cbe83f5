//! Where a bit lies: the layouts of the AMD I/O Virtualization Technology (IOMMU) Specification,
//! document 48882, one file a chapter. Section numbers are those of revisions 3.05 to 3.11; the
//! section's name stands beside a number that moved.
//!
//! Nothing here behaves. The driver and the model share these definitions and nothing else.
//!
//! A structure is a newtype over its 64-bit words in register order, word 0 first. Words are
//! numbers: in memory each is little-endian. A getter gives the field shifted down to bit 0; a
//! setter stores the low bits of its argument that the field can hold and drops the rest.

mod fields;

pub mod capability;
pub mod command;
pub mod dte;
pub mod event;
pub mod host_page_table;
pub mod irte;
pub mod ranges;
pub mod registers;
pub mod size;

pub use command::Command;
pub use dte::Dte;
pub use event::Event;
pub use host_page_table::Entry;
pub use irte::{Irte32, Irte128};
pub use registers::{Control, Efr, Efr2, Status};
