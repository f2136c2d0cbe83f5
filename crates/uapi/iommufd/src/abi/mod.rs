//! The structures that callers hand in, as `include/uapi/linux` lays them out, in the byte order of
//! the host, which is the caller's.

pub mod iommufd;
pub mod type1;

pub use iommufd::Argument;
