//! Which daemon, and as whom: what every client command is told by its flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tender_client::proto::wire::StatusReply;
use tender_client::proto::{BlockLayout, Namespace};
use tender_client::{Attach, Doors, Operator, Remote, Target};
use tokio::time::{Instant, sleep};

use crate::failure::Failure;

/// While a worker is being started, or ends.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// By which door of a daemon blocks go in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Door {
    /// A ring in shared memory; gRPC where there is none, as on a loopback address
    #[default]
    Ring,
    /// gRPC only
    Grpc,
}

impl Door {
    /// The one that a client uses now.
    pub fn of(store: &Remote) -> Self {
        match store.door() {
            Doors::Ring => Self::Ring,
            Doors::Grpc => Self::Grpc,
        }
    }

    /// Its name, for people and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Grpc => "grpc",
        }
    }
}

impl From<Door> for Doors {
    fn from(door: Door) -> Self {
        match door {
            Door::Ring => Self::Ring,
            Door::Grpc => Self::Grpc,
        }
    }
}

/// The flag that names a door.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct DoorArgs {
    /// How blocks go to the daemon and come back; a ring is for a Unix socket only
    #[arg(long, value_enum, default_value_t, value_name = "ring|grpc", hide_possible_values = true)]
    pub door: Door,
}

/// Flags that name a daemon.
#[derive(Args, Clone, Debug, Default)]
pub struct Connection {
    /// The daemon's Unix socket [default: where `tender serve` puts it]
    #[arg(long, env = "TENDER_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The daemon's loopback address; goes before a socket
    #[arg(long, value_name = "127.0.0.1:PORT")]
    pub address: Option<SocketAddr>,
    /// File that holds the tenant's token, in one line
    #[arg(long, env = "TENDER_TOKEN_FILE", value_name = "PATH")]
    pub token_file: Option<PathBuf>,
}

impl Connection {
    /// Where to call.
    pub fn target(&self) -> Target {
        match self.address {
            Some(address) => Target::Loopback(address),
            None => Target::Unix(self.socket.clone().unwrap_or_else(tender_kvstore::default_socket)),
        }
    }

    fn token(&self) -> Result<Option<String>, Failure> {
        self.token_file.as_deref().map(read_token).transpose()
    }

    /// Attaches under a namespace.
    pub async fn attach(&self, namespace: Namespace, layout: BlockLayout, door: Door) -> Result<Remote, Failure> {
        let attach = Attach {
            group: format!("tender-{}", std::process::id()),
            member: std::env::args().nth(1).unwrap_or_default().chars().take(64).collect(),
            namespace,
            layout,
        };
        self.attach_as(attach, door).await
    }

    /// Attaches under a name of one's own.
    pub async fn attach_as(&self, attach: Attach, door: Door) -> Result<Remote, Failure> {
        Ok(Remote::attach_by(self.target(), self.token()?, attach, door.into()).await?)
    }

    /// What the worker says of itself whose process is wanted. Waits for it, as while it is being started.
    pub async fn worker(&self, patience: Duration, is_wanted: impl Fn(u32) -> bool) -> Result<StatusReply, Failure> {
        let began = Instant::now();
        loop {
            let asked = async { Ok::<_, Failure>(self.operator().await?.status().await?) }.await;
            if asked.as_ref().is_ok_and(|status| is_wanted(status.process_id)) {
                return asked;
            }
            if began.elapsed() > patience {
                let seconds = patience.as_secs();
                return Err(asked.err().unwrap_or_else(|| {
                    let socket = self.target();
                    Failure::message(format_args!(
                        "the same process still answers at {socket} after {seconds} s; see the daemon's log"
                    ))
                }));
            }
            sleep(ASK_AGAIN_AFTER).await;
        }
    }

    /// Asks as an operator.
    pub async fn operator(&self) -> Result<Operator, Failure> {
        Ok(Operator::connect(self.target(), self.token()?).await?)
    }
}

/// The token in a file.
fn read_token(file: &Path) -> Result<String, Failure> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).map_err(Failure::of(format_args!(
        "cannot read the token file {shown}; name the file that the daemon's configuration names for this tenant"
    )))?;
    match text.trim() {
        "" => {
            Err(Failure::message(format_args!("the token file {shown} is empty; it must hold the token in one line")))
        }
        token => Ok(token.to_owned()),
    }
}
