//! Access objects: kernel users of an IOAS that pin or copy its pages (`struct iommufd_access`).

/// A kernel user of an IOAS.
#[derive(Default)]
pub(crate) struct Access {}
