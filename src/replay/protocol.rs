//! What a replay and its client processes say to each other: JSON, one message per line.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::tally::Tally;
use crate::connect::Door;

/// To a client, on its standard input. The end of input ends the client.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToClient {
    /// Comes first; answered by `Ready` or `Failed`.
    Setup(Setup),
    /// Answered by `Served` for every request, then `Done`.
    Session(SessionJob),
    /// Answered by `Served`, then `Done`.
    Request(RequestJob),
}

/// Whom to ask and under which names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Index of the client among all.
    pub client: usize,
    /// The daemon's Unix socket, or …
    pub socket: Option<PathBuf>,
    /// … its loopback address.
    pub address: Option<SocketAddr>,
    /// By which door.
    pub door: Door,
    /// How long to try again where no daemon answers, as while another worker starts.
    pub patience_ms: u64,
    /// One per tenant; none: no token is needed.
    pub token_files: Vec<Option<PathBuf>>,
    /// Goes into the payload, and into the namespace: another run's blocks are other blocks.
    pub generation: u64,
    /// Of the trace.
    pub block_tokens: u32,
    /// Of the payload.
    pub block_bytes: u64,
    /// Requests of sessions that may run at once in this client.
    pub requests_at_once: usize,
}

/// A session to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionJob {
    /// Its name.
    pub job: u64,
    /// Index of the tenant.
    pub tenant: usize,
    /// The session's file.
    pub file: PathBuf,
    /// No more than so many of its requests.
    pub requests_max: usize,
    /// So many of them are done already, by a client that is gone.
    pub requests_done: usize,
    /// None is begun this long after the job came; none: all are. A successor is told what is left.
    pub time_max_ms: Option<u64>,
    /// Trace seconds per second, the first request that is not done starting now; none: one request right after the other.
    pub pace: Option<f64>,
}

/// A single request to serve.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestJob {
    /// Its name.
    pub job: u64,
    /// Index of the tenant.
    pub tenant: usize,
    /// Blocks of the prompt; ids are global.
    pub hash_ids: Vec<u64>,
    /// Tokens of the prompt.
    pub input_tokens: u64,
}

/// From a client, on its standard output.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromClient {
    /// Attached for every tenant.
    Ready,
    /// Cannot go on, and why.
    Failed(String),
    /// A request is done.
    Served {
        /// Of which job.
        job: u64,
        /// By which door.
        door: Door,
        /// Counts.
        tally: Box<Tally>,
        /// Time spent in gets.
        get_us: u64,
        /// How much later than planned it started.
        late_ms: u64,
        /// Blocks with wrong bytes, in words.
        wrong: Vec<String>,
    },
    /// That job is done.
    Done(u64),
}
