//! `tender demo`: the store at work, in under a minute, with nothing to prepare.
//!
//! Generated agent sessions go through a small host tier and a disk tier of a daemon of its own. Halfway the daemon is stopped and
//! started again on the same folder: the clients stay as they are, and what comes back afterwards comes from disk. Every byte of
//! every block is compared.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{Attach, BlockStore as _, GetEnd, Remote};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::connect::Connection;
use crate::failure::Failure;
use crate::lifeline::interrupted;
use crate::output::{Output, table};
use crate::replay::client::namespace;
use crate::replay::daemon::{Daemon, DaemonPlan};
use crate::replay::process::random_bytes;
use crate::replay::report::Report;
use crate::replay::request::{Served, Server};
use crate::replay::session::RunningSession;
use crate::scratch::Scratch;
use crate::trace::generate::Workload;
use crate::units;

/// Holds about a third of the sessions' blocks, so that the disk has work to do before the restart too.
const HOST_BYTES: u64 = 256 << 20;
const DISK_BYTES: u64 = 2 << 30;
/// Room for blocks, directory pages and the log.
const FREE_BYTES_NEEDED: u64 = DISK_BYTES + (256 << 20);
const BLOCK_BYTES: u64 = 64 << 10;
/// Requests at once: enough to overlap the daemon's work with ours on two processors.
const REQUESTS_AT_ONCE: usize = 4;
/// Each half ends by then on a slow machine, done or not: with two starts and a stop the whole stays below 45 s.
const HALF_TIME_MAX: Duration = Duration::from_secs(13);
const RECONNECT_TIME_MAX: Duration = Duration::from_secs(10);

/// Runs a generated agent workload through a temporary daemon, restarts it halfway, and compares every byte.
#[derive(Args, Debug)]
pub struct Demo {
    /// Where to make the temporary folder [default: the first with room of TMPDIR, /var/tmp, here, /tmp]
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// Seed of the workload
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    output: Output,
}

/// What the demo found.
struct Outcome {
    before: Report,
    after: Report,
    stopped: Duration,
    /// Requests that a slow machine had no time for.
    left: usize,
    direct: String,
}

impl Demo {
    /// Runs, cleans up, shows.
    pub async fn run(self) -> Result<(), Failure> {
        let scratch = Scratch::new("tender-demo-", self.dir.as_deref(), FREE_BYTES_NEEDED)?;
        let (folder, file_system) = (scratch.path().display().to_string(), scratch.file_system.clone());
        let free = units::bytes(scratch.free_bytes);
        eprintln!("temporary files in {folder} ({file_system}, {free} free), removed at the end");
        let shown = tokio::select! {
            biased;
            failure = interrupted() => Err(failure),
            outcome = self.demonstrate(&scratch) => outcome,
        };
        let removed = scratch.remove();
        let outcome = shown?;
        removed?;
        self.show(&outcome, &file_system)?;
        let wrong = outcome.before.tally.wrong_blocks + outcome.after.tally.wrong_blocks;
        if wrong > 0 { Err(Failure::Bad) } else { Ok(()) }
    }

    async fn demonstrate(&self, scratch: &Scratch) -> Result<Outcome, Failure> {
        let plan = DaemonPlan {
            folder: scratch.path().to_owned(),
            host_bytes: HOST_BYTES,
            disk_bytes: DISK_BYTES,
            tenants: 1,
        };
        let mut daemon = Daemon::start(&plan).await?;
        let connection = Connection { socket: Some(daemon.socket.clone()), ..Connection::default() };
        let direct = direct_finding(&connection, scratch).await?;
        let workload = Workload { seed: self.seed, ..Workload::default() };
        let server = Arc::new(attach(&connection, &workload).await?);
        let mut sessions: Vec<_> =
            workload.all().map(|session| RunningSession::new(session, usize::MAX, &*server)).collect();
        let requests: usize = sessions.iter().map(RunningSession::left).sum();
        eprintln!("{} sessions with {requests} requests; half of each, a restart, then the rest", sessions.len());

        let before = while_alive(&mut daemon, half(&server, &mut sessions, |left| left / 2)).await?;
        let stopping = Instant::now();
        daemon.restart().await?;
        while_alive(&mut daemon, reconnected(server.store())).await??;
        let stopped = stopping.elapsed();
        eprintln!("the daemon was stopped and started again in {}", units::duration(stopped));
        let after = while_alive(&mut daemon, half(&server, &mut sessions, |_| 0)).await?;
        daemon.kill().await;
        let left = sessions.iter().map(RunningSession::left).sum();
        Ok(Outcome { before, after, stopped, left, direct })
    }

    fn show(&self, outcome: &Outcome, file_system: &str) -> Result<(), Failure> {
        let Outcome { before, after, stopped, left, direct } = outcome;
        let mut total = before.tally;
        total += after.tally;
        let time = before.time + after.time;
        if self.output.json {
            let part = |report: &Report| {
                let (tally, time) = (&report.tally, report.time);
                json!({
                    "requests": tally.requests, "blocks": tally.blocks, "hit_blocks_host": tally.hit_blocks_host,
                    "hit_blocks_disk": tally.hit_blocks_disk, "miss_blocks": tally.miss_blocks,
                    "got_gb_per_s": units::gb_per_s(tally.got_bytes, time),
                    "put_gb_per_s": units::gb_per_s(tally.put_bytes, time), "seconds": time.as_secs_f64(),
                })
            };
            return self.output.object(&json!({
                "tokens_saved": total.tokens_saved, "hit_ratio": total.hit_percent() / 100.0, "wrong_bytes": total.wrong_bytes,
                "wrong_blocks": total.wrong_blocks, "requests": total.requests, "requests_left": left,
                "seconds": time.as_secs_f64(), "restart_seconds": stopped.as_secs_f64(), "file_system": file_system,
                "o_direct": direct, "before_restart": part(before), "after_restart": part(after),
            }));
        }
        let (tokens, hits, wrong) = (units::count(total.tokens_saved), total.hit_percent(), total.wrong_bytes);
        self.output
            .line(format_args!("{tokens} prompt tokens not recomputed, {hits:.1} % hits, {wrong} wrong bytes"))?;
        self.output.line(
            "(the sessions and their tokens are generated; the bytes went through the store and were all compared)",
        )?;
        let row = |name: &str, report: &Report| {
            let (tally, rate) = (&report.tally, |bytes| format!("{:.2}", units::gb_per_s(bytes, report.time)));
            [
                name.to_owned(),
                units::count(tally.blocks),
                units::count(tally.hit_blocks_host),
                units::count(tally.hit_blocks_disk),
                units::count(tally.miss_blocks),
                rate(tally.got_bytes),
                rate(tally.put_bytes),
                units::duration(report.time),
            ]
        };
        let header = ["blocks", "asked for", "from host", "from disk", "missed", "got GB/s", "put GB/s", "time"];
        self.output.line(table(header, [row("before the restart", before), row("after the restart", after)]))?;
        let (host, disk, block) = (units::bytes(HOST_BYTES), units::bytes(DISK_BYTES), units::bytes(BLOCK_BYTES));
        self.output
            .line(format_args!("host tier {host}, disk tier {disk} on {file_system}, blocks of {block}; {direct}"))?;
        if *left > 0 {
            self.output.line(format_args!("{left} requests were left out to end in time"))?;
        }
        self.output.line("next: `tender serve` in one terminal, `tender status` in another")
    }
}

async fn attach(connection: &Connection, workload: &Workload) -> Result<Server<Remote>, Failure> {
    let generation = u64::from_le_bytes(random_bytes()?);
    let attach = Attach {
        group: "tender-demo".to_owned(),
        member: "tender demo".to_owned(),
        namespace: namespace(generation, workload.block_tokens),
        layout: BlockLayout::opaque(BLOCK_BYTES),
    };
    Ok(Server::new(connection.attach_as(attach).await?, generation))
}

/// What the daemon says of its folder and O_DIRECT; where it says nothing, what opening a file there showed.
async fn direct_finding(connection: &Connection, scratch: &Scratch) -> Result<String, Failure> {
    let status = connection.operator().await?.status().await?;
    let told = status.findings.into_iter().find(|finding| finding.found.contains("O_DIRECT"));
    let ours = if scratch.direct { "O_DIRECT works" } else { "O_DIRECT refused" };
    Ok(told.map_or_else(|| ours.to_owned(), |finding| finding.found))
}

/// Waits until the client, which attaches again by itself, gets answers: until then all it says is that nobody is there.
async fn reconnected(store: &Remote) -> Result<(), Failure> {
    let began = Instant::now();
    while store.get(&[store.terms().root], Shard::WHOLE).await.end == GetEnd::Unavailable {
        if began.elapsed() > RECONNECT_TIME_MAX {
            return Err(Failure::message("the client did not find the restarted daemon again"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// What a future gives, unless the daemon dies meanwhile.
async fn while_alive<T>(daemon: &mut Daemon, work: impl Future<Output = T>) -> Result<T, Failure> {
    tokio::select! {
        biased;
        failure = daemon.died() => Err(failure),
        done = work => Ok(done),
    }
}

/// Runs all sessions until each has `leave(its requests)` left, or the time is over.
async fn half(server: &Arc<Server<Remote>>, sessions: &mut Vec<RunningSession>, leave: fn(usize) -> usize) -> Report {
    let began = Instant::now();
    let turns = Arc::new(Semaphore::new(REQUESTS_AT_ONCE));
    let (tell, mut told) = mpsc::channel::<Served>(REQUESTS_AT_ONCE);
    let mut running = JoinSet::new();
    for mut session in sessions.drain(..) {
        let (server, turns, tell) = (Arc::clone(server), Arc::clone(&turns), tell.clone());
        running.spawn(async move {
            let leave = leave(session.left());
            while session.left() > leave && began.elapsed() < HALF_TIME_MAX {
                let Some((served, _)) = session.step(&server, &turns, began, None).await else { break };
                drop(tell.send(served).await);
            }
            session
        });
    }
    drop(tell);
    let mut report = Report::default();
    while let Some(Served { tally, get_us, wrong }) = told.recv().await {
        wrong.iter().for_each(|block| eprintln!("WRONG BYTES: {block}"));
        report.add(tally, get_us, 0);
    }
    sessions.extend(running.join_all().await);
    report.time = began.elapsed();
    report
}
