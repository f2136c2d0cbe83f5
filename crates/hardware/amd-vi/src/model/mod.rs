//! The model: registers and behaviour.
