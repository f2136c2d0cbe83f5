//! VFIO as clients call it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_iommufd::error::Result;
use lychgate_iommufd::{OpenFile, Reply};
use lychgate_machine::Call;
use lychgate_types::Errno;

use crate::process::{Program, UserBytes};

pub(crate) const BDF: &str = "0000:01:00.0";
const CONFIG_REGION: u64 = 7 << 40;

/// A call on a file, as the machine sees calls.
pub(crate) fn call<R>(program: &Program, name: &str, f: impl FnOnce() -> R) -> R {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    program.machine.call_begins(Call {
        number: NUMBER.fetch_add(1, Ordering::Relaxed),
        process: std::process::id(),
        thread: 1,
        instruction: 0x40_1000,
        name: name.into(),
    });
    let result = f();
    program.machine.call_ends();
    result
}

pub(crate) fn open(program: &Program, path: &str) -> (i32, Arc<dyn OpenFile>) {
    let file = program.machine.open(Path::new(path), program).unwrap();
    (program.add(Arc::clone(&file)), file)
}

/// An ioctl with a structure; gives the value and the structure as it came back.
pub(crate) fn ioctl(
    program: &Program,
    file: &dyn OpenFile,
    command: u32,
    words: &[u32],
) -> Result<(i32, Vec<u32>)> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let argument = UserBytes::new(&bytes);
    let value = raw(program, file, command, argument.address())?;
    let back = argument.bytes();
    Ok((value, back.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()))
}

pub(crate) fn raw(
    program: &Program,
    file: &dyn OpenFile,
    command: u32,
    argument: u64,
) -> Result<i32> {
    let name = match command {
        MAP_DMA => "VFIO_IOMMU_MAP_DMA",
        UNMAP_DMA => "VFIO_IOMMU_UNMAP_DMA",
        _ => "another",
    };
    match call(program, name, || file.ioctl(program, command, argument))? {
        Reply::Value(value) => Ok(value),
        Reply::File(new) => Ok(program.add(new.file)),
        Reply::FileAt { .. } => Ok(-1),
    }
}

pub(crate) const MAP_DMA: u32 = 0x3b71;
pub(crate) const UNMAP_DMA: u32 = 0x3b72;

pub(crate) fn halves(value: u64) -> [u32; 2] {
    [(value & 0xffff_ffff) as u32, (value >> 32) as u32]
}

/// An opened device with the file that its DMA is mapped through.
pub(crate) struct Opened {
    pub(crate) dma: Arc<dyn OpenFile>,
    pub(crate) device: Arc<dyn OpenFile>,
    group: Option<Arc<dyn OpenFile>>,
    registers: File,
}

impl Opened {
    /// Container, group, device, in qemu-img's order.
    pub(crate) fn by_group(program: &Program) -> Self {
        let (container_fd, container) = open(program, "/dev/vfio/vfio");
        assert_eq!(raw(program, &*container, 0x3b64, 0).unwrap(), 0);
        assert_eq!(raw(program, &*container, 0x3b65, 1).unwrap(), 1);
        let link = program.machine.tree().join("sys/bus/pci/devices").join(BDF).join("iommu_group");
        let number = fs::read_link(link).unwrap();
        let (_, group) =
            open(program, &format!("/dev/vfio/{}", number.file_name().unwrap().to_str().unwrap()));
        let (_, status) = ioctl(program, &*group, 0x3b67, &[8, 0]).unwrap();
        assert_eq!(status[1], 1, "viable, without container");
        ioctl(program, &*group, 0x3b68, &[u32::try_from(container_fd).unwrap()]).unwrap();
        raw(program, &*container, 0x3b66, 1).unwrap();
        let name = UserBytes::new(format!("{BDF}\0").as_bytes());
        let fd = raw(program, &*group, 0x3b6a, name.address()).unwrap();
        Self::new(program, container, fd, Some(group))
    }

    /// iommufd and the device's own node, in QEMU's order; gives the IOAS too.
    pub(crate) fn by_cdev(program: &Program) -> (Self, u32) {
        let (iommufd, iommu) = open(program, "/dev/iommu");
        let (fd, device) = open(program, "/dev/vfio/devices/vfio0");
        ioctl(program, &*device, 0x3b76, &[16, 0, u32::try_from(iommufd).unwrap(), 0]).unwrap();
        let (_, alloc) = ioctl(program, &*iommu, 0x3b81, &[12, 0, 0]).unwrap();
        ioctl(program, &*device, 0x3b77, &[12, 0, alloc[2]]).unwrap();
        (Self::new(program, iommu, fd, None), alloc[2])
    }

    fn new(
        program: &Program,
        dma: Arc<dyn OpenFile>,
        fd: i32,
        group: Option<Arc<dyn OpenFile>>,
    ) -> Self {
        let device = lychgate_iommufd::Client::file(program, fd).unwrap();
        let (_, region) = ioctl(program, &*device, 0x3b6c, &[32, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        assert_eq!(region[1] & 7, 7, "readable, writable, mappable");
        let registers = File::from(device.backing().unwrap().try_clone_to_owned().unwrap());
        let opened = Self { dma, device, group, registers };
        // Memory decoding and bus mastering.
        let command = UserBytes::new(&6_u16.to_le_bytes());
        opened.device.write_at(program, command.address(), 2, CONFIG_REGION + 4).unwrap();
        opened
    }

    pub(crate) fn map(&self, program: &Program, address: u64, iova: u64, len: u64) -> Result<()> {
        let words = [&[32, 3][..], &halves(address), &halves(iova), &halves(len)].concat();
        ioctl(program, &*self.dma, MAP_DMA, &words).map(drop)
    }

    pub(crate) fn unmap(&self, program: &Program, iova: u64, len: u64) -> Result<()> {
        let words = [&[24, 0][..], &halves(iova), &halves(len)].concat();
        ioctl(program, &*self.dma, UNMAP_DMA, &words).map(drop)
    }

    /// MSI-X vectors, each with an eventfd.
    pub(crate) fn enable_msix(&self, program: &Program, fds: &[i32]) -> Result<()> {
        let count = u32::try_from(fds.len()).unwrap();
        let mut words = vec![20 + 4 * count, 1 << 2 | 1 << 5, 2, 0, count];
        words.extend(fds.iter().map(|fd| fd.cast_unsigned()));
        ioctl(program, &*self.device, 0x3b6e, &words).map(drop)
    }

    pub(crate) fn register(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read_exact_at(&mut bytes, offset).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn set_register(&self, offset: u64, value: u32) {
        self.registers.write_all_at(&value.to_le_bytes(), offset).unwrap();
    }

    /// Closes as a program that ends.
    pub(crate) fn close(self) {
        self.device.release();
        if let Some(group) = &self.group {
            group.release();
        }
        self.dma.release();
    }
}

/// The errno of a refusal.
pub(crate) fn errno<T>(result: Result<T>) -> Option<Errno> {
    result.err().map(|refusal| refusal.errno)
}
