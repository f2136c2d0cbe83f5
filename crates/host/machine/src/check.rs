//! The machine that checks: after each operation of the IOMMU's driver, the model's copies are
//! compared with the tables.

mod driver;
pub mod kind;
mod story;

pub(crate) use driver::CheckedDriver;
pub use story::StaleStory;
