//! The two ways to a VFIO device.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioIommufd, VfioOps};

/// How the device is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `/dev/iommu` and `/dev/vfio/devices/vfioN`.
    Iommufd,
    /// `/dev/vfio/vfio` and `/dev/vfio/GROUP`.
    Container,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Iommufd => "/dev/iommu, /dev/vfio/devices/",
            Self::Container => "/dev/vfio/vfio, /dev/vfio/GROUP",
        })
    }
}

/// An open device and the address space that its DMA goes through.
pub struct Opened {
    /// The device.
    pub device: VfioDevice,
    /// The address space.
    pub space: Arc<dyn VfioOps>,
    next_iova: AtomicU64,
}

impl Way {
    /// Opens the device at a PCI address.
    pub fn open(self, bdf: &str) -> Result<Opened> {
        let sysfs: PathBuf = Path::new("/sys/bus/pci/devices").join(bdf);
        let space: Arc<dyn VfioOps> = match self {
            Self::Iommufd => {
                let iommufd = Arc::new(IommuFd::new().context("opening /dev/iommu")?);
                Arc::new(VfioIommufd::new(iommufd, None, None).context("allocating an IOAS")?)
            }
            Self::Container => Arc::new(VfioContainer::new(None).context("opening a container")?),
        };
        let device = VfioDevice::new(&sysfs, Arc::clone(&space), true)
            .with_context(|| format!("opening {bdf} through {self}"))?;
        Ok(Opened { device, space, next_iova: AtomicU64::new(1 << 30) })
    }
}

impl Opened {
    /// IOVAs for `len` bytes that were not used before.
    pub fn iova(&self, len: u64) -> u64 {
        self.next_iova.fetch_add(len.next_multiple_of(1 << 21), Ordering::Relaxed)
    }

    /// A descriptor of the device that may be mapped.
    pub fn device_file(&self) -> Result<File> {
        // SAFETY: `device` keeps the descriptor open for as long as `self` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) };
        Ok(File::from(fd.try_clone_to_owned()?))
    }
}
