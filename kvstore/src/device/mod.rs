//! The floor: hardware and kernel behind small interfaces, and the only place of this crate that may say `unsafe`.
//!
//! Memory by who writes it: [`shared`] (the daemon; clients map it for reading), [`ingest`] (one client; the daemon only reads),
//! [`table`] (the daemon; nobody else maps it). [`memory`] is the arena over the first two.

pub mod block;
pub mod ingest;
mod memfd;
pub mod memory;
pub mod shared;
pub mod table;

#[cfg(test)]
mod tests;
