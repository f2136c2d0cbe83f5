//! What kinds of mistakes there are, and what each one means.

use lychgate_iommu::FaultReason;
use lychgate_model::Rule;

use crate::report::{FaultStory, Reason};

/// A kind of mistake of a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind {
    /// `dma/use-after-unmap`: stable, for scripts and [`find`].
    pub id: &'static str,
    /// The rule that was broken.
    pub rule: &'static str,
    /// How it comes about, and what to do.
    pub teaches: &'static str,
}

static USE_AFTER_UNMAP: Kind = Kind {
    id: "dma/use-after-unmap",
    rule: "a mapping must outlive every command that names it",
    teaches: "A device was told of a buffer, and the buffer was unmapped before the device had done with \
              it. Here the IOMMU stopped the access; without one, or with a mapping that others use \
              by then, the device writes into memory that belongs to somebody else.\n\n\
              Wait for the completion of every command that names the buffer, or reset the device, \
              before IOMMU_IOAS_UNMAP or VFIO_IOMMU_UNMAP_DMA. A time-out of a command is no \
              completion: abort it, or reset the controller, first.",
};

static NEVER_MAPPED: Kind = Kind {
    id: "dma/never-mapped",
    rule: "a device may only be told of addresses that are mapped",
    teaches: "A device was told of an address at which nothing was ever mapped. Often a virtual address \
              was handed over in place of an IOVA, a length passes the end of the mapping (the report \
              names the neighbours), or the high half of a 64-bit register was not written.",
};

static NO_RIGHT: Kind = Kind {
    id: "dma/no-right",
    rule: "a mapping must allow what its commands do",
    teaches: "The mapping is there, but it does not allow this access: a device writes where the mapping \
              is read-only, or reads where it is write-only. Mind the direction: what the program reads \
              from a disk is what the device writes into memory.",
};

static NOT_ATTACHED: Kind = Kind {
    id: "dma/not-attached",
    rule: "a device must be attached to an IOAS before it does DMA",
    teaches: "The device was not attached to anything when it did DMA: VFIO_DEVICE_ATTACH_IOMMUFD_PT, or \
              VFIO_GROUP_SET_CONTAINER and VFIO_SET_IOMMU, come before its first command, and its last \
              command is complete before it is detached or closed.",
};

static MEMORY_GONE: Kind = Kind {
    id: "dma/memory-gone",
    rule: "memory must stay while it is mapped for DMA",
    teaches: "The mapping is there, but the memory behind it has gone: the program unmapped it, replaced \
              it, or ended, without unmapping it for the device. Linux pins such memory, so that the \
              device goes on writing into pages that the program does not see any more.",
};

static STOPPED: Kind = Kind {
    id: "dma/stopped",
    rule: "a device may only do what its mappings allow",
    teaches: "The IOMMU stopped a request for a reason that the report names.",
};

/// Every kind.
static ALL: [&Kind; 6] =
    [&USE_AFTER_UNMAP, &NEVER_MAPPED, &NO_RIGHT, &NOT_ATTACHED, &MEMORY_GONE, &STOPPED];

impl FaultStory {
    /// What kind of mistake it is.
    pub fn kind(&self) -> &'static Kind {
        if self.reason == Reason::MemoryGone {
            return &MEMORY_GONE;
        }
        if !self.history.attached {
            return &NOT_ATTACHED;
        }
        match &self.history.mapping {
            Some(mapping) if mapping.unmapped.is_some() => &USE_AFTER_UNMAP,
            Some(_) if self.reason == Reason::Iommu(FaultReason::Permission) => &NO_RIGHT,
            None if self.reason == Reason::Iommu(FaultReason::NotPresent) => &NEVER_MAPPED,
            _ => &STOPPED,
        }
    }
}

/// Something that can be explained.
#[derive(Clone, Copy, Debug)]
pub enum Explained {
    /// A kind of mistake of a program.
    Kind(&'static Kind),
    /// A rule of the IOMMU's architecture.
    Rule(&'static Rule),
}

impl Explained {
    /// Its name.
    pub fn id(&self) -> &'static str {
        match self {
            Self::Kind(kind) => kind.id,
            Self::Rule(rule) => rule.id,
        }
    }
}

/// Everything that can be explained: what programs do wrong, then what drivers do.
pub fn all() -> Vec<Explained> {
    let kinds = ALL.iter().copied().map(Explained::Kind);
    kinds.chain(lychgate_amd_vi::model::rules().iter().copied().map(Explained::Rule)).collect()
}

/// What has a name.
pub fn find(id: &str) -> Option<Explained> {
    all().into_iter().find(|explained| explained.id() == id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_found_again_and_is_the_only_one() {
        let names: BTreeSet<&str> = all().iter().map(Explained::id).collect();
        assert_eq!(names.len(), all().len());
        assert!(names.iter().all(|name| find(name).is_some_and(|found| found.id() == *name)));
        assert!(find("dma/").is_none());
    }
}
