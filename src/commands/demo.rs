//! `tender demo`: the store at work, in under a minute, with nothing to prepare.
//!
//! Generated agent sessions go through a small host tier and a disk tier of a daemon of its own. Halfway, in the middle of the work, a
//! client process and the daemon's worker are killed with kill -9: another client goes on with the sessions, another worker with host
//! memory as it was. Every byte of every block is compared.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tender_client::proto::wire;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::connect::{Connection, Door};
use crate::failure::Failure;
use crate::lifeline::{interrupted, kill};
use crate::output::{Output, table};
use crate::replay::crew::{Crew, Heard};
use crate::replay::daemon::{Daemon, DaemonPlan};
use crate::replay::kills::ANSWER_TIME_MAX;
use crate::replay::process::random_bytes;
use crate::replay::protocol::{FromClient, SessionJob, Setup, ToClient};
use crate::replay::report::Report;
use crate::scratch::Scratch;
use crate::trace::generate::Workload;
use crate::trace::session_json;
use crate::units;

/// Holds about a third of the sessions' blocks, so that the disk has work to do too.
const HOST_BYTES: u64 = 256 << 20;
const DISK_BYTES: u64 = 2 << 30;
/// Room for blocks, directory pages and the log.
const FREE_BYTES_NEEDED: u64 = DISK_BYTES + (256 << 20);
const BLOCK_BYTES: u64 = 64 << 10;
const CLIENTS: usize = 2;
/// Requests at once: enough to overlap the daemon's work with ours on two processors.
const REQUESTS_AT_ONCE: usize = 4;
/// No request is begun later, on a slow machine: with a start and two kills the whole stays below 45 s.
const TIME_MAX: Duration = Duration::from_secs(28);
/// The kills come by then, however much is done.
const HALF_TIME_MAX: Duration = Duration::from_secs(13);

/// Runs a generated agent workload through a temporary daemon, kills a client and the daemon's worker halfway, and compares every byte.
/// Fails if one was wrong, or if host memory was not found again.
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
    kept: Kept,
    /// Requests that a slow machine had no time for.
    left: u64,
    direct: String,
}

/// What became of host memory.
struct Kept {
    blocks_before: u64,
    /// As soon as another worker answered.
    blocks_after: u64,
    /// Until then.
    time: Duration,
}

impl Outcome {
    /// Whether the daemon did what the demo is to show.
    fn is_good(&self) -> bool {
        let wrong = self.before.tally.wrong_blocks + self.after.tally.wrong_blocks;
        // A few blocks may have come anew before another worker was asked; half of all cannot have.
        let was_kept = self.kept.blocks_after > self.kept.blocks_before / 2 && self.after.tally.hit_blocks_host > 0;
        wrong == 0 && was_kept
    }
}

impl Demo {
    /// Runs, cleans up, shows.
    pub async fn run(self) -> Result<(), Failure> {
        let scratch = Scratch::new("demo-", self.dir.as_deref(), FREE_BYTES_NEEDED)?;
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
        if outcome.is_good() { Ok(()) } else { Err(Failure::Bad) }
    }

    async fn demonstrate(&self, scratch: &Scratch) -> Result<Outcome, Failure> {
        let workload = Workload { seed: self.seed, ..Workload::default() };
        let (jobs, requests) = write_sessions(&workload, scratch)?;
        let plan = DaemonPlan {
            folder: scratch.path().to_owned(),
            host_bytes: HOST_BYTES,
            disk_bytes: DISK_BYTES,
            tenants: 1,
        };
        let mut daemon = Daemon::start(&plan).await?;
        let connection = Connection { socket: Some(daemon.socket.clone()), ..Connection::default() };
        let direct = direct_finding(&connection, scratch).await?;
        let setup = Setup {
            client: 0,
            socket: Some(daemon.socket.clone()),
            address: None,
            door: Door::default(),
            patience_ms: 0,
            token_files: vec![None],
            generation: u64::from_le_bytes(random_bytes()?),
            block_tokens: workload.block_tokens,
            block_bytes: BLOCK_BYTES,
            requests_at_once: REQUESTS_AT_ONCE,
        };
        eprintln!("{} sessions with {requests} requests; halfway a client and the daemon are killed", jobs.len());
        let worked = tokio::select! {
            biased;
            failure = daemon.died() => Err(failure),
            worked = work(setup, jobs, requests, connection) => worked,
        };
        daemon.kill().await;
        let (before, after, kept) = worked?;
        let left = requests.saturating_sub(before.tally.requests + after.tally.requests);
        Ok(Outcome { before, after, kept, left, direct })
    }

    fn show(&self, outcome: &Outcome, file_system: &str) -> Result<(), Failure> {
        let Outcome { before, after, kept, left, direct } = outcome;
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
                "seconds": time.as_secs_f64(), "restart_seconds": kept.time.as_secs_f64(), "file_system": file_system,
                "o_direct": direct, "host_blocks_before_kill": kept.blocks_before,
                "host_blocks_after_kill": kept.blocks_after, "door": before.door(),
                "hit_ratio_after_kill": after.tally.hit_percent() / 100.0,
                "before_kill": part(before), "after_kill": part(after),
            }));
        }
        let (tokens, hits, wrong) = (units::count(total.tokens_saved), after.tally.hit_percent(), total.wrong_bytes);
        self.output.line(format_args!(
            "{tokens} prompt tokens not recomputed; client killed, daemon killed; still {hits:.1} % hits; {wrong} wrong bytes"
        ))?;
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
        self.output.line(table(header, [row("before the kills", before), row("after the kills", after)]))?;
        let (blocks_before, blocks_after) = (units::count(kept.blocks_before), units::count(kept.blocks_after));
        self.output.line(format_args!(
            "the daemon's worker was killed with {blocks_before} blocks in host memory; {} later another one answered, with {blocks_after}",
            units::duration(kept.time)
        ))?;
        let (host, disk, block) = (units::bytes(HOST_BYTES), units::bytes(DISK_BYTES), units::bytes(BLOCK_BYTES));
        self.output
            .line(format_args!("host tier {host}, disk tier {disk} on {file_system}, blocks of {block}; {direct}"))?;
        if *left > 0 {
            self.output.line(format_args!("{left} requests were left out to end in time"))?;
        }
        self.output.line("next: `tender serve` in one terminal, `tender status` in another")
    }
}

/// Writes the sessions to files, as jobs; tells how many requests they have.
fn write_sessions(workload: &Workload, scratch: &Scratch) -> Result<(Vec<SessionJob>, u64), Failure> {
    let folder = scratch.path().join("sessions");
    std::fs::create_dir(&folder).map_err(Failure::of(format_args!("cannot make the folder {}", folder.display())))?;
    let (mut jobs, mut requests) = (Vec::new(), 0);
    for (session, job) in workload.all().zip(0..) {
        requests += session.requests.len() as u64;
        let file = folder.join(format!("{job}.json"));
        let written = File::create(&file).and_then(|mut out| session_json::write(&session, &mut out));
        written.map_err(Failure::of(format_args!("cannot write {}", file.display())))?;
        jobs.push(SessionJob {
            job,
            tenant: 0,
            file,
            requests_max: usize::MAX,
            requests_done: 0,
            time_max_ms: Some(TIME_MAX.as_millis() as u64),
            pace: None,
        });
    }
    Ok((jobs, requests))
}

/// What the daemon says of its folder and O_DIRECT; where it says nothing, what opening a file there showed.
async fn direct_finding(connection: &Connection, scratch: &Scratch) -> Result<String, Failure> {
    let status = connection.operator().await?.status().await?;
    let told = status.findings.into_iter().find(|finding| finding.found.contains("O_DIRECT"));
    let ours = if scratch.direct { "O_DIRECT works" } else { "O_DIRECT refused" };
    Ok(told.map_or_else(|| ours.to_owned(), |finding| finding.found))
}

/// Runs all sessions; halfway a client and the worker are killed. What came before, what came after, and what became of host memory.
async fn work(
    setup: Setup,
    jobs: Vec<SessionJob>,
    requests: u64,
    connection: Connection,
) -> Result<(Report, Report, Kept), Failure> {
    let mut crew = Crew::start(CLIENTS)?;
    crew.set_up(&setup).await?;
    let began = Instant::now();
    for job in jobs {
        crew.give(ToClient::Session(job)).await?;
    }
    let (mut before, mut after) = (Report::default(), Report::default());
    let mut killing: Option<JoinHandle<Result<Kept, Failure>>> = None;
    while crew.jobs_out() > 0 {
        match crew.hear().await? {
            Heard::Killed(client) => crew.succeed(client).await?,
            Heard::Answer(FromClient::Served { door, tally, get_us, wrong, .. }) => {
                wrong.iter().for_each(|block| eprintln!("WRONG BYTES: {block}"));
                let report = if killing.is_none() { &mut before } else { &mut after };
                report.add(*tally, get_us, 0, door);
            }
            Heard::Answer(_) => {}
        }
        let is_half = before.tally.requests >= requests / 2 || began.elapsed() > HALF_TIME_MAX;
        if is_half && killing.is_none() {
            before.time = began.elapsed();
            // Its memory of what it has put goes with it; the blocks stay.
            crew.kill(0);
            killing = Some(tokio::spawn(kill_worker(connection.clone())));
        }
    }
    after.time = began.elapsed().saturating_sub(before.time);
    let Some(killing) = killing else {
        return Err(Failure::message("the sessions ended before anything was killed; see the daemon's last words"));
    };
    Ok((before, after, killing.await.map_err(Failure::message)??))
}

/// Kills the worker, and waits for the next one.
async fn kill_worker(connection: Connection) -> Result<Kept, Failure> {
    let status = connection.worker(ANSWER_TIME_MAX, |_| true).await?;
    let (worker, blocks_before) = (status.process_id, host_blocks(&status));
    let killed = Instant::now();
    if !kill(worker) {
        return Err(Failure::message("the daemon's worker was gone before it was killed"));
    }
    let next = connection.worker(ANSWER_TIME_MAX, |process| process != worker).await?;
    eprintln!("killed: a client, and the daemon's worker {worker}; {} serves now", next.process_id);
    Ok(Kept { blocks_before, blocks_after: host_blocks(&next), time: killed.elapsed() })
}

fn host_blocks(status: &wire::StatusReply) -> u64 {
    let tiers = status.tiers.iter().filter(|tier| tier.tier == i32::from(wire::Tier::Host));
    tiers.map(|tier| tier.blocks).sum()
}
