//! Linux's VFIO: groups, containers, cdevs and PCI devices.
