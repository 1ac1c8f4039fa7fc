//! `tender doctor`: what the store needs of this machine, what was found, what is used instead, and the cure.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tender_client::proto::{greeting, wire};
use tender_kvstore::Config;

use super::serve::Settings;
use crate::connect::Connection;
use crate::failure::Failure;
use crate::output::{Output, text_table};
use crate::scratch::{self, LeftBehind};
use crate::units;

/// Asks the running daemon what it found; without one, looks for itself, with the settings that `serve` would have.
#[derive(Args, Debug)]
pub struct Doctor {
    /// Remove what commands and daemons left behind that were killed
    #[arg(long)]
    clean: bool,
    /// Configuration file (TOML) of a daemon that is not running
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    output: Output,
}

struct Finding {
    what: String,
    found: String,
    verdict: &'static str,
    cure: String,
}

impl Doctor {
    /// Shows findings; fails when one is bad.
    pub async fn run(self) -> Result<(), Failure> {
        let Self { clean, config, settings, output } = self;
        let overrides = settings.overrides();
        let config = Config::load(config.as_deref(), &overrides).map_err(Failure::message)?;
        let token_file = overrides.token_file.or_else(|| std::env::var_os("TENDER_TOKEN_FILE").map(PathBuf::from));
        let connection = Connection { socket: Some(config.socket.clone()), address: None, token_file };
        let sockets = [config.socket.clone(), greeting::door_path(&config.socket)];
        let left = scratch::left_behind(&config.dirs, &sockets);
        // Nobody is asked before: a daemon that refuses or hangs is in nobody's way.
        if clean {
            return clean_up(&left, &output);
        }
        let running = match connection.operator().await {
            Ok(operator) => Some(operator.status().await?),
            Err(_) => None,
        };
        let (origin, mut findings) = match running {
            Some(status) => {
                let origin = format!("as found by the running daemon (process {})", status.process_id);
                (origin, status.findings.into_iter().map(Finding::from).collect::<Vec<_>>())
            }
            None => {
                let findings = tender_kvstore::doctor(&config).into_iter().map(Finding::from).collect();
                ("no daemon is running; as a daemon started now would find it".to_owned(), findings)
            }
        };
        if !left.is_empty() {
            findings.push(left_finding(&left));
        }
        if output.json {
            for Finding { what, found, verdict, cure } in &findings {
                output.object(&json!({ "what": what, "found": found, "verdict": verdict, "cure": cure }))?;
            }
        } else {
            output.line(origin)?;
            let rows = findings.iter().map(|finding| {
                [finding.what.clone(), finding.verdict.to_owned(), finding.found.clone(), finding.cure.clone()]
            });
            output.line(text_table(["what", "verdict", "found", "cure"], rows))?;
        }
        if findings.iter().any(|finding| finding.verdict == BAD) { Err(Failure::Bad) } else { Ok(()) }
    }
}

fn left_finding(left: &[LeftBehind]) -> Finding {
    let bytes = units::bytes(left.iter().map(|left| left.bytes).sum());
    let paths: Vec<String> = left.iter().map(|left| left.path.display().to_string()).collect();
    Finding {
        what: "left behind".to_owned(),
        found: format!("{bytes} by processes that were killed: {}", paths.join(", ")),
        verdict: "fallback",
        cure: "tender doctor --clean".to_owned(),
    }
}

fn clean_up(left: &[LeftBehind], output: &Output) -> Result<(), Failure> {
    let removed: Vec<(&LeftBehind, std::io::Result<()>)> = left.iter().map(|left| (left, left.remove())).collect();
    let said =
        |removed: &std::io::Result<()>| removed.as_ref().map_or_else(ToString::to_string, |()| "removed".to_owned());
    if output.json {
        for (LeftBehind { path, what, bytes, .. }, removed) in &removed {
            let object = json!({ "what": what, "path": path, "bytes": bytes, "removed": removed.is_ok() });
            output.object(&object)?;
        }
    } else if removed.is_empty() {
        output.line("nothing was left behind")?;
    } else {
        let rows = removed.iter().map(|(left, removed)| {
            [left.what.to_owned(), left.path.display().to_string(), units::bytes(left.bytes), said(removed)]
        });
        output.line(text_table(["what", "path", "size", "outcome"], rows))?;
    }
    match removed.iter().find_map(|(left, removed)| removed.as_ref().err().map(|error| (left, error))) {
        Some((left, error)) => {
            let is_busy = error.kind() == std::io::ErrorKind::ResourceBusy;
            let cure = if is_busy { "it is in use, and stays" } else { "remove it by hand" };
            Err(Failure::message(format_args!("cannot remove {}: {error}; {cure}", left.path.display())))
        }
        None => Ok(()),
    }
}

const BAD: &str = "BAD";

impl From<wire::Finding> for Finding {
    fn from(finding: wire::Finding) -> Self {
        let verdict = match finding.verdict() {
            wire::Verdict::Good => "good",
            wire::Verdict::Fallback => "fallback",
            wire::Verdict::Bad => BAD,
        };
        Self { what: finding.what, found: finding.found, verdict, cure: finding.cure }
    }
}

impl From<tender_kvstore::Finding> for Finding {
    fn from(finding: tender_kvstore::Finding) -> Self {
        let verdict = match finding.verdict {
            tender_kvstore::Verdict::Good => "good",
            tender_kvstore::Verdict::Fallback => "fallback",
            tender_kvstore::Verdict::Bad => BAD,
        };
        Self { what: finding.what, found: finding.found, verdict, cure: finding.cure }
    }
}
