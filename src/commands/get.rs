//! `tender get`: fetches the blocks of a prompt.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use tempfile::NamedTempFile;
use tender_client::proto::{BlockKey, Shard};
use tender_client::{BlockStore as _, GetEnd, Remote, Tier};

use crate::connect::{Connection, DoorArgs};
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
    /// File to write the blocks' bytes to, one after the other, if all of them came; `-` for standard output, as far as they came
    #[arg(short = 'o', long = "output", value_name = "FILE|-")]
    file: Option<PathBuf>,
    #[command(flatten)]
    door: DoorArgs,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

/// Where the bytes go.
enum Sink {
    Stream(Box<dyn Write + Send>),
    /// Beside the file, whose place it takes in the end: what was there stays until all has come.
    Beside {
        beside: NamedTempFile,
        file: PathBuf,
    },
}

impl Sink {
    fn to(file: &Path) -> io::Result<Self> {
        // What a link points to is replaced, and not the link.
        let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
        let before = std::fs::metadata(&file).ok();
        if before.as_ref().is_some_and(|before| !before.is_file()) {
            // A pipe or a device has no content to lose, and must not be replaced.
            return Ok(Self::Stream(Box::new(File::options().write(true).open(file)?)));
        }
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mode = before.map_or(0o666, |before| before.permissions().mode());
        let mut builder = tempfile::Builder::new();
        let beside = builder.prefix(".tender-get-").permissions(Permissions::from_mode(mode)).tempfile_in(folder)?;
        Ok(Self::Beside { beside, file })
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream(stream) => stream.write_all(bytes),
            Self::Beside { beside, .. } => beside.write_all(bytes),
        }
    }

    fn finish(self, is_whole: bool) -> io::Result<()> {
        match self {
            Self::Stream(mut stream) => stream.flush(),
            Self::Beside { beside, file } if is_whole => Ok(beside.persist(file).map(|_| ())?),
            Self::Beside { beside, .. } => beside.close(),
        }
    }
}

impl Get {
    /// Gets window by window.
    pub async fn run(self) -> Result<(), Failure> {
        if self.is_standard_output() && self.output.json {
            return Err(Failure::message(
                "--json and -o - contradict each other: both want standard output; write the bytes with -o FILE, or leave out --json",
            ));
        }
        let tokens = self.tokens.read(self.namespace.block_tokens)?;
        let store = self.connection.attach(self.namespace.namespace(), self.namespace.layout(), self.door.door).await?;
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
        let is_whole = found.len() == keys.len();
        if let Some(sink) = sink {
            sink.finish(is_whole).map_err(|error| self.unwritten(error))?;
        }
        self.show(keys.len(), &found, end)?;
        if is_whole { Ok(()) } else { Err(self.incomplete(keys.len(), found.len(), end)) }
    }

    /// Says why not all came, and what helps.
    fn incomplete(&self, blocks: usize, found: usize, end: GetEnd) -> Failure {
        let why = match end {
            GetEnd::Complete | GetEnd::Miss => {
                "the next is not in the store: it was never put under this namespace, --block-tokens and --block-bytes, or it was evicted or \
                 purged; `tender lookup` says what is there, `tender put` stores it"
            }
            GetEnd::Deadline => "the next did not come in time; get again",
            GetEnd::Shed => "the daemon has no memory or no turn for the next now; get again later",
            GetEnd::Unavailable => "the daemon is gone; see `tender status`, then get again",
            GetEnd::SumMismatch => {
                "the next came with other bytes than were put, and was not written; see the daemon's log, then put it again"
            }
        };
        let kept = match &self.file {
            Some(file) if !self.is_standard_output() => format!("; {} was not written", file.display()),
            _ => String::new(),
        };
        let (found, blocks) = (units::count(found as u64), units::count(blocks as u64));
        Failure::message(format_args!("{found} of {blocks} blocks came, {why}{kept}"))
    }

    fn is_standard_output(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.as_os_str() == "-")
    }

    fn sink(&self) -> Result<Option<Sink>, Failure> {
        match &self.file {
            None => Ok(None),
            Some(_) if self.is_standard_output() => Ok(Some(Sink::Stream(Box::new(io::stdout())))),
            Some(file) => Sink::to(file).map(Some).map_err(|error| self.unwritten(error)),
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
            if found.len() == blocks {
                eprintln!("{} of {blocks} blocks came ({end})", found.len());
            }
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
