//! The floor: hardware behind small traits, and the only place of this crate that may say `unsafe`.

pub mod block;
pub mod memory;
