//! `tender serve`: the daemon of this node.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use tender_kvstore::{Config, Ended, Overrides};
use tokio::time::Instant;

use crate::connect::Connection;
use crate::failure::Failure;
use crate::lifeline::die_with;
use crate::units::{self, parse_bytes};

/// Flags override the environment (TENDER_*), which overrides the configuration file.
#[derive(Args, Debug)]
pub struct Serve {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// Have the daemon that runs at this socket replace its worker by one of the binary that is there now, and wait for it
    #[arg(long)]
    replace: bool,
    /// Be the worker of the keeper whose socket is the standard input
    #[arg(long, hide = true)]
    worker: bool,
    /// End when this process does
    #[arg(long, hide = true, value_name = "PROCESS")]
    parent: Option<u32>,
}

/// Settings of a daemon as flags; `doctor` takes the same.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Unix socket to listen on
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Loopback address to listen on; needs a token file
    #[arg(long, value_name = "127.0.0.1:PORT")]
    listen: Option<SocketAddr>,
    /// Folder of the disk tier
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// Host memory for blocks
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    host: Option<u64>,
    /// Disk space for blocks; 0 for no disk tier
    #[arg(long, value_parser = parse_bytes, value_name = "SIZE")]
    disk: Option<u64>,
    /// File that holds the token of the tenant `default`, in one line
    #[arg(long, value_name = "PATH")]
    token_file: Option<PathBuf>,
    /// Loopback address for Prometheus metrics
    #[arg(long, value_name = "127.0.0.1:PORT")]
    metrics: Option<SocketAddr>,
    /// What to log, such as `info` or `tender_kvstore=debug`
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

impl Settings {
    /// As the daemon's library takes them.
    pub fn overrides(self) -> Overrides {
        let Self { socket, listen, dir, host, disk, token_file, metrics, log } = self;
        Overrides { socket, listen, dir, host, disk, token_file, metrics, log }
    }
}

/// The drain of the worker that ends, its last words, and the start of the next one.
const REPLACE_TIME_MAX: Duration = Duration::from_secs(60);

impl Serve {
    /// Whether a daemon that runs is meant.
    pub fn is_replacement(&self) -> bool {
        self.replace
    }

    /// Has the running daemon replace its worker, and waits until another process answers.
    pub async fn replace(self) -> Result<(), Failure> {
        let config = Config::load(self.config.as_deref(), &self.settings.overrides()).map_err(Failure::message)?;
        let connection = Connection { socket: Some(config.socket.clone()), ..Connection::default() };
        let operator = connection.operator().await?;
        let before = operator.status().await?.process_id;
        operator.replace().await?;
        eprintln!("process {before} ends what is under way; the next one is waited for");
        let asked = Instant::now();
        let after = connection.worker(REPLACE_TIME_MAX, |process| process != before).await?;
        let (process, version, time) = (after.process_id, after.version, units::duration(asked.elapsed()));
        eprintln!("process {process} (tender {version}) serves now, {time} later");
        Ok(())
    }

    /// Serves until SIGTERM or SIGINT.
    pub fn run(self) -> Result<(), Failure> {
        if let Some(parent) = self.parent.filter(|_| !self.worker) {
            die_with(parent)?;
        }
        let config = Config::load(self.config.as_deref(), &self.settings.overrides()).map_err(Failure::message)?;
        if self.worker {
            let socket = std::io::stdin().as_fd().try_clone_to_owned();
            let socket = socket.map_err(Failure::of("cannot take the keeper's socket"))?;
            return tender_kvstore::work(config, socket).map_err(Failure::message);
        }
        // By its path: an upgrade puts another file there, from which the next worker is started.
        let binary = std::env::current_exe().map_err(Failure::of("cannot find this program's own file"))?;
        let worker = || {
            let mut command = Command::new(&binary);
            command.args(std::env::args_os().skip(1)).arg("--worker");
            command
        };
        match tender_kvstore::keep(&config, worker).map_err(Failure::message)? {
            Ended::Well => Ok(()),
            Ended::Badly => Err(Failure::Bad),
        }
    }
}
