//! One file per command: its flags, and what it does. Parsing and dispatch are in [`crate::cli`].

pub mod demo;
pub mod doctor;
pub mod get;
pub mod lookup;
pub mod purge;
pub mod put;
pub mod replay;
pub mod replay_client;
pub mod serve;
pub mod status;
pub mod watch;
