//! PCI functions, their groups and their IOMMU in sysfs (`Documentation/ABI/testing/sysfs-bus-pci`,
//! `sysfs-kernel-iommu_groups`, `sysfs-class-iommu`).

use std::io;

use lychgate_types::Bdf;

use super::builder::Builder;
use super::{Content, FunctionNode, IommuNode};
use crate::system::Node;

/// Where a function's directory is, below the ports above it.
pub(super) fn path(content: &Content, bdf: Bdf) -> String {
    let mut names = vec![bdf.to_string()];
    let mut at = bdf;
    // A port is above what it leads to: a chain longer than all functions would be a circle.
    for _ in 0..content.functions.len() {
        let port = content.functions.iter().find(|function| function.bdf == at);
        let Some(port) = port.and_then(|function| function.port) else { break };
        names.push(port.to_string());
        at = port;
    }
    names.reverse();
    format!("/sys/devices/pci{:04x}:00/{}", bdf.segment, names.join("/"))
}

/// A function's own directory, and the links to it.
pub(super) fn function(
    tree: &mut Builder<'_>,
    content: &Content,
    function: &FunctionNode,
) -> io::Result<()> {
    let at = path(content, function.bdf);
    let id = Identity::of(&function.config);
    for (name, value) in id.attributes() {
        tree.line(&format!("{at}/{name}"), &value)?;
    }
    tree.file(&format!("{at}/config"), &function.config)?;
    tree.file(&format!("{at}/resource"), resource(function).as_bytes())?;
    for (name, value) in [
        ("driver_override", "(null)"),
        ("enable", if function.driver.is_some() { "1" } else { "0" }),
        ("numa_node", "-1"),
        ("power_state", "D0"),
        ("dma_mask_bits", "64"),
        ("broken_parity_status", "0"),
        ("msi_bus", "1"),
    ] {
        tree.line(&format!("{at}/{name}"), value)?;
    }
    tree.file(&format!("{at}/uevent"), uevent(function, &id).as_bytes())?;
    tree.link(&format!("{at}/subsystem"), "/sys/bus/pci")?;
    tree.link(&format!("/sys/bus/pci/devices/{}", function.bdf), &at)?;
    if let Some(driver) = function.driver {
        let driver = format!("/sys/bus/pci/drivers/{driver}");
        tree.directory(&driver)?;
        tree.link(&format!("{at}/driver"), &driver)?;
        tree.link(&format!("{driver}/{}", function.bdf), &at)?;
    }
    if let Some(number) = function.group {
        let group = format!("/sys/kernel/iommu_groups/{number}");
        tree.link(&format!("{at}/iommu_group"), &group)?;
        tree.link(&format!("{group}/devices/{}", function.bdf), &at)?;
        let mut text = String::new();
        for (first, last, kind) in &function.reserved {
            text += &format!("{first:#018x} {last:#018x} {kind}\n");
        }
        tree.file(&format!("{group}/reserved_regions"), text.as_bytes())?;
        // While user space owns a group it is in a domain of its owner (`iommu_group_show_type`).
        tree.line(&format!("{group}/type"), "unmanaged")?;
        if let Some(iommu) = &content.iommu {
            let iommu_path = format!("{}/iommu/{}", path(content, iommu.bdf), iommu.name);
            tree.link(&format!("{at}/iommu"), &iommu_path)?;
            tree.link(&format!("{iommu_path}/devices/{}", function.bdf), &at)?;
        }
    }
    if let Some((number, node)) = function.vfio {
        let device = format!("{at}/vfio-dev/vfio{number}");
        let name = format!("vfio/devices/vfio{number}");
        character_device(tree, &device, "vfio-dev", &name, node)?;
        tree.link(&format!("{device}/device"), &at)?;
    }
    Ok(())
}

/// A group's entry in the class of VFIO groups.
pub(super) fn group(tree: &mut Builder<'_>, number: u32, node: Node) -> io::Result<()> {
    let at = format!("/sys/devices/virtual/vfio/{number}");
    character_device(tree, &at, "vfio", &format!("vfio/{number}"), node)
}

/// The IOMMU in the class of IOMMUs.
pub(super) fn iommu(
    tree: &mut Builder<'_>,
    content: &Content,
    iommu: &IommuNode,
) -> io::Result<()> {
    let device = path(content, iommu.bdf);
    let at = format!("{device}/iommu/{}", iommu.name);
    tree.directory(&format!("{at}/devices"))?;
    for (directory, name, value) in &iommu.attributes {
        tree.line(&format!("{at}/{directory}/{name}"), value)?;
    }
    tree.link(&format!("{at}/device"), &device)?;
    tree.link(&format!("{at}/subsystem"), "/sys/class/iommu")?;
    tree.link(&format!("/sys/class/iommu/{}", iommu.name), &at)
}

fn character_device(
    tree: &mut Builder<'_>,
    at: &str,
    class: &str,
    devname: &str,
    node: Node,
) -> io::Result<()> {
    let (major, minor) = (node.major, node.minor);
    let name = at.rsplit('/').next().unwrap_or(at);
    tree.line(&format!("{at}/dev"), &format!("{major}:{minor}"))?;
    let uevent = format!("MAJOR={major}\nMINOR={minor}\nDEVNAME={devname}\n");
    tree.file(&format!("{at}/uevent"), uevent.as_bytes())?;
    tree.link(&format!("{at}/subsystem"), &format!("/sys/class/{class}"))?;
    tree.link(&format!("/sys/class/{class}/{name}"), at)?;
    tree.link(&format!("/sys/dev/char/{major}:{minor}"), at)
}

fn resource(function: &FunctionNode) -> String {
    let lines = function.resources.iter();
    lines
        .map(|[first, last, flags]| format!("{first:#018x} {last:#018x} {flags:#018x}\n"))
        .collect()
}

fn uevent(function: &FunctionNode, id: &Identity) -> String {
    let mut text = String::new();
    if let Some(driver) = function.driver {
        text += &format!("DRIVER={driver}\n");
    }
    text += &format!("PCI_CLASS={:X}\n", id.class);
    text += &format!("PCI_ID={:04X}:{:04X}\n", id.vendor, id.device);
    text += &format!("PCI_SUBSYS_ID={:04X}:{:04X}\n", id.subsystem_vendor, id.subsystem_device);
    text += &format!("PCI_SLOT_NAME={}\n", function.bdf);
    text + &format!("MODALIAS={}\n", id.modalias())
}

/// The identifiers in a configuration header (PCI Local Bus 3.0 6.2.1).
struct Identity {
    vendor: u16,
    device: u16,
    subsystem_vendor: u16,
    subsystem_device: u16,
    class: u32,
    revision: u8,
    interrupt_line: u8,
}

impl Identity {
    fn of(config: &[u8]) -> Self {
        let byte = |at: usize| config.get(at).copied().unwrap_or(0xff);
        let word = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
        Self {
            vendor: word(0x00),
            device: word(0x02),
            subsystem_vendor: word(0x2c),
            subsystem_device: word(0x2e),
            class: u32::from_le_bytes([byte(0x09), byte(0x0a), byte(0x0b), 0]),
            revision: byte(0x08),
            interrupt_line: byte(0x3c),
        }
    }

    fn attributes(&self) -> [(&'static str, String); 8] {
        [
            ("vendor", format!("{:#06x}", self.vendor)),
            ("device", format!("{:#06x}", self.device)),
            ("subsystem_vendor", format!("{:#06x}", self.subsystem_vendor)),
            ("subsystem_device", format!("{:#06x}", self.subsystem_device)),
            ("class", format!("{:#08x}", self.class)),
            ("revision", format!("{:#04x}", self.revision)),
            ("irq", self.interrupt_line.to_string()),
            ("modalias", self.modalias()),
        ]
    }

    fn modalias(&self) -> String {
        let [interface, sub, base, _] = self.class.to_le_bytes();
        format!(
            "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{base:02X}sc{sub:02X}i{interface:02X}",
            self.vendor, self.device, self.subsystem_vendor, self.subsystem_device
        )
    }
}
