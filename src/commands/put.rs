//! `tender put`: stores the blocks of a prompt.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use serde_json::{Map, Value};
use tender_client::proto::{BlockKey, Shard};
use tender_client::{BlockStore as _, PutOutcome, Remote};

use crate::connect::{Connection, DoorArgs};
use crate::failure::Failure;
use crate::identity::{NamespaceArgs, TokensArgs};
use crate::output::{Output, table};
use crate::replay::payload::Payload;
use crate::units;

/// Bytes held in memory at once.
const WINDOW_BYTES_MAX: u64 = 32 << 20;

/// Stores the whole blocks of a prompt; succeeds when all of them are in the store afterwards, and on its disk if that was asked for.
#[derive(Args, Debug)]
pub struct Put {
    #[command(flatten)]
    namespace: NamespaceArgs,
    #[command(flatten)]
    tokens: TokensArgs,
    /// File of the blocks' bytes, one after the other; `-` for standard input
    #[arg(long, value_name = "FILE|-", required_unless_present = "generate")]
    payload: Option<PathBuf>,
    /// Make the bytes up, from the blocks' keys
    #[arg(long, conflicts_with = "payload")]
    generate: bool,
    /// Wait until the blocks would survive a power cut; fail if one would not
    #[arg(long)]
    durable: bool,
    #[command(flatten)]
    door: DoorArgs,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

/// Where the bytes come from.
enum Source {
    Generated(Payload),
    Read { file: Box<dyn Read + Send>, shown: String, came_bytes: u64 },
}

impl Put {
    /// Puts window by window.
    pub async fn run(self) -> Result<(), Failure> {
        let tokens = self.tokens.read(self.namespace.block_tokens)?;
        let blocks = tokens.len() / self.namespace.block_tokens as usize;
        let source = self.source(blocks as u64)?;
        let store = self.connection.attach(self.namespace.namespace(), self.namespace.layout(), self.door.door).await?;
        let keys = store.terms().chain(&tokens);
        let done = self.put(&store, &keys, &tokens, source).await;
        store.close().await;
        done
    }

    async fn put(&self, store: &Remote, keys: &[BlockKey], tokens: &[u32], source: Source) -> Result<(), Failure> {
        let blocks = keys.len();
        let mut outcomes = Vec::with_capacity(blocks);
        if let Err(failure) = self.put_windows(store, keys, tokens, source, &mut outcomes).await {
            return Err(take_back(store, keys, &outcomes, failure).await);
        }
        let durable_blocks = if self.durable {
            Some(store.durable(keys).await.into_iter().filter(|durable| *durable).count())
        } else {
            None
        };
        self.show(&outcomes, durable_blocks)?;
        if let Some(failure) = unstored(&outcomes) {
            return Err(failure);
        }
        match durable_blocks {
            Some(durable_blocks) if durable_blocks < blocks => Err(Failure::message(format_args!(
                "{} of {} blocks would not survive a power cut; see what `tender status` and the daemon's log say of the disk tier",
                units::count((blocks - durable_blocks) as u64),
                units::count(blocks as u64)
            ))),
            _ => Ok(()),
        }
    }

    /// Puts window by window. The last window is not sent before its bytes are known to be the last ones.
    async fn put_windows(
        &self,
        store: &Remote,
        keys: &[BlockKey],
        tokens: &[u32],
        mut source: Source,
        outcomes: &mut Vec<PutOutcome>,
    ) -> Result<(), Failure> {
        let block_tokens = self.namespace.block_tokens as usize;
        let block_bytes = store.terms().shard_bytes(1);
        let needed = keys.len() as u64 * block_bytes as u64;
        let window_blocks = (WINDOW_BYTES_MAX / block_bytes as u64).max(1) as usize;
        let mut parent = store.terms().root;
        for (window, tokens) in keys.chunks(window_blocks).zip(tokens.chunks(window_blocks * block_tokens)) {
            let payloads = source.read(window, block_bytes, needed)?;
            if outcomes.len() + window.len() == keys.len() {
                source.end(needed)?;
            }
            let tokens = &tokens[..window.len() * block_tokens];
            let put = tender_client::Put { parent, keys: window, shard: Shard::WHOLE, payloads: &payloads, tokens };
            let before = outcomes.len();
            outcomes.extend(store.put(put).await);
            if let Some(why) = outcomes[before..].iter().copied().find(|outcome| outcome.is_turned_away()) {
                outcomes.resize(keys.len(), why);
                break;
            }
            parent = window.last().copied().unwrap_or(parent);
        }
        Ok(())
    }

    fn source(&self, blocks: u64) -> Result<Source, Failure> {
        match &self.payload {
            None => Ok(Source::Generated(Payload::new(0))),
            Some(file) if file.as_os_str() == "-" => Ok(Source::of(io::stdin(), "standard input".to_owned())),
            Some(file) => {
                let shown = file.display().to_string();
                let opened = File::open(file).map_err(Failure::of(format_args!("cannot read {shown}")))?;
                let metadata = opened.metadata().map_err(Failure::of(format_args!("cannot read {shown}")))?;
                let needed = blocks.saturating_mul(self.namespace.block_bytes);
                if metadata.is_file() && metadata.len() != needed {
                    return Err(wrong_length(&shown, &metadata.len().to_string(), needed));
                }
                Ok(Source::of(opened, shown))
            }
        }
    }

    fn show(&self, outcomes: &[PutOutcome], durable_blocks: Option<usize>) -> Result<(), Failure> {
        let names = [
            (PutOutcome::Stored, "stored"),
            (PutOutcome::ShardStored, "shard_stored"),
            (PutOutcome::AlreadyPresent, "already_present"),
            (PutOutcome::BeingWritten, "being_written"),
            (PutOutcome::NoRoom, "no_room"),
            (PutOutcome::OverQuota, "over_quota"),
            (PutOutcome::Refused, "refused"),
            (PutOutcome::Shed, "shed"),
            (PutOutcome::Unavailable, "unavailable"),
        ];
        let counts =
            names.map(|(what, name)| (name, outcomes.iter().filter(|outcome| **outcome == what).count() as u64));
        if self.output.json {
            let mut row = Map::from_iter([("blocks".to_owned(), Value::from(outcomes.len()))]);
            row.extend(counts.map(|(name, blocks)| (format!("{name}_blocks"), blocks.into())));
            row.insert("durable_blocks".to_owned(), durable_blocks.into());
            return self.output.object(&row);
        }
        let rows = counts.into_iter().filter(|(_, blocks)| *blocks > 0);
        self.output.line(table(
            ["put", "blocks"],
            rows.map(|(name, blocks)| [name.replace('_', " "), units::count(blocks)]),
        ))?;
        let Some(durable_blocks) = durable_blocks else { return Ok(()) };
        let (durable_blocks, blocks) = (units::count(durable_blocks as u64), units::count(outcomes.len() as u64));
        self.output.line(format_args!("{durable_blocks} of {blocks} blocks would survive a power cut"))
    }
}

impl Source {
    fn of(file: impl Read + Send + 'static, shown: String) -> Self {
        Self::Read { file: Box::new(file), shown, came_bytes: 0 }
    }

    /// The next blocks; all blocks together have `needed` bytes.
    fn read(&mut self, keys: &[BlockKey], block_bytes: usize, needed: u64) -> Result<Vec<Bytes>, Failure> {
        keys.iter()
            .map(|key| match self {
                Self::Generated(payload) => {
                    let mut bytes = vec![0; block_bytes];
                    payload.fill(key, &mut bytes);
                    Ok(bytes.into())
                }
                Self::Read { file, shown, came_bytes } => {
                    let mut bytes = Vec::with_capacity(block_bytes);
                    let read = file.by_ref().take(block_bytes as u64).read_to_end(&mut bytes);
                    *came_bytes += read.map_err(Failure::of(format_args!("cannot read {shown}")))? as u64;
                    if bytes.len() < block_bytes {
                        return Err(wrong_length(shown, &format!("only {came_bytes}"), needed));
                    }
                    Ok(bytes.into())
                }
            })
            .collect()
    }

    /// Nothing may be left over: then tokens and bytes did not belong together.
    fn end(&mut self, needed: u64) -> Result<(), Failure> {
        let Self::Read { file, shown, .. } = self else { return Ok(()) };
        let mut more = Vec::new();
        file.by_ref().take(1).read_to_end(&mut more).map_err(Failure::of(format_args!("cannot read {shown}")))?;
        if more.is_empty() { Ok(()) } else { Err(wrong_length(shown, "more", needed)) }
    }
}

/// Says of the first block that is not there why, and what helps.
fn unstored(outcomes: &[PutOutcome]) -> Option<Failure> {
    let first = outcomes.iter().find(|outcome| !outcome.is_there())?;
    let missing = outcomes.iter().filter(|outcome| !outcome.is_there()).count();
    let (missing, blocks) = (units::count(missing as u64), units::count(outcomes.len() as u64));
    let why = match first {
        PutOutcome::NoRoom => {
            "there is no room for them: everything in host memory is in use or belongs to this prompt; put again later, put less at \
             once, or give the daemon more --host"
        }
        PutOutcome::OverQuota => {
            "they are over the tenant's quota; raise its host_quota in the daemon's configuration, or put a shorter prompt"
        }
        PutOutcome::Shed => "the daemon has too much to do; put again later",
        PutOutcome::BeingWritten => "another process is writing them now; look again with `tender lookup`",
        PutOutcome::Refused => {
            "the daemon refused them: their bytes arrived damaged, or it does not take such a request; see its log, then put again"
        }
        _ => "the daemon is gone or did not answer in time; see `tender status`, then put again",
    };
    Some(Failure::message(format_args!("{missing} of {blocks} blocks are not stored: {why}")))
}

/// Forgets what this command stored before it found that its bytes belong to other tokens. What was there before stays.
async fn take_back(store: &Remote, keys: &[BlockKey], outcomes: &[PutOutcome], failure: Failure) -> Failure {
    let Failure::Message(why) = failure else { return failure };
    let stored = keys.iter().zip(outcomes).filter(|(_, outcome)| **outcome == PutOutcome::Stored);
    let stored: Vec<BlockKey> = stored.map(|(key, _)| *key).collect();
    if stored.is_empty() {
        return Failure::message(format_args!("{why}; nothing was stored"));
    }
    let blocks = units::count(stored.len() as u64);
    if store.purge(tender_client::Purge::Keys(&stored)).await.complete {
        return Failure::message(format_args!("{why}; the {blocks} blocks that this command had stored were purged"));
    }
    Failure::message(format_args!(
        "{why}; {blocks} blocks that this command had stored may still be there, because the daemon did not purge them in time: \
         forget them with `tender purge` and the same tokens"
    ))
}

fn wrong_length(shown: &str, has: &str, needed: u64) -> Failure {
    Failure::message(format_args!(
        "{shown} has {has} bytes, but the whole blocks of these tokens need {needed}; see --block-tokens and --block-bytes"
    ))
}
