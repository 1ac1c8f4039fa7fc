//! Which daemon, and as whom: what every client command is told by its flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use tender_client::proto::{BlockLayout, Namespace};
use tender_client::{Attach, Operator, Remote, Target};

use crate::failure::Failure;

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
    pub async fn attach(&self, namespace: Namespace, layout: BlockLayout) -> Result<Remote, Failure> {
        let attach = Attach {
            group: format!("tender-{}", std::process::id()),
            member: std::env::args().nth(1).unwrap_or_default().chars().take(64).collect(),
            namespace,
            layout,
        };
        self.attach_as(attach).await
    }

    /// Attaches under a name of one's own.
    pub async fn attach_as(&self, attach: Attach) -> Result<Remote, Failure> {
        Ok(Remote::attach(self.target(), self.token()?, attach).await?)
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
