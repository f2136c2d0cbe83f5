//! AMD-Vi, the AMD IOMMU (AMD 48882): layouts, driver and register-level model.
//!
//! [`spec`] says where a bit lies. The driver and the model share it and nothing else: each is its
//! own reading of the specification, so that running one against the other means something.
//!
//! Feature `model` (default) builds the model, which needs `std`; without it the crate is
//! `no_std` with `alloc`.

#![cfg_attr(not(feature = "model"), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod driver;
#[cfg(feature = "model")]
pub mod model;
pub mod spec;
