//! When what starts.
//!
//! Requests of a Mooncake trace have their times. Sessions have none of their own: each starts at a random time within a window of
//! (sum of their lengths) / (mean number at once), and pauses of more than two hours are cut to two.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tender_client::proto::sum::{GOLDEN, mix};

use super::protocol::{RequestJob, SessionJob, ToClient};
use crate::trace::generate::share;
use crate::trace::{Trace, TraceError, mooncake, session_json};

/// Longest pause that is replayed, before scaling.
pub const GAP_MS_MAX: u64 = 2 * 60 * 60 * 1000;

/// How fast a trace is replayed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// As fast as the store answers.
    Max,
    /// So many trace seconds per second.
    Times(f64),
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => return Ok(Self::Max),
            "true" => return Ok(Self::Times(1.0)),
            _ => {}
        }
        let factor = text.strip_suffix('x').and_then(|number| number.parse::<f64>().ok());
        factor.filter(|factor| (0.001..=1e6).contains(factor)).map(Self::Times).ok_or_else(|| {
            format!("`{text}` is no speed; `true`, `max` or a factor such as `10x` (0.001x to 1000000x) is")
        })
    }
}

impl Speed {
    fn pace(self) -> Option<f64> {
        match self {
            Self::Max => None,
            Self::Times(factor) => Some(factor),
        }
    }

    fn scale(self, milliseconds: f64) -> Duration {
        self.pace().map_or(Duration::ZERO, |factor| Duration::from_secs_f64(milliseconds / 1000.0 / factor))
    }
}

/// What a first reading of a trace shows.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Requests that will be replayed.
    pub requests: u64,
    /// Their blocks.
    pub blocks: u64,
    /// Blocks of the longest prompt.
    pub chain_blocks_max: usize,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Time from the first request to the last, or of all sessions one after the other, pauses cut.
    pub length_ms: u64,
    /// Sessions that will be replayed; empty for a Mooncake trace.
    pub sessions: Vec<SurveyedSession>,
    /// Lines or sessions left out since they are broken.
    pub skipped: u64,
}

/// A session that will be replayed.
#[derive(Clone, Debug)]
pub struct SurveyedSession {
    file: PathBuf,
    requests: usize,
    length_ms: u64,
}

/// Reads a trace through once, so that a broken line is found before anything is started.
pub fn survey(trace: &Trace, requests_max: u64, skip_broken: bool) -> Result<Survey, TraceError> {
    let mut survey = Survey::default();
    match trace {
        Trace::Mooncake(file) => {
            survey.block_tokens = mooncake::BLOCK_TOKENS;
            for request in mooncake::Requests::open(file)? {
                if survey.requests == requests_max {
                    break;
                }
                let Some(request) = unless_broken(request, skip_broken, &mut survey.skipped)? else { continue };
                survey.add_chain(request.hash_ids.len());
                survey.length_ms = survey.length_ms.max(request.timestamp as u64);
            }
        }
        Trace::Sessions(files) => {
            for file in files {
                if survey.requests == requests_max {
                    break;
                }
                if let Some(session) = unless_broken(session_json::read(file), skip_broken, &mut survey.skipped)? {
                    survey.add_session(file, session, requests_max)?;
                }
            }
        }
    }
    Ok(survey)
}

fn unless_broken<T>(read: Result<T, TraceError>, skip: bool, skipped: &mut u64) -> Result<Option<T>, TraceError> {
    match read {
        Err(error) if skip && error.skippable => {
            *skipped += 1;
            Ok(None)
        }
        read => read.map(Some),
    }
}

impl Survey {
    fn add_chain(&mut self, blocks: usize) {
        self.requests += 1;
        self.blocks += blocks as u64;
        self.chain_blocks_max = self.chain_blocks_max.max(blocks);
    }

    fn add_session(
        &mut self,
        file: &Path,
        mut session: crate::trace::session::Session,
        requests_max: u64,
    ) -> Result<(), TraceError> {
        if self.block_tokens != 0 && self.block_tokens != session.block_tokens {
            let (ours, others) = (session.block_tokens, self.block_tokens);
            let what =
                format!("field `block_size` is {ours}, but {others} in the sessions before; replay them one by one");
            return Err(TraceError::whole(file, what));
        }
        self.block_tokens = session.block_tokens;
        let left = usize::try_from(requests_max - self.requests).unwrap_or(usize::MAX);
        session.requests.truncate(left);
        session.cap_gaps(GAP_MS_MAX);
        session.chain_blocks().for_each(|blocks| self.add_chain(blocks));
        let (requests, length_ms) = (session.requests.len(), session.length_ms());
        self.length_ms += length_ms;
        self.sessions.push(SurveyedSession { file: file.to_owned(), requests, length_ms });
        Ok(())
    }
}

/// A job and when it is due, counted from the start of the replay.
pub type Due = (Duration, ToClient);

/// How a trace is replayed.
#[derive(Clone, Copy, Debug)]
pub struct Pacing {
    /// How fast.
    pub speed: Speed,
    /// Sessions at once on average, or requests at once.
    pub concurrency: usize,
    /// Tenants that take turns.
    pub tenants: usize,
    /// Seed of the starts of sessions.
    pub seed: u64,
}

impl Pacing {
    /// All jobs of a trace that was surveyed, in the order in which they are due.
    pub fn jobs(
        self,
        trace: &Trace,
        survey: &Survey,
    ) -> Result<Box<dyn Iterator<Item = Result<Due, TraceError>> + Send>, TraceError> {
        match trace {
            Trace::Mooncake(file) => Ok(Box::new(self.requests(file, survey)?)),
            Trace::Sessions(_) => Ok(Box::new(self.sessions(survey).into_iter().map(Ok))),
        }
    }

    fn requests(
        self,
        file: &Path,
        survey: &Survey,
    ) -> Result<impl Iterator<Item = Result<Due, TraceError>> + Send + use<>, TraceError> {
        let usable = mooncake::Requests::open(file)?.filter(|read| !matches!(read, Err(error) if error.skippable));
        let requests = usize::try_from(survey.requests).unwrap_or(usize::MAX);
        Ok(usable.take(requests).enumerate().map(move |(i, request)| {
            let mooncake::Request { timestamp, input_length, hash_ids, .. } = request?;
            let job = RequestJob { job: i as u64, tenant: i % self.tenants, hash_ids, input_tokens: input_length };
            Ok((self.speed.scale(timestamp), ToClient::Request(job)))
        }))
    }

    fn sessions(self, survey: &Survey) -> Vec<Due> {
        let window_ms = survey.length_ms as f64 / self.concurrency as f64;
        let mut jobs: Vec<Due> = survey
            .sessions
            .iter()
            .enumerate()
            .map(|(i, SurveyedSession { file, requests, .. })| {
                let share = share(mix(self.seed.wrapping_add(GOLDEN.wrapping_mul(i as u64 + 1))));
                let (tenant, pace) = (i % self.tenants, self.speed.pace());
                let job = SessionJob {
                    job: i as u64,
                    tenant,
                    file: file.clone(),
                    requests_max: *requests,
                    requests_done: 0,
                    time_max_ms: None,
                    pace,
                };
                (self.speed.scale(window_ms * share), ToClient::Session(job))
            })
            .collect();
        jobs.sort_by_key(|(due, _)| *due);
        jobs
    }

    /// How many jobs may be out at once. Sessions that keep their own times are idle mostly; their clients bound what they do at once.
    pub fn jobs_at_once(self, trace: &Trace) -> usize {
        match (trace, self.speed) {
            (Trace::Sessions(_), Speed::Times(_)) => usize::MAX,
            _ => self.concurrency,
        }
    }

    /// How long the replay takes if the store keeps up; nothing is known of `max`.
    pub fn length(self, survey: &Survey) -> Option<Duration> {
        self.speed.pace()?;
        let window_ms =
            survey.length_ms as f64 / if survey.sessions.is_empty() { 1.0 } else { self.concurrency as f64 };
        let longest = survey.sessions.iter().map(|session| session.length_ms).max().unwrap_or_default();
        Some(self.speed.scale(window_ms + longest as f64))
    }
}
