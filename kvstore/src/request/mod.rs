//! Wire in, domain out. The only folder that knows tonic: it checks every field once, asks the core in the words of [`verb`], and moves
//! payload between socket and arena.
//!
//! ```text
//! listen.rs    sockets, and who is behind them      server.rs    one function per rpc
//! identity.rs  token or socket -> tenant            put.rs  get.rs  watch.rs    the streams
//! session.rs   what an attachment said              operator.rs  status and configuration
//! window.rs    how much of host memory they hold
//! door.rs      the local door: rings, and memory to map   connection.rs   one client's connection to it
//!                                                   closing.rs   what clients sent is closed where it may wait
//! ```

mod closing;
mod connection;
pub mod door;
mod get;
pub mod identity;
pub mod listen;
mod operator;
mod put;
pub mod server;
mod session;
mod watch;
mod window;
