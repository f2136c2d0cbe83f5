//! PCI functions that do DMA: an NVMe controller and edu.
