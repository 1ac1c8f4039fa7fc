//! Workload traces: who asked for which blocks, and when.
//!
//! ```text
//! file kind       found by            holds                               ids valid in   read as
//! Mooncake JSONL  "timestamp" first   one request per line                every line     mooncake::Requests, a line at a time
//! session JSON    "requests"          one agent session, with subagents   the session    session_json::read, a session at a time
//! ```
//! Nothing here holds more than one session: its chains are kept as what each request adds to the one before it, since a request
//! of an agent repeats nearly all of the previous one.

pub mod generate;
pub mod mooncake;
pub mod session;
pub mod session_json;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read as _, Seek as _};
use std::path::{Path, PathBuf};

use serde::Deserializer as _;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

/// What is wrong with a trace, where, and what to do.
#[derive(Debug)]
pub struct TraceError {
    /// The file concerned.
    pub file: PathBuf,
    /// Line within it, from 1; 0 when no line is to blame.
    pub line: u64,
    /// What is wrong, with field and value, and the cure.
    pub what: String,
    /// Whether only this request or session is unusable, so that others may still be read.
    pub skippable: bool,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ", line {}", self.line)?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for TraceError {}

impl TraceError {
    pub(crate) fn whole(file: &Path, what: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: 0, what: what.into(), skippable: false }
    }
}

/// The two kinds of trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trace {
    /// One file of Mooncake requests.
    Mooncake(PathBuf),
    /// Files of one session each, in the order of their names.
    Sessions(Vec<PathBuf>),
}

impl Trace {
    /// Finds out what lies at a path: a file of either kind, or a folder of sessions.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let unreadable =
            |error| TraceError::whole(path, format!("cannot be read ({error}); name a trace file or folder"));
        if !path.metadata().map_err(unreadable)?.is_dir() {
            return match kind(path)? {
                Kind::Mooncake => Ok(Self::Mooncake(path.to_owned())),
                Kind::Session => Ok(Self::Sessions(vec![path.to_owned()])),
            };
        }
        let mut files = Vec::new();
        for entry in path.read_dir().map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file.extension().is_some_and(|extension| extension == "json") {
                files.push(file);
            }
        }
        files.sort();
        if files.is_empty() {
            let what = "holds no *.json files; a folder must hold sessions, one per file (unpack archives first: tar -xJf FILE)";
            return Err(TraceError::whole(path, what));
        }
        Ok(Self::Sessions(files))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mooncake,
    Session,
}

const COMPRESSIONS: [(&[u8], &str, &str); 4] = [
    (b"\xfd7zXZ\0", "xz", "xz -dk"),
    (b"\x1f\x8b", "gzip", "gunzip -k"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dk"),
    (b"BZh", "bzip2", "bunzip2 -k"),
];

/// Decides by the first fields of the first JSON object, whatever the file is called.
fn kind(path: &Path) -> Result<Kind, TraceError> {
    let unreadable = |error| TraceError::whole(path, format!("cannot be read: {error}"));
    let mut file = File::open(path).map_err(unreadable)?;
    let mut head = Vec::new();
    file.by_ref().take(8).read_to_end(&mut head).map_err(unreadable)?;
    if let Some((_, name, cure)) = COMPRESSIONS.iter().find(|(magic, ..)| head.starts_with(magic)) {
        let path_shown = path.display();
        return Err(TraceError::whole(
            path,
            format!("is compressed with {name}; unpack it first: {cure} {path_shown}"),
        ));
    }
    file.rewind().map_err(unreadable)?;
    let found = Cell::new(None);
    // The first telling field ends the parse by an error, so that a session of many megabytes is not read to its end here.
    let end = serde_json::Deserializer::from_reader(BufReader::new(file)).deserialize_map(Telling(&found)).err();
    found.get().ok_or_else(|| {
        let because = end.map(|error| format!(" ({error})")).unwrap_or_default();
        let what = format!(
            "is neither a Mooncake trace (a line has `timestamp` and `hash_ids`) nor a session (has `requests`){because}"
        );
        TraceError::whole(path, what)
    })
}

struct Telling<'a>(&'a Cell<Option<Kind>>);

impl<'de> Visitor<'de> for Telling<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(field) = map.next_key::<String>()? {
            self.0.set(match field.as_str() {
                "timestamp" | "input_length" | "output_length" | "hash_ids" => Some(Kind::Mooncake),
                "requests" | "hash_id_scope" | "block_size" => Some(Kind::Session),
                _ => None,
            });
            if self.0.get().is_some() {
                return Err(A::Error::custom("enough"));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// What a field of a trace must be.
#[derive(Clone, Copy)]
enum Expect {
    Whole,
    WholeNumbers,
    Seconds,
    Text,
}

/// Longest value repeated in an error.
const SHOWN_CHARACTERS_MAX: usize = 60;

/// The first field of an object that is not what it must be, with its value: the slow second look that makes an error of use.
fn fault(object: &Value, fields: &[(&str, Expect)]) -> Option<String> {
    let Some(entries) = object.as_object() else {
        return Some(format!("`{}` is no JSON object", shown(object)));
    };
    fields.iter().find_map(|(name, expect)| {
        let Some(value) = entries.get(*name) else {
            return Some(format!("field `{name}` is missing"));
        };
        let wrong = |what: &str| Some(format!("field `{name}` is `{}`, but must be {what}", shown(value)));
        match expect {
            Expect::Whole if value.as_u64().is_none() => wrong("a whole number from 0"),
            Expect::Seconds if !value.as_f64().is_some_and(is_time) => wrong("a time from 0"),
            Expect::Text if value.as_str().is_none_or(str::is_empty) => wrong("text that is not empty"),
            Expect::WholeNumbers => match value.as_array() {
                None => wrong("a list of whole numbers"),
                Some(list) => list.iter().position(|id| id.as_u64().is_none()).map(|i| {
                    format!("field `{name}[{i}]` is `{}`, but must be a whole number from 0", shown(&list[i]))
                }),
            },
            _ => None,
        }
    })
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARACTERS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Times beyond a hundred years are mistakes of unit, and would overflow what is computed from them.
const TIME_MAX: f64 = 3.2e12;

fn is_time(time: f64) -> bool {
    (0.0..=TIME_MAX).contains(&time)
}
