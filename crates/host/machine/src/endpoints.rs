//! The devices of a machine: made, given registers that clients map, and bound to vfio-pci.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use lychgate_endpoints::{Edu, EduConfig, MemoryStorage, Namespace, Nvme, NvmeConfig, Storage};
use lychgate_model::{Bar, BarKind, PciFunction, RegisterFile, Upstream};
use lychgate_types::Bdf;
use rustix::fs::{MemfdFlags, SealFlags};

use crate::builder::{BuildError, Endpoint, NamespaceSource};
use crate::bus::Bus;
use crate::image;
use crate::mapped::Mapping;

/// A device, and the file that clients map for its registers.
pub(crate) struct Made {
    pub(crate) function: Arc<dyn PciFunction>,
    pub(crate) regions: Option<OwnedFd>,
}

/// Registers in a file that clients map too.
struct MappedRegisters(Mapping);

impl RegisterFile for MappedRegisters {
    fn words(&self) -> &[AtomicU32] {
        self.0.words32()
    }
}

/// Makes a device whose DMA goes to `bus`.
pub(crate) fn make(bdf: Bdf, endpoint: Endpoint, bus: &Arc<Bus>) -> Result<Made, BuildError> {
    let upstream: Arc<dyn Upstream> = Arc::clone(bus) as _;
    match endpoint {
        Endpoint::Nvme(sources) => nvme(bdf, sources, upstream),
        Endpoint::Edu => {
            let config = EduConfig { requester: bdf.requester, ..EduConfig::default() };
            Ok(Made { function: Arc::new(Edu::new(config, upstream)), regions: None })
        }
    }
}

fn nvme(
    bdf: Bdf,
    sources: Vec<NamespaceSource>,
    upstream: Arc<dyn Upstream>,
) -> Result<Made, BuildError> {
    let storages = sources.into_iter().map(storage).collect::<Result<Vec<_>, _>>()?;
    let namespaces = (1..)
        .zip(storages)
        .map(|(nsid, storage)| Namespace { nguid: nguid(bdf, nsid), ..Namespace::new(storage) });
    // BAR 0, whose mappable part is its registers and doorbells.
    const MAPPABLE: usize = 0x2000;
    let (file, mapping) = registers(bdf, MAPPABLE)
        .map_err(BuildError::host("make the memory of a device's registers"))?;
    let config = NvmeConfig {
        requester: bdf.requester,
        serial: format!("lychgate-{:04x}", bdf.requester.get()),
        ..NvmeConfig::default()
    };
    let registers = Arc::new(MappedRegisters(mapping));
    let nvme = Nvme::new(&config, upstream, registers, namespaces.collect())
        .map_err(|error| BuildError::Nvme { bdf, error })?;
    Ok(Made { function: Arc::new(nvme), regions: Some(file) })
}

fn storage(source: NamespaceSource) -> Result<Arc<dyn Storage>, BuildError> {
    match source {
        NamespaceSource::File { path, read_only } => Ok(Arc::new(image::open(&path, read_only)?)),
        NamespaceSource::Memory { bytes } => {
            let storage = Some(bytes)
                .filter(|bytes| *bytes > 0 && bytes.is_multiple_of(512))
                .and_then(|bytes| MemoryStorage::new(bytes).ok());
            Ok(Arc::new(storage.ok_or(BuildError::DiskSize { bytes })?))
        }
    }
}

/// An identifier that differs between all namespaces of a machine: a locally administered EUI-64
/// extended by controller and namespace.
fn nguid(bdf: Bdf, nsid: u32) -> [u8; 16] {
    let [high, low] = bdf.requester.get().to_be_bytes();
    let [a, b, c, d] = nsid.to_be_bytes();
    [a, b, c, d, 0, 0, high, low, 0x02, b'l', b'y', b'c', b'h', 0, high, low]
}

/// A file of `len` bytes that nobody can truncate, and our own mapping of it. Region `i` of a device
/// is at `i << 40`; BAR 0 is all that has a mappable part.
fn registers(bdf: Bdf, len: usize) -> std::io::Result<(OwnedFd, Mapping)> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(format!("vfio-{bdf}"), flags)?;
    File::from(file.try_clone()?).set_len(len as u64)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    let mapping = Mapping::shared(file.as_fd(), 0, len)?;
    Ok((file, mapping))
}

/// Where the firmware puts BARs.
pub(crate) struct BarWindows {
    next32: u64,
    next64: u64,
}

impl Default for BarWindows {
    fn default() -> Self {
        Self { next32: 0xe000_0000, next64: 0x70_0000_0000 }
    }
}

impl BarWindows {
    /// Gives each BAR of a function an address, and the resources as sysfs shows them.
    pub(crate) fn assign(&mut self, function: &dyn PciFunction) -> [[u64; 3]; 7] {
        let mut resources = [[0; 3]; 7];
        for ((at, bar), resource) in (0x10..).step_by(4).zip(function.bars()).zip(&mut resources) {
            let Some(bar) = bar else { continue };
            let next =
                if bar.kind == BarKind::Memory64 { &mut self.next64 } else { &mut self.next32 };
            let start = next.next_multiple_of(bar.size.max(4096));
            *next = start + bar.size;
            let bytes = start.to_le_bytes();
            let len = if bar.kind == BarKind::Memory64 { 8 } else { 4 };
            function.config_write(at, bytes.get(..len).unwrap_or(&[]));
            *resource = [start, start + bar.size - 1, resource_flags(&bar)];
        }
        resources
    }
}

/// `IORESOURCE_*` and the low bits of the BAR (`include/linux/ioport.h`).
fn resource_flags(bar: &Bar) -> u64 {
    const MEM: u64 = 0x200;
    const PREFETCH: u64 = 0x2000 | 0x8;
    const SIZEALIGN: u64 = 0x4_0000;
    const MEM_64: u64 = 0x10_0000 | 0x4;
    let wide = if bar.kind == BarKind::Memory64 { MEM_64 } else { 0 };
    let prefetch = if bar.prefetchable { PREFETCH } else { 0 };
    MEM | SIZEALIGN | wide | prefetch
}
