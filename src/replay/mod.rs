//! Replay: a trace's requests put to a store, with payload that is known, and every byte that comes back compared.
//!
//! ```text
//! trace ── survey ──► schedule ── jobs, when due ──► crew of client processes ──► request: get, compare, put ──► daemon
//!                                                        │  chain (keys), payload (bytes)
//!                     report, progress ◄── tally ────────┘
//! ```
//! [`run`] is the whole of it in the parent; `client` and `session` are what a client process does; `daemon`, `crew` and `process`
//! keep the children, and `kills` ends some of them on purpose.

mod chain;
pub mod client;
pub mod crew;
pub mod daemon;
pub mod kills;
mod latency;
pub mod payload;
pub mod process;
mod progress;
pub mod protocol;
pub mod report;
pub mod request;
pub mod schedule;
pub mod session;
pub mod tally;

use std::iter::Peekable;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use self::crew::{Crew, Heard};
use self::kills::{Kills, Moments, WorkerKiller};
use self::progress::Progress;
use self::protocol::{FromClient, Setup};
use self::report::Report;
use self::schedule::{Due, Pacing, Survey};
use crate::connect::Connection;
use crate::failure::Failure;
use crate::trace::{Trace, TraceError};

/// A request later than this is said once; before, it is the noise of a busy machine.
const LATE_MS_SAID: u64 = 5_000;
/// Wrong blocks that are described one by one.
const WRONG_SAID_MAX: usize = 10;

/// What is replayed, and how.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The trace.
    pub trace: &'a Trace,
    /// What a first reading of it showed.
    pub survey: &'a Survey,
    /// How fast, and by how many.
    pub pacing: Pacing,
    /// What is killed meanwhile.
    pub kills: Kills,
}

/// Replays a trace through client processes that are not set up yet. `setup` is for the first; the others differ in their index.
pub async fn run(plan: &Plan<'_>, mut crew: Crew, setup: Setup) -> Result<Report, Failure> {
    crew.set_up(&setup).await?;
    let mut jobs = plan.pacing.jobs(plan.trace, plan.survey)?.peekable();
    let jobs_at_once = plan.pacing.jobs_at_once(plan.trace);
    let mut report = Report { skipped: plan.survey.skipped, ..Report::default() };
    let mut listener = Listener { progress: Progress::new(plan.survey.requests), wrong_said: 0, late_said: false };
    let began = Instant::now();
    let Kills { worker_every, client_every, seed } = plan.kills;
    let connection = Connection { socket: setup.socket, address: setup.address, token_file: None };
    let workers = worker_every.map(|every| WorkerKiller::start(connection, every, seed));
    let mut clients = client_every.map(|every| Moments::new(every, seed.wrapping_add(1)));
    loop {
        let next_due = next_due(&mut jobs)?.filter(|_| crew.jobs_out() < jobs_at_once);
        if next_due.is_none() && crew.jobs_out() == 0 {
            break;
        }
        tokio::select! {
            heard = crew.hear() => match heard? {
                Heard::Answer(answer) => listener.hear(answer, &mut report),
                Heard::Killed(client) => crew.succeed(client).await?,
            },
            () = sleep_until(clients.map_or(began, |moments| moments.next())), if clients.is_some() => {
                let choice = clients.as_mut().map_or(0, Moments::advance);
                report.killed_clients += u64::from(crew.kill(choice as usize));
            }
            () = sleep_until(began + next_due.unwrap_or_default()), if next_due.is_some() => {
                let Some((due, job)) = jobs.next().transpose()? else { continue };
                let late_ms = began.elapsed().saturating_sub(due).as_millis() as u64;
                if plan.pacing.speed != schedule::Speed::Max {
                    listener.late(late_ms, &mut report);
                }
                crew.give(job).await?;
            }
        }
    }
    report.time = began.elapsed();
    report.killed_workers = workers.map_or(0, |workers| workers.killed());
    Ok(report)
}

/// When the next job is due, counted from the start.
fn next_due(jobs: &mut Peekable<impl Iterator<Item = Result<Due, TraceError>>>) -> Result<Option<Duration>, Failure> {
    match jobs.next_if(Result::is_err) {
        Some(broken) => broken.map(|(due, _)| Some(due)).map_err(Failure::from),
        None => Ok(jobs.peek().and_then(|job| job.as_ref().ok()).map(|(due, _)| *due)),
    }
}

/// Turns answers into counts and words.
struct Listener {
    progress: Progress,
    wrong_said: usize,
    late_said: bool,
}

impl Listener {
    fn hear(&mut self, answer: FromClient, report: &mut Report) {
        let FromClient::Served { door, tally, get_us, late_ms, wrong, .. } = answer else { return };
        report.add(*tally, get_us, late_ms, door);
        for block in wrong.iter().take(WRONG_SAID_MAX - self.wrong_said) {
            self.wrong_said += 1;
            self.progress.say(&format!("WRONG BYTES: {block}"));
        }
        self.late(late_ms, report);
        self.progress.show(&report.tally);
    }

    fn late(&mut self, late_ms: u64, report: &mut Report) {
        report.late_ms_max = report.late_ms_max.max(late_ms);
        if late_ms >= LATE_MS_SAID && !self.late_said {
            self.late_said = true;
            let seconds = late_ms / 1000;
            self.progress.say(&format!(
                "the replay has fallen {seconds} s behind the trace: choose a lower --speed, or a higher --concurrency if the \
                 machine is not busy"
            ));
        }
    }
}
