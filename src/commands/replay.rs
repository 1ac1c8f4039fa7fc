//! `tender replay`: a workload trace, replayed through the store.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::connect::{Connection, DoorArgs};
use crate::failure::Failure;
use crate::lifeline::interrupted;
use crate::output::Output;
use crate::replay::crew::Crew;
use crate::replay::daemon::{Daemon, DaemonPlan};
use crate::replay::kills::Kills;
use crate::replay::process::random_bytes;
use crate::replay::protocol::Setup;
use crate::replay::report::Report;
use crate::replay::schedule::{Pacing, Speed, Survey, survey};
use crate::replay::{Plan, run};
use crate::scratch::Scratch;
use crate::trace::Trace;
use crate::units::{self, parse_bytes};

/// What a daemon's folder may hold beside its blocks: directory pages, log, rounding to segments.
const DISK_SLACK_BYTES: u64 = 256 << 20;

/// Replays a trace through a daemon of its own, or a running one; compares every byte that comes back. Fails if one was wrong.
#[derive(Args, Debug)]
pub struct Replay {
    /// Mooncake trace (JSONL), session file (JSON), or folder of session files
    trace: PathBuf,
    /// Host memory of the daemon
    #[arg(long, value_parser = parse_bytes, default_value = "1GiB", value_name = "SIZE", conflicts_with_all = RUNNING)]
    host: u64,
    /// Disk space of the daemon
    #[arg(long, value_parser = parse_bytes, default_value = "8GiB", value_name = "SIZE", conflicts_with_all = RUNNING)]
    disk: u64,
    /// Bytes of one block
    #[arg(long, value_parser = parse_bytes, default_value = "64KiB", value_name = "SIZE")]
    block_bytes: u64,
    /// `max`: as fast as the store answers; `true`: at the trace's times; `10x`: ten times as fast
    #[arg(long, default_value = "max", value_name = "true|Nx|max")]
    speed: Speed,
    /// Client processes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    clients: u16,
    /// Sessions, or requests of a Mooncake trace, at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=4096))]
    concurrency: u16,
    /// Tenants that take turns; a running daemon has one per --token-file
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256), conflicts_with_all = RUNNING)]
    tenants: u16,
    /// Where to make the temporary folder [default: the first with room of TMPDIR, /var/tmp, here, /tmp]
    #[arg(long, value_name = "PATH", conflicts_with_all = RUNNING)]
    dir: Option<PathBuf>,
    /// Unix socket of a running daemon
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Loopback address of a running daemon
    #[arg(long, value_name = "127.0.0.1:PORT", conflicts_with = "socket")]
    address: Option<std::net::SocketAddr>,
    /// Token file of a tenant of the running daemon; may be repeated
    #[arg(long, value_name = "PATH")]
    token_file: Vec<PathBuf>,
    #[command(flatten)]
    door: DoorArgs,
    /// Kill the worker of the daemon with kill -9 about every so many seconds; another one follows it
    #[arg(long, value_parser = parse_seconds, value_name = "SECONDS", conflicts_with_all = RUNNING)]
    kill_worker_every: Option<Duration>,
    /// Kill a client process with kill -9 about every so many seconds; another one asks again what was not answered
    #[arg(long, value_parser = parse_seconds, value_name = "SECONDS", conflicts_with_all = RUNNING)]
    kill_client_every: Option<Duration>,
    /// Stop after so many requests
    #[arg(long, value_name = "REQUESTS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Leave broken lines and sessions out, and count them
    #[arg(long)]
    skip_broken: bool,
    /// Number that payload and namespace are made from [default: another one each time]
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
    /// Seed of the times at which sessions start and processes are killed
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    output: Output,
}

/// Often enough for a test; a process that is killed more often does nothing between.
const KILL_SECONDS: std::ops::RangeInclusive<f64> = 0.2..=1e6;

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| KILL_SECONDS.contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("`{text}` is no number of seconds from 0.2 to 1000000"))
}

const RUNNING: [&str; 2] = ["socket", "address"];

impl Replay {
    /// Reads the trace, starts what is needed, replays, cleans up, and shows.
    pub async fn run(self) -> Result<(), Failure> {
        let report = tokio::select! {
            biased;
            failure = interrupted() => return Err(failure),
            report = self.replay() => report?,
        };
        report.print(self.output)?;
        if report.tally.wrong_blocks > 0 { Err(Failure::Bad) } else { Ok(()) }
    }

    async fn replay(&self) -> Result<Report, Failure> {
        let trace = Trace::open(&self.trace)?;
        let (limit, skip_broken) = (self.limit.unwrap_or(u64::MAX), self.skip_broken);
        let read = trace.clone();
        let survey = tokio::task::spawn_blocking(move || survey(&read, limit, skip_broken))
            .await
            .map_err(Failure::message)??;
        if survey.requests == 0 {
            let (path, skipped) = (self.trace.display(), survey.skipped);
            return Err(Failure::message(format_args!(
                "{path} holds no request that can be replayed ({skipped} broken left out)"
            )));
        }
        let generation = match self.generation {
            Some(generation) => generation,
            None => u64::from_le_bytes(random_bytes()?),
        };
        self.announce(&survey, generation);
        let setup = Setup {
            client: 0,
            socket: self.socket.clone(),
            address: self.address,
            door: self.door.door,
            patience_ms: 0,
            token_files: self.token_files(),
            generation,
            block_tokens: survey.block_tokens,
            block_bytes: self.block_bytes,
            requests_at_once: self.concurrency.into(),
        };
        if self.socket.is_some() || self.address.is_some() {
            let connection = Connection { socket: self.socket.clone(), address: self.address, token_file: None };
            eprintln!("asking the daemon at {}", connection.target());
            return self.with_clients(&trace, &survey, setup).await;
        }
        self.with_daemon(&trace, &survey, setup).await
    }

    async fn with_daemon(&self, trace: &Trace, survey: &Survey, setup: Setup) -> Result<Report, Failure> {
        let scratch = Scratch::new("replay-", self.dir.as_deref(), self.disk.saturating_add(DISK_SLACK_BYTES))?;
        let (folder, file_system) = (scratch.path().display(), &scratch.file_system);
        let (host, disk) = (units::bytes(self.host), units::bytes(self.disk));
        let direct = if scratch.direct { "with O_DIRECT" } else { "without O_DIRECT" };
        eprintln!("a daemon of its own: {host} of host memory, {disk} of disk in {folder} ({file_system}, {direct})");
        let plan = DaemonPlan {
            folder: scratch.path().to_owned(),
            host_bytes: self.host,
            disk_bytes: self.disk,
            tenants: self.tenants.into(),
        };
        let mut daemon = Daemon::start(&plan).await?;
        let setup = Setup { socket: Some(daemon.socket.clone()), token_files: daemon.token_files.clone(), ..setup };
        let replayed = tokio::select! {
            biased;
            failure = daemon.died() => Err(failure),
            replayed = self.with_clients(trace, survey, setup) => replayed,
        };
        // Its data goes with the folder, so there is nothing to bring in order.
        daemon.kill().await;
        let removed = scratch.remove();
        let report = replayed?;
        removed?;
        Ok(report)
    }

    async fn with_clients(&self, trace: &Trace, survey: &Survey, setup: Setup) -> Result<Report, Failure> {
        let pacing = Pacing {
            speed: self.speed,
            concurrency: self.concurrency.into(),
            tenants: setup.token_files.len(),
            seed: self.seed,
        };
        if let Some(length) = pacing.length(survey) {
            eprintln!("takes about {}", units::duration(length));
        }
        let crew = Crew::start(self.clients.into())?;
        let kills =
            Kills { worker_every: self.kill_worker_every, client_every: self.kill_client_every, seed: self.seed };
        run(&Plan { trace, survey, pacing, kills }, crew, setup).await
    }

    fn token_files(&self) -> Vec<Option<PathBuf>> {
        let files: Vec<_> = self.token_file.iter().cloned().map(Some).collect();
        if files.is_empty() { vec![None] } else { files }
    }

    fn announce(&self, survey: &Survey, generation: u64) {
        let Survey { requests, blocks, sessions, block_tokens, skipped, .. } = survey;
        let (requests, blocks) = (units::count(*requests), units::count(*blocks));
        let sessions = if sessions.is_empty() { String::new() } else { format!(" of {} sessions", sessions.len()) };
        let (block_bytes, clients, concurrency) = (units::bytes(self.block_bytes), self.clients, self.concurrency);
        eprintln!(
            "replaying {requests} requests{sessions}: {blocks} blocks of {block_tokens} tokens and {block_bytes}, by {clients} client \
             processes, {concurrency} at once, generation {generation}"
        );
        if *skipped > 0 {
            eprintln!("{skipped} broken lines or sessions are left out");
        }
        let length = Duration::from_millis(survey.length_ms);
        if self.speed != Speed::Max {
            eprintln!("the trace's own length is {}", units::duration(length));
        }
    }
}
