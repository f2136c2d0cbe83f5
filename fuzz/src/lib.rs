//! What the fuzz targets share: a host for functions that do DMA, a client and an IOMMU driver for
//! the user interfaces, and a naive reading of AMD's page tables.
//!
//! Everything here is the plain side of a comparison. It checks what is done to it and panics where
//! a crate breaks its contract, which is how a fuzzer learns of a finding.

#![forbid(unsafe_code)]

pub mod amd;
pub mod client;
pub mod content;
pub mod driver;
pub mod host;
pub mod memory;
pub mod pages;
