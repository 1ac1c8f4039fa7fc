//! The `tender` command: serves the store, asks it, and shows what it does.
//!
//! ```text
//! cli ──► commands ──► connect, identity        whom to ask, about which blocks
//!                 ├──► replay ──► trace         workloads, and a store held against them
//!                 └──► output, units            what is shown
//! ```

pub mod cli;
mod commands;
mod connect;
mod failure;
mod identity;
mod lifeline;
mod output;
mod replay;
mod scratch;
pub mod trace;
mod units;
