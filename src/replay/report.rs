//! What a replay found: for people, and as the object that programs read.

use std::time::Duration;

use serde::Serialize;

use super::latency::Latencies;
use super::tally::Tally;
use crate::connect::Door;
use crate::output::{Output, table};
use crate::{failure::Failure, units};

/// What is added up while a replay, or a part of one, runs.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Counts of all requests.
    pub tally: Tally,
    /// Per request with blocks, the time spent in gets.
    pub get_latencies: Latencies,
    /// From the first job to the last answer.
    pub time: Duration,
    /// The most that a request started after its time.
    pub late_ms_max: u64,
    /// Lines or sessions of the trace that were left out.
    pub skipped: u64,
    /// Requests that went through the ring.
    pub ring_requests: u64,
    /// Client processes that were killed on purpose.
    pub killed_clients: u64,
    /// Workers of the daemon that were killed on purpose.
    pub killed_workers: u64,
}

/// The last line of `--json`: counts first.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    tally: Tally,
    seconds: f64,
    hit_ratio: f64,
    got_gb_per_s: f64,
    put_gb_per_s: f64,
    get_p50_us: Option<u64>,
    get_p99_us: Option<u64>,
    late_ms_max: u64,
    skipped: u64,
    door: &'static str,
    killed_clients: u64,
    killed_workers: u64,
}

impl Report {
    /// Counts one request.
    pub fn add(&mut self, tally: Tally, get_us: u64, late_ms: u64, door: Door) {
        self.tally += tally;
        self.ring_requests += if door == Door::Ring { tally.requests } else { 0 };
        self.late_ms_max = self.late_ms_max.max(late_ms);
        if tally.blocks > 0 {
            self.get_latencies.add(get_us);
        }
    }

    /// By which door the requests really went.
    pub fn door(&self) -> &'static str {
        match self.ring_requests {
            0 => Door::Grpc.name(),
            all if all == self.tally.requests => Door::Ring.name(),
            _ => "both",
        }
    }

    /// Prints everything.
    pub fn print(&self, output: Output) -> Result<(), Failure> {
        if output.json { output.object(&self.row()) } else { self.print_tables(output) }
    }

    fn row(&self) -> Row {
        Row {
            tally: self.tally,
            seconds: self.time.as_secs_f64(),
            hit_ratio: self.tally.hit_percent() / 100.0,
            got_gb_per_s: units::gb_per_s(self.tally.got_bytes, self.time),
            put_gb_per_s: units::gb_per_s(self.tally.put_bytes, self.time),
            get_p50_us: self.get_latencies.quantile_us(0.5),
            get_p99_us: self.get_latencies.quantile_us(0.99),
            late_ms_max: self.late_ms_max,
            skipped: self.skipped,
            door: self.door(),
            killed_clients: self.killed_clients,
            killed_workers: self.killed_workers,
        }
    }

    fn print_tables(&self, output: Output) -> Result<(), Failure> {
        let tally = &self.tally;
        let share = |blocks: u64| format!("{:.1} %", 100.0 * blocks as f64 / tally.blocks.max(1) as f64);
        let row = |name: &str, blocks: u64| [name.to_owned(), units::count(blocks), share(blocks)];
        let found = [
            ("host", tally.hit_blocks_host),
            ("disk", tally.hit_blocks_disk),
            ("peer", tally.hit_blocks_peer),
            ("object", tally.hit_blocks_object),
        ];
        let tiers = found.into_iter().filter(|(name, blocks)| *blocks > 0 || matches!(*name, "host" | "disk"));
        let ends = [("nowhere", tally.miss_blocks), ("(wrong bytes)", tally.wrong_blocks), ("asked for", tally.blocks)];
        output
            .line(table(["found in", "blocks", "share"], tiers.chain(ends).map(|(name, blocks)| row(name, blocks))))?;

        let outcomes = [
            ("stored", tally.put_stored_blocks),
            ("already present", tally.put_present_blocks),
            ("being written by others", tally.put_being_written_blocks),
            ("no room", tally.put_no_room_blocks),
            ("over quota", tally.put_over_quota_blocks),
            ("refused", tally.put_refused_blocks),
            ("shed", tally.put_shed_blocks),
            ("daemon unavailable", tally.put_unavailable_blocks),
            ("not offered after one of these", tally.put_unsent_blocks),
        ];
        let outcomes = outcomes.into_iter().filter(|(name, blocks)| *blocks > 0 || *name == "stored");
        output
            .line(table(["put", "blocks"], outcomes.map(|(name, blocks)| [name.to_owned(), units::count(blocks)])))?;

        let rate = |bytes| format!("{:.2} GB/s", units::gb_per_s(bytes, self.time));
        let quantile = |share| self.get_latencies.quantile_us(share).map_or("-".to_owned(), units::micros);
        let numbers = [
            ("requests", units::count(tally.requests)),
            ("door", self.door().to_owned()),
            ("prompt tokens not recomputed", units::count(tally.tokens_saved)),
            ("of prompt tokens", units::count(tally.input_tokens)),
            ("got, all compared", rate(tally.got_bytes)),
            ("put", rate(tally.put_bytes)),
            ("get of a request, p50", quantile(0.5)),
            ("get of a request, p99", quantile(0.99)),
            ("time", units::duration(self.time)),
        ];
        let mut numbers = numbers.map(|(name, value)| [name.to_owned(), value]).to_vec();
        let unusual = [
            ("gets past their deadline", tally.get_deadlines),
            ("gets shed", tally.get_sheds),
            ("gets without a daemon", tally.get_unavailables),
            ("gets that met a wrong sum (misses)", tally.get_sum_mismatches),
            ("late at most, ms", self.late_ms_max),
            ("broken lines or sessions left out", self.skipped),
            ("client processes killed", self.killed_clients),
            ("workers of the daemon killed", self.killed_workers),
        ];
        let unusual = unusual.into_iter().filter(|(_, number)| *number > 0);
        numbers.extend(unusual.map(|(name, number)| [name.to_owned(), units::count(number)]));
        output.line(table(["in all", ""], numbers))
    }
}
