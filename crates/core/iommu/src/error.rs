//! Why the core or a driver refuses. Each error has the errno that Linux gives for it.

use core::fmt;

use lychgate_types::{Errno, Iova};

macro_rules! errors {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident => $errno:ident, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[non_exhaustive]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// The errno that Linux gives for it.
            pub const fn errno(self) -> Errno {
                match self { $(Self::$variant => Errno::$errno,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
        }

        impl core::error::Error for $name {}
    };
}

errors! {
    /// A device could not be taken over.
    ProbeError {
        /// No IOMMU translates for the requester id.
        NoIommu => ENODEV, "no IOMMU translates for this requester id";
        /// The requester id is in use already.
        Exists => EBUSY, "the requester id is managed already";
        /// No memory for the driver's tables.
        OutOfMemory => ENOMEM, "out of memory for the device's tables";
        /// The hardware did not answer a command.
        Hardware => EIO, "the IOMMU does not complete commands";
        /// The device does not go together with the domain of its group.
        Incompatible => EINVAL, "the domain of the device's group does not fit the device";
    }
}

errors! {
    /// A domain could not be allocated.
    AllocError {
        /// The hardware or the driver has no domain with these properties.
        Unsupported => EOPNOTSUPP, "the IOMMU has no domain with these properties";
        /// The vendor data is malformed.
        InvalidData => EINVAL, "the vendor data is malformed";
        /// No memory for the tables.
        OutOfMemory => ENOMEM, "out of memory for page tables";
        /// No hardware identifier (domain id, ASID, VMID) is free.
        NoIdentifier => ENOSPC, "no hardware domain identifier is free";
        /// There is no such device.
        NoDevice => ENODEV, "no such device";
    }
}

errors! {
    /// A domain could not be attached. As in Linux, `Incompatible` tells a caller that searches for
    /// a domain to try another one.
    AttachError {
        /// This device and this domain do not go together.
        Incompatible => EINVAL, "the domain does not fit the device";
        /// The domain, or the device's IOMMU, has no such attachment.
        Unsupported => EOPNOTSUPP, "the IOMMU has no such attachment";
        /// A nested domain of a vIOMMU on which the device has no virtual id.
        NoVirtualDevice => ENOENT, "the device has no virtual id on the vIOMMU of the domain";
        /// The group is attached to something that must be detached first, or it has another owner.
        Busy => EBUSY, "the group is attached elsewhere";
        /// No memory.
        OutOfMemory => ENOMEM, "out of memory for the device's tables";
        /// The hardware does not answer.
        Hardware => EIO, "the IOMMU does not complete commands";
        /// There is no such device.
        NoDevice => ENODEV, "no such device";
    }
}

errors! {
    /// DMA ownership could not be had.
    ClaimError {
        /// Another user space owner has the group, or a kernel driver has it bound.
        Owned => EPERM, "the group's DMA has another owner";
        /// The group is attached to a domain that is not its default one, or has PASIDs attached.
        Busy => EBUSY, "the group is attached to a domain";
        /// Firmware demands that a device of the group keeps a direct mapping, so that it cannot be
        /// blocked.
        DirectMapped => EINVAL, "firmware demands a direct mapping for a device of the group";
        /// No memory for a blocking domain.
        OutOfMemory => ENOMEM, "out of memory for a blocking domain";
        /// The hardware does not answer.
        Hardware => EIO, "the IOMMU does not complete commands";
        /// There is no such device.
        NoDevice => ENODEV, "no such device";
    }
}

/// A range could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum MapError {
    /// IOVA, physical address or length is not a multiple of the granule, or the length is 0.
    Misaligned,
    /// The IOVA or the physical address passes what the format or the hardware can hold.
    OutOfRange,
    /// Something is mapped there.
    AlreadyMapped {
        /// First IOVA that is taken.
        at: Iova,
    },
    /// No memory for page tables.
    OutOfMemory,
    /// The hardware does not complete the commands that make the mapping visible.
    Hardware,
}

impl MapError {
    /// The errno that Linux gives for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Misaligned => Errno::EINVAL,
            Self::OutOfRange => Errno::ERANGE,
            Self::AlreadyMapped { .. } => Errno::EADDRINUSE,
            Self::OutOfMemory => Errno::ENOMEM,
            Self::Hardware => Errno::EIO,
        }
    }
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned => f.write_str("the range is not a multiple of the page size"),
            Self::OutOfRange => f.write_str("the range passes what the page tables can hold"),
            Self::AlreadyMapped { at } => write!(f, "{at} is mapped already"),
            Self::OutOfMemory => f.write_str("out of memory for page tables"),
            Self::Hardware => f.write_str("the IOMMU does not complete commands"),
        }
    }
}

impl core::error::Error for MapError {}
