//! How far a replay is, on standard error: a bar on a terminal, else a line every ten seconds.

use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::tally::Tally;
use crate::units;

const LINE_EVERY: Duration = Duration::from_secs(10);
/// Rates are those of about this long.
const RATE_OVER: Duration = Duration::from_secs(1);

/// Shows how far a replay is.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    requests: u64,
    began: Instant,
    last_line: Instant,
    last_rate: Instant,
    counted: Tally,
    rate: String,
}

impl Progress {
    /// Of so many requests.
    pub fn new(requests: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(requests);
            // A template that does not parse leaves the default style, which shows the same numbers.
            if let Ok(style) =
                ProgressStyle::with_template("{bar:30} {human_pos}/{human_len} requests  {msg}  {eta} left")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let now = Instant::now();
        let (counted, rate) = (Tally::default(), String::new());
        Self { bar, requests, began: now, last_line: now, last_rate: now, counted, rate }
    }

    /// Shows what has been counted so far.
    pub fn show(&mut self, total: &Tally) {
        let over = self.last_rate.elapsed();
        if over >= RATE_OVER || self.rate.is_empty() {
            let moved = |tally: &Tally| tally.got_bytes + tally.put_bytes;
            let blocks_per_s = (total.blocks - self.counted.blocks) as f64 / over.as_secs_f64().max(1e-3);
            let gb_per_s = units::gb_per_s(moved(total) - moved(&self.counted), over);
            self.rate = format!("{} blocks/s  {gb_per_s:.2} GB/s", units::count(blocks_per_s as u64));
            (self.counted, self.last_rate) = (*total, Instant::now());
        }
        let (rate, hits) = (&self.rate, total.hit_percent());
        match &self.bar {
            Some(bar) => {
                bar.set_position(total.requests);
                bar.set_message(format!("{rate}  {hits:.1} % hits"));
            }
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                let share = total.requests.max(1) as f64 / self.requests.max(1) as f64;
                let left = units::duration(self.began.elapsed().mul_f64((1.0 / share - 1.0).max(0.0)));
                eprintln!("{}/{} requests  {rate}  {hits:.1} % hits  {left} left", total.requests, self.requests);
            }
            None => {}
        }
    }

    /// Says something without tearing the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
