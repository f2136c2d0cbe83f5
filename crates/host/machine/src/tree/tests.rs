//! What clients look for in the tree, found the way they look for it.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn content() -> Content {
    let node = |major, minor| Node { major, minor, mode: 0o666 };
    let mut config = vec![0; 4096];
    config[..12].copy_from_slice(&[0x36, 0x1b, 0x10, 0, 6, 0, 0x10, 0, 2, 0x02, 0x08, 0x01]);
    let port: Bdf = "0000:00:01.0".parse().unwrap();
    let bdf = "0000:01:00.0".parse().unwrap();
    let function = FunctionNode {
        bdf,
        port: Some(port),
        config: config.clone(),
        resources: [[0; 3]; 7],
        group: Some(3),
        reserved: vec![(0xfee0_0000, 0xfeef_ffff, "msi")],
        driver: Some("vfio-pci"),
        vfio: Some((0, node(511, 0))),
    };
    let above = FunctionNode { bdf: port, port: None, group: None, vfio: None, ..function.clone() };
    Content {
        functions: vec![above, function],
        iommu: Some(IommuNode {
            bdf: "0000:00:00.2".parse().unwrap(),
            name: "ivhd0",
            attributes: vec![("amd-iommu", "features", "58da".to_owned())],
        }),
        nodes: vec![("/dev/iommu".into(), node(10, 125))],
        groups: vec![(3, node(243, 0))],
        attributes: vec![("/sys/kernel/debug/failslab/verbose".to_owned(), "2\n".to_owned())],
    }
}

fn read(tree: &Tree, path: &str) -> String {
    fs::read_to_string(tree.path().join(path)).unwrap()
}

#[test]
fn a_client_finds_the_group_and_the_cdev_of_a_device() {
    let tree = Tree::new(&content(), None).unwrap();
    let device = tree.path().join("sys/bus/pci/devices/0000:01:00.0");
    let group = fs::read_link(device.join("iommu_group")).unwrap();
    assert_eq!(group.file_name().unwrap(), "3");
    let names = fs::read_dir(device.join("vfio-dev")).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["vfio0"]);
    assert_eq!(read(&tree, "sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio0/dev"), "511:0\n");
    assert_eq!(tree.node(Path::new("/dev/vfio/devices/vfio0")).unwrap().major, 511);
    assert_eq!(tree.node(Path::new("/dev/vfio/3")).unwrap().major, 243);
    assert_eq!(tree.node(Path::new("/dev/null")), None);
}

#[test]
fn attributes_come_from_configuration_space() {
    let tree = Tree::new(&content(), None).unwrap();
    let at = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0";
    assert_eq!(read(&tree, &format!("{at}/vendor")), "0x1b36\n");
    assert_eq!(read(&tree, &format!("{at}/class")), "0x010802\n");
    assert!(read(&tree, &format!("{at}/uevent")).contains("PCI_ID=1B36:0010\n"));
    assert_eq!(
        read(&tree, "sys/kernel/iommu_groups/3/reserved_regions"),
        "0x00000000fee00000 0x00000000feefffff msi\n"
    );
}

#[test]
fn attributes_that_can_be_written_say_so() {
    let tree = Tree::new(&content(), None).unwrap();
    let at = "sys/kernel/debug/failslab/verbose";
    assert_eq!(read(&tree, at), "2\n");
    assert_eq!(fs::metadata(tree.path().join(at)).unwrap().permissions().mode() & 0o777, 0o644);
}

#[test]
fn every_link_leads_somewhere_in_the_tree() {
    let tree = Tree::new(&content(), None).unwrap();
    let mut left = vec![tree.path().to_owned()];
    let mut links = 0;
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_symlink() {
                links += 1;
                let target = fs::canonicalize(entry.path()).unwrap_or_else(|error| {
                    panic!("{}: {error}", entry.path().display());
                });
                assert!(target.starts_with(fs::canonicalize(tree.path()).unwrap()));
            }
        }
    }
    assert!(links > 10);
}

#[test]
fn the_tree_ends_with_its_value() {
    let tree = Tree::new(&content(), None).unwrap();
    let path = tree.path().to_owned();
    drop(tree);
    assert!(!path.exists());
}
