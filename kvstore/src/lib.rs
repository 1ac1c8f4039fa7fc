//! The Tender daemon: one per node, owner of host memory and disk, keeper of KV blocks.
//!
//! ```text
//!  stage    request ──► admission ──► index ──► tier ──► transfer ──► completion        a stage names what is to its right, and the
//!  floor    device/{memory, block}    clock · limits · telemetry                        floor; only `pipeline` sees all six
//!
//!  gRPC threads ──Event──► core thread: pipeline::Core::step ──Action──► I/O thread per file, preparing thread, gRPC threads
//! ```
//! One core thread owns the truth ([`pipeline`]); [`driver`] feeds it and does what it asks for; [`simulate`] drives the same core
//! over a simulated disk and clock.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod admission;
pub mod completion;
pub mod device;
pub mod index;
pub mod limits;
pub mod pipeline;
pub mod request;
pub mod simulate;
pub mod tier;
pub mod transfer;
