//! The Tender daemon: one per node, owner of host memory and disk, keeper of KV blocks.
//!
//! ```text
//!  stage    request ──► admission ──► index ──► tier ──► transfer ──► completion        a stage names what is to its right, and the
//!  floor    device/{memory, block}    names · verb · status · clock · limits            floor; only `pipeline` sees all six
//!
//!  gRPC threads ──Event──► core thread: pipeline::Core::step ──Action──► I/O thread per file, preparing thread, gRPC threads
//! ```
//! A keeper ([`keep`]) holds what outlives a crash and starts the worker ([`work`]), which is all of the above.
//!
//! One core thread owns the truth ([`pipeline`]); [`driver`] feeds it and does what it asks for; [`simulate`] drives the same core
//! over a simulated disk and clock.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod admission;
mod clock;
pub mod completion;
pub mod config;
pub mod device;
mod doctor;
mod driver;
pub mod index;
mod keeper;
pub mod limits;
pub mod names;
pub mod pipeline;
pub mod request;
mod serve;
pub mod simulate;
mod size;
pub mod status;
mod telemetry;
pub mod tier;
pub mod transfer;
pub mod verb;

pub use config::{Config, ConfigError, Overrides, default_socket};
pub use doctor::{Finding, Verdict, doctor};
pub use keeper::{Ended, keep};
pub use serve::{StartError, work};
pub use size::{Size, SizeError};
