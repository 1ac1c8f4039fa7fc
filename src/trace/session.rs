//! Session traces: what one agent asked in the course of hours, with the subagents it started.
//!
//! `{"id", "block_size", "hash_id_scope": "local"|"global", "tool_tokens", "system_tokens", "requests": [...]}`; a request is `{"t":
//! seconds, "type", "in": tokens, "out": tokens, "hash_ids", "stop"}`, an entry of type `subagent` has its own `requests`, whose times
//! count from its own start. Other fields are ignored.
//!
//! A [`Session`] holds all requests of all its agents in the order of time. Of a chain only what differs from the previous chain of
//! the same agent is kept: a real trace shrinks to a 28th.

use serde::{Deserialize, Serialize};

/// Where the ids of a session mean the same block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// In this session.
    #[default]
    Local,
    /// In all sessions.
    Global,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stop {
    /// A tool runs; the agent returns by itself.
    ToolUse,
    /// A person thinks.
    EndTurn,
    /// Not said.
    #[default]
    Unknown,
}

/// One agent: the session's own, or one that another started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    /// Index of the agent that started it; none for the session's own.
    pub parent: Option<usize>,
    /// Milliseconds since the start of the session.
    pub start_ms: u64,
}

/// One request of an agent. Its chain is the first `kept_blocks` of the agent's previous one (none at first), then `added_ids`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Index of the agent.
    pub agent: usize,
    /// Milliseconds since the start of the session.
    pub start_ms: u64,
    /// Blocks in common with the agent's previous request.
    pub kept_blocks: usize,
    /// Ids of the blocks that follow them.
    pub added_ids: Vec<u64>,
    /// Tokens of the prompt.
    pub input_tokens: u64,
    /// Tokens of the answer.
    pub output_tokens: u64,
    /// Why the answer ended.
    pub stop: Stop,
}

/// One session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Its name; the scope of its ids where they are local.
    pub id: String,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Where its ids are valid.
    pub scope: Scope,
    /// Tokens of the tool definitions.
    pub tool_tokens: u64,
    /// Tokens of the system prompt.
    pub system_tokens: u64,
    /// Its agents; the first is its own.
    pub agents: Vec<Agent>,
    /// Requests of all agents, in order of time.
    pub requests: Vec<Request>,
}

impl Session {
    /// What ids are valid in, as `tender_proto::trace_tokens` wants it.
    pub fn scope_name(&self) -> &str {
        match self.scope {
            Scope::Local => &self.id,
            Scope::Global => "",
        }
    }

    /// Milliseconds from its start to its last request.
    pub fn length_ms(&self) -> u64 {
        self.requests.last().map_or(0, |request| request.start_ms)
    }

    /// The length of every request's chain, in blocks.
    pub fn chain_blocks(&self) -> impl Iterator<Item = usize> {
        self.requests.iter().map(|request| request.kept_blocks + request.added_ids.len())
    }

    /// Shortens every pause to at most `gap_ms_max`.
    pub fn cap_gaps(&mut self, gap_ms_max: u64) {
        let (mut before, mut cut) = (0, 0);
        for request in &mut self.requests {
            cut += (request.start_ms - before).saturating_sub(gap_ms_max);
            before = request.start_ms;
            request.start_ms -= cut;
        }
    }
}

impl From<Option<&str>> for Stop {
    fn from(name: Option<&str>) -> Self {
        match name {
            Some("tool_use") => Self::ToolUse,
            Some("end_turn") => Self::EndTurn,
            _ => Self::Unknown,
        }
    }
}

impl Stop {
    /// Its name in a trace.
    pub fn name(self) -> &'static str {
        match self {
            Self::ToolUse => "tool_use",
            Self::EndTurn => "end_turn",
            Self::Unknown => "",
        }
    }
}
