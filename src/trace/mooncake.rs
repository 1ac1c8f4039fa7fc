//! Mooncake traces: one request per line, its blocks named by ids that mean the same in every line.
//!
//! `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [block, ...]}`; a block is 512 tokens. Other fields
//! are ignored.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Expect, TraceError, fault, is_time};

/// Tokens of one block of this format.
pub const BLOCK_TOKENS: u32 = 512;

/// Longest line: a prompt of a hundred million tokens; a longer one is not of this format.
const LINE_BYTES_MAX: u64 = 16 << 20;

const FIELDS: [(&str, Expect); 3] =
    [("timestamp", Expect::Seconds), ("input_length", Expect::Whole), ("hash_ids", Expect::WholeNumbers)];

/// One request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// When it came, in milliseconds since the start of the trace.
    pub timestamp: f64,
    /// Tokens of its prompt.
    pub input_length: u64,
    /// Tokens of its answer.
    #[serde(default)]
    pub output_length: u64,
    /// Blocks of its prompt.
    pub hash_ids: Vec<u64>,
}

/// The requests of a file, one at a time, in order.
pub struct Requests {
    file: PathBuf,
    reader: BufReader<File>,
    line: u64,
    text: Vec<u8>,
}

impl Requests {
    /// Opens a file of this format.
    pub fn open(file: &Path) -> Result<Self, TraceError> {
        let reader = File::open(file).map_err(|error| TraceError::whole(file, format!("cannot be read: {error}")))?;
        Ok(Self { file: file.to_owned(), reader: BufReader::with_capacity(1 << 20, reader), line: 0, text: Vec::new() })
    }

    fn read_line(&mut self) -> Result<Option<Request>, TraceError> {
        loop {
            self.text.clear();
            self.line += 1;
            let read = self.reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut self.text);
            let length = read.map_err(|error| self.error(format!("cannot be read: {error}"), false))?;
            if length == 0 {
                return Ok(None);
            }
            if length as u64 == LINE_BYTES_MAX && !self.text.ends_with(b"\n") {
                return Err(
                    self.error(format!("is longer than {LINE_BYTES_MAX} bytes; is this a Mooncake trace?"), false)
                );
            }
            if !self.text.trim_ascii().is_empty() {
                return self.parse().map(Some);
            }
        }
    }

    fn parse(&self) -> Result<Request, TraceError> {
        let text = self.text.trim_ascii();
        match serde_json::from_slice::<Request>(text) {
            Ok(request) if is_time(request.timestamp) => Ok(request),
            parsed => {
                let fault = serde_json::from_slice(text).ok().and_then(|object| fault(&object, &FIELDS));
                let reason = parsed.err().map(|error| error.to_string().replace(" line 1 ", " ")).unwrap_or_default();
                let what = fault.unwrap_or_else(|| format!("no Mooncake request: {reason}"));
                Err(self.error(format!("{what}; correct the line, or leave such lines out with --skip-broken"), true))
            }
        }
    }

    fn error(&self, what: String, skippable: bool) -> TraceError {
        TraceError { file: self.file.clone(), line: self.line, what, skippable }
    }
}

impl Iterator for Requests {
    type Item = Result<Request, TraceError>;

    /// After an error that is skippable the next call goes on with the next line.
    fn next(&mut self) -> Option<Self::Item> {
        self.read_line().transpose()
    }
}
