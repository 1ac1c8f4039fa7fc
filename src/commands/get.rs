//! `tender get`: fetches the blocks of a prompt.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tender_client::proto::{BlockKey, Shard};
use tender_client::{BlockStore as _, GetEnd, Remote, Tier};

use crate::connect::Connection;
use crate::failure::Failure;
use crate::identity::{NamespaceArgs, TokensArgs};
use crate::output::{Output, table};
use crate::units;

/// Bytes held in memory at once.
const WINDOW_BYTES_MAX: usize = 32 << 20;

/// Fetches the blocks of a prompt, from the first on as far as they are there; succeeds when all of them are.
#[derive(Args, Debug)]
pub struct Get {
    #[command(flatten)]
    namespace: NamespaceArgs,
    #[command(flatten)]
    tokens: TokensArgs,
    /// File to write the blocks' bytes to, one after the other; `-` for standard output
    #[arg(short = 'o', long = "output", value_name = "FILE|-")]
    file: Option<PathBuf>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

impl Get {
    /// Gets window by window.
    pub async fn run(self) -> Result<(), Failure> {
        let tokens = self.tokens.read(self.namespace.block_tokens)?;
        let store = self.connection.attach(self.namespace.namespace(), self.namespace.layout()).await?;
        let keys = store.terms().chain(&tokens);
        let done = self.get(&store, &keys).await;
        store.close().await;
        done
    }

    async fn get(&self, store: &Remote, keys: &[BlockKey]) -> Result<(), Failure> {
        let window_blocks = (WINDOW_BYTES_MAX / store.terms().shard_bytes(1)).max(1);
        let mut sink = self.sink()?;
        let mut found = Vec::with_capacity(keys.len());
        let mut end = GetEnd::Complete;
        for window in keys.chunks(window_blocks) {
            let got = store.get(window, Shard::WHOLE).await;
            for block in &got.blocks {
                if let Some(sink) = &mut sink {
                    sink.write_all(&block.to_vec()).map_err(|error| self.unwritten(error))?;
                }
                found.push(block.tier());
            }
            end = got.end;
            if end != GetEnd::Complete {
                break;
            }
        }
        if let Some(mut sink) = sink {
            sink.flush().map_err(|error| self.unwritten(error))?;
        }
        self.show(keys.len(), &found, end)?;
        if found.len() == keys.len() { Ok(()) } else { Err(Failure::Bad) }
    }

    fn is_standard_output(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.as_os_str() == "-")
    }

    fn sink(&self) -> Result<Option<Box<dyn Write + Send>>, Failure> {
        match &self.file {
            None => Ok(None),
            Some(_) if self.is_standard_output() => Ok(Some(Box::new(io::stdout()))),
            Some(file) => {
                let created =
                    File::create(file).map_err(Failure::of(format_args!("cannot write {}", file.display())))?;
                Ok(Some(Box::new(created)))
            }
        }
    }

    fn unwritten(&self, error: io::Error) -> Failure {
        match &self.file {
            Some(file) if !self.is_standard_output() => {
                Failure::of(format_args!("cannot write {}", file.display()))(error)
            }
            _ => Failure::of_output(error),
        }
    }

    fn show(&self, blocks: usize, found: &[Tier], end: GetEnd) -> Result<(), Failure> {
        let of = |tier: Tier| found.iter().filter(|found| **found == tier).count() as u64;
        let tiers = [
            ("host", of(Tier::Host)),
            ("disk", of(Tier::Disk)),
            ("peer", of(Tier::Peer)),
            ("object", of(Tier::Object)),
        ];
        let end = match end {
            GetEnd::Complete => "complete",
            GetEnd::Miss => "miss",
            GetEnd::Deadline => "deadline",
            GetEnd::Shed => "shed",
            GetEnd::Unavailable => "unavailable",
            GetEnd::SumMismatch => "sum_mismatch",
        };
        if self.is_standard_output() {
            eprintln!("{} of {blocks} blocks came ({end})", found.len());
            return Ok(());
        }
        if self.output.json {
            let [host, disk, peer, object] = tiers.map(|(_, blocks)| blocks);
            return self.output.object(&json!({
                "blocks": blocks, "got_blocks": found.len(), "host_blocks": host, "disk_blocks": disk, "peer_blocks": peer,
                "object_blocks": object, "end": end,
            }));
        }
        let mut rows: Vec<_> = tiers.into_iter().filter(|(_, blocks)| *blocks > 0).collect();
        rows.push(("missing", (blocks - found.len()) as u64));
        let rows = rows.into_iter().map(|(name, blocks)| [name.to_owned(), units::count(blocks)]);
        self.output.line(table(["found in", "blocks"], rows))
    }
}
