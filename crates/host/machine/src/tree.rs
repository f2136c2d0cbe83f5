//! The part of `/dev` and `/sys` that the machine adds to the host's: real directories, files and
//! relative links, so that listing and resolving them needs no help.

mod builder;
mod pci;

use std::io;
use std::path::{Path, PathBuf};

use lychgate_types::Bdf;
use tempfile::TempDir;

use crate::system::Node;
use builder::Builder;

/// A PCI function as sysfs shows it.
#[derive(Clone, Debug)]
pub struct FunctionNode {
    /// Where it is.
    pub bdf: Bdf,
    /// The port above it; `None` on the root bus.
    pub port: Option<Bdf>,
    /// Its configuration space, as hardware presents it.
    pub config: Vec<u8>,
    /// Its six BARs and its ROM: first address, last address, `IORESOURCE_*` flags; zeros for none.
    pub resources: [[u64; 3]; 7],
    /// The number of its IOMMU group; `None` for what has no IOMMU above it.
    pub group: Option<u32>,
    /// The reserved regions of its group: first address, last address, type as sysfs spells it.
    pub reserved: Vec<(u64, u64, &'static str)>,
    /// The driver that is bound to it.
    pub driver: Option<&'static str>,
    /// The number in `vfioN`, for a device that `vfio-pci` is bound to, and its device node.
    pub vfio: Option<(u32, Node)>,
}

/// The machine's IOMMU as sysfs shows it.
#[derive(Clone, Debug)]
pub struct IommuNode {
    /// The function that it is.
    pub bdf: Bdf,
    /// Its name in `/sys/class/iommu`: `ivhd0`.
    pub name: &'static str,
    /// Attributes of its vendor: directory, file, content.
    pub attributes: Vec<(&'static str, &'static str, String)>,
}

/// Everything that the tree shows.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// The functions, ports included.
    pub functions: Vec<FunctionNode>,
    /// The IOMMU.
    pub iommu: Option<IommuNode>,
    /// Device nodes by absolute path, besides those of the devices: `/dev/iommu`.
    pub nodes: Vec<(PathBuf, Node)>,
    /// The device nodes of the groups, by group number.
    pub groups: Vec<(u32, Node)>,
    /// Attributes that can be written: absolute path, and what they show.
    pub attributes: Vec<(String, String)>,
}

/// The tree on the host's file system. It ends with the value.
#[derive(Debug)]
pub struct Tree {
    directory: TempDir,
    nodes: Vec<(PathBuf, Node)>,
}

impl Tree {
    /// Writes the tree into a private directory: in `place`, or in memory where the host has such a
    /// place.
    pub fn new(content: &Content, place: Option<&Path>) -> io::Result<Self> {
        let directory = private_directory(place)?;
        let mut builder = Builder::new(directory.path());
        let mut nodes = content.nodes.clone();
        for (number, node) in &content.groups {
            nodes.push((format!("/dev/vfio/{number}").into(), *node));
            pci::group(&mut builder, *number, *node)?;
        }
        for function in &content.functions {
            if let Some((number, node)) = function.vfio {
                nodes.push((format!("/dev/vfio/devices/vfio{number}").into(), node));
            }
            pci::function(&mut builder, content, function)?;
        }
        if let Some(iommu) = &content.iommu {
            pci::iommu(&mut builder, content, iommu)?;
        }
        for module in ["iommufd", "vfio", "vfio_iommu_type1", "vfio_pci"] {
            builder.directory(&format!("/sys/module/{module}"))?;
        }
        for (path, text) in &content.attributes {
            builder.writable(path, text)?;
        }
        for (path, _) in &nodes {
            builder.file(&path.to_string_lossy(), b"")?;
        }
        Ok(Self { directory, nodes })
    }

    /// The directory that holds `dev` and `sys`.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The device node at an absolute path as programs spell it.
    pub fn node(&self, path: &Path) -> Option<Node> {
        self.nodes.iter().find(|(at, _)| at == path).map(|(_, node)| *node)
    }
}

/// A directory of our own, preferably in memory: the tree is many small files, and it is written
/// before the program starts.
fn private_directory(place: Option<&Path>) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("lychgate-");
    if let Some(place) = place {
        return builder.tempdir_in(place);
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let in_memory = runtime.into_iter().chain([PathBuf::from("/dev/shm")]);
    in_memory
        .filter(|place| place.is_absolute())
        .find_map(|place| builder.tempdir_in(place).ok())
        .map_or_else(|| builder.tempdir(), Ok)
}

#[cfg(test)]
mod tests;
