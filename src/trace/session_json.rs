//! Session JSON, read and written.
//!
//! While a file is read, its chains shrink to what each request adds, so a session never stands in memory as JSON. Only a file that
//! turns out to be wrong is read again with all its values, to name the one that is.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::session::{Agent, Request, Session};
use super::{Expect, TraceError, fault, is_time};

/// Reads a session from a file.
pub fn read(file: &Path) -> Result<Session, TraceError> {
    let reader = File::open(file).map_err(|error| TraceError::whole(file, format!("cannot be read: {error}")))?;
    let mut parser = serde_json::Deserializer::from_reader(BufReader::with_capacity(1 << 18, reader));
    let mut session = Session { agents: vec![Agent::default()], ..Session::default() };
    let parsed = SessionSeed(&mut session).deserialize(&mut parser).and_then(|()| parser.end());
    let checked = parsed.map_err(|error| (error.line() as u64, error.to_string())).and_then(|()| check(&session));
    checked.map_err(|(line, reason)| {
        let what = explain(file).unwrap_or_else(|| format!("no session: {reason}"));
        let what = format!("{what}; correct it, or leave such sessions out with --skip-broken");
        TraceError { file: file.to_owned(), line, what, skippable: true }
    })?;
    // Stable: requests of one agent are in order already, since times that go back were raised as they were read.
    session.requests.sort_by_key(|request| request.start_ms);
    Ok(session)
}

fn check(session: &Session) -> Result<(), (u64, String)> {
    let missing = match session {
        Session { id, .. } if id.is_empty() => "field `id` is missing",
        Session { block_tokens: 0 | 4097.., .. } => "field `block_size` is missing or not 1 to 4096",
        _ => return Ok(()),
    };
    Err((0, missing.to_owned()))
}

/// Reads a file that is no session once more, now with its values, to name the one that is wrong.
fn explain(file: &Path) -> Option<String> {
    let session: Value = serde_json::from_reader(BufReader::new(File::open(file).ok()?)).ok()?;
    if let Some(fault) = fault(&session, &[("id", Expect::Text), ("block_size", Expect::Whole)]) {
        return Some(fault);
    }
    let (size, scope) = (&session["block_size"], &session["hash_id_scope"]);
    if !size.as_u64().is_some_and(|size| (1..=4096).contains(&size)) {
        return Some(format!("field `block_size` is `{size}`, but must be 1 to 4096"));
    }
    if !scope.is_null() && scope != "local" && scope != "global" {
        return Some(format!("field `hash_id_scope` is `{scope}`, but must be `local` or `global`"));
    }
    explain_requests(&session, "requests")
}

fn explain_requests(holder: &Value, path: &str) -> Option<String> {
    let Some(requests) = holder.get("requests").and_then(Value::as_array) else {
        return Some(format!("field `{path}` is missing or no list"));
    };
    requests.iter().enumerate().find_map(|(i, entry)| {
        let path = format!("{path}[{i}]");
        if entry["type"] == "subagent" {
            let fault = fault(entry, &[("t", Expect::Seconds)]).map(|fault| format!("{path}: {fault}"));
            return fault.or_else(|| explain_requests(entry, &format!("{path}.requests")));
        }
        let fields = [("t", Expect::Seconds), ("in", Expect::Whole), ("hash_ids", Expect::WholeNumbers)];
        fault(entry, &fields).map(|fault| format!("{path}: {fault}"))
    })
}

/// Fills a session from its JSON object.
struct SessionSeed<'a>(&'a mut Session);

impl<'de> DeserializeSeed<'de> for SessionSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for SessionSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a session")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let session = self.0;
        let mut seen = false;
        while let Some(field) = map.next_key::<String>()? {
            match field.as_str() {
                "id" => session.id = map.next_value()?,
                "block_size" => session.block_tokens = map.next_value()?,
                "hash_id_scope" => session.scope = map.next_value()?,
                "tool_tokens" => session.tool_tokens = map.next_value()?,
                "system_tokens" => session.system_tokens = map.next_value()?,
                "requests" => {
                    seen = true;
                    map.next_value_seed(EntriesSeed { session, agent: 0, chain: &mut Vec::new(), last_ms: &mut 0 })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if seen { Ok(()) } else { Err(A::Error::missing_field("requests")) }
    }
}

/// Adds the entries of one agent to a session.
struct EntriesSeed<'a> {
    session: &'a mut Session,
    agent: usize,
    /// The agent's chain so far.
    chain: &'a mut Vec<u64>,
    last_ms: &'a mut u64,
}

impl<'de> DeserializeSeed<'de> for EntriesSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for EntriesSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of requests")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let Self { session, agent, chain, last_ms } = self;
        while entries.next_element_seed(EntrySeed { session, agent, chain, last_ms })?.is_some() {}
        Ok(())
    }
}

/// Adds one entry: a request, or a subagent with all of its own.
struct EntrySeed<'a> {
    session: &'a mut Session,
    agent: usize,
    chain: &'a mut Vec<u64>,
    last_ms: &'a mut u64,
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request or a subagent")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { session, agent, chain, last_ms } = self;
        let (mut seconds, mut input, mut ids, mut nested) = (None, None, None, None);
        let mut request = Request { agent, ..Request::default() };
        while let Some(field) = map.next_key::<Field>()? {
            match field {
                Field::T => seconds = Some(map.next_value::<f64>()?),
                Field::In => input = Some(map.next_value()?),
                Field::Out => request.output_tokens = map.next_value()?,
                Field::HashIds => ids = Some(map.next_value::<Vec<u64>>()?),
                Field::Stop => request.stop = map.next_value::<Option<String>>()?.as_deref().into(),
                Field::Requests => {
                    // Their times count from the start of this entry, which may follow: they are shifted below.
                    let started = session.agents.len();
                    session.agents.push(Agent { parent: Some(agent), start_ms: 0 });
                    let first = session.requests.len();
                    map.next_value_seed(EntriesSeed {
                        session: &mut *session,
                        agent: started,
                        chain: &mut Vec::new(),
                        last_ms: &mut 0,
                    })?;
                    nested = Some((started, first));
                }
                Field::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let seconds = seconds.ok_or_else(|| A::Error::missing_field("t"))?;
        if !is_time(seconds) {
            return Err(A::Error::custom(format_args!("`t` is {seconds}, which is no time")));
        }
        let start_ms = ((seconds * 1000.0).round() as u64).max(*last_ms);
        if let Some((started, first)) = nested {
            session.agents[started..].iter_mut().for_each(|agent| agent.start_ms += start_ms);
            session.requests[first..].iter_mut().for_each(|request| request.start_ms += start_ms);
            return Ok(());
        }
        *last_ms = start_ms;
        let ids: Vec<u64> = ids.ok_or_else(|| A::Error::missing_field("hash_ids"))?;
        request.start_ms = start_ms;
        request.input_tokens = input.ok_or_else(|| A::Error::missing_field("in"))?;
        request.kept_blocks = ids.iter().zip(chain.iter()).take_while(|(new, old)| new == old).count();
        request.added_ids = ids[request.kept_blocks..].to_vec();
        *chain = ids;
        session.requests.push(request);
        Ok(())
    }
}

/// Fields of an entry that matter here.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    T,
    In,
    Out,
    HashIds,
    Stop,
    Requests,
    #[serde(other)]
    Other,
}

/// Writes a session, so that reading it gives the same session again if no two of its requests start at the same time.
pub fn write(session: &Session, out: &mut dyn Write) -> io::Result<()> {
    let (id, scope) = (serde_json::to_string(&session.id)?, serde_json::to_string(&session.scope)?);
    let Session { block_tokens, tool_tokens, system_tokens, .. } = session;
    write!(
        out,
        r#"{{"id":{id},"models":[],"block_size":{block_tokens},"hash_id_scope":{scope},"tool_tokens":{tool_tokens},"system_tokens":{system_tokens},"requests":"#
    )?;
    write_agent(session, 0, out)?;
    out.write_all(b"}\n")
}

fn write_agent(session: &Session, agent: usize, out: &mut dyn Write) -> io::Result<()> {
    let start_ms = session.agents[agent].start_ms;
    let mut children = (0..session.agents.len()).filter(|&i| session.agents[i].parent == Some(agent)).peekable();
    let mut chain: Vec<u64> = Vec::new();
    let mut separator = "[";
    let seconds = |at_ms: u64| (at_ms - start_ms) as f64 / 1000.0;
    let write_child = |child: usize, separator: &str, out: &mut dyn Write| {
        let at = seconds(session.agents[child].start_ms);
        write!(out, r#"{separator}{{"t":{at},"type":"subagent","requests":"#)?;
        write_agent(session, child, out)?;
        out.write_all(b"}")
    };
    for request in session.requests.iter().filter(|request| request.agent == agent) {
        while let Some(child) = children.next_if(|&child| session.agents[child].start_ms <= request.start_ms) {
            write_child(child, separator, out)?;
            separator = ",";
        }
        chain.truncate(request.kept_blocks);
        chain.extend(&request.added_ids);
        let (ids, at) = (serde_json::to_string(&chain)?, seconds(request.start_ms));
        let Request { input_tokens, output_tokens, stop, .. } = request;
        write!(
            out,
            r#"{separator}{{"t":{at},"type":"n","in":{input_tokens},"out":{output_tokens},"hash_ids":{ids},"stop":"{}"}}"#,
            stop.name()
        )?;
        separator = ",";
    }
    for child in children {
        write_child(child, separator, out)?;
        separator = ",";
    }
    out.write_all(if separator == "[" { b"[]" } else { b"]" })
}
