//! Sessions made up from a seed: the shape of agent work, for where no recorded trace is at hand.
//!
//! ```text
//! agent kind ── system prompt and tools, the same tokens in all its sessions
//!   session  ── a person asks ─ tool, tool, tool … ─ answer ─ (the person thinks) ─ asks …
//!     subagent ── a tool that is an agent: starts from its kind's own prompt, ends, leaves a short result
//! ```
//! The same workload gives the same sessions. Numbers of tokens and pauses are spread as in recorded coding sessions, scaled down by
//! `Workload` so that a small store in a short time meets every tier.

use tender_proto::sum::{GOLDEN, mix};

use super::session::{Agent, Request, Scope, Session, Stop};

/// What to make up.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Same seed, same sessions.
    pub seed: u64,
    /// How many sessions.
    pub sessions: usize,
    /// How many kinds of agents they are spread over; at least one.
    pub agent_kinds: usize,
    /// Tokens per block.
    pub block_tokens: u32,
    /// How often a person asks in a session.
    pub turns: (u64, u64),
    /// Tool calls between question and answer.
    pub tool_calls: (u64, u64),
    /// Tokens of system prompt and tools together.
    pub prompt_tokens: (u64, u64),
    /// Tokens of one tool result.
    pub result_tokens: (u64, u64),
    /// Tool calls that start a subagent, of a thousand.
    pub subagents_permille: u64,
    /// Answers after which the history is cut down to a summary, of a thousand.
    pub compactions_permille: u64,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            seed: 1,
            sessions: 24,
            agent_kinds: 3,
            block_tokens: 16,
            turns: (2, 4),
            tool_calls: (2, 7),
            prompt_tokens: (4_000, 9_000),
            result_tokens: (150, 1_500),
            subagents_permille: 60,
            compactions_permille: 60,
        }
    }
}

const QUESTION_TOKENS: (u64, u64) = (40, 600);
const ANSWER_TOKENS: (u64, u64) = (30, 500);
const SUMMARY_TOKENS: (u64, u64) = (400, 1_200);
const TOOL_MS: (u64, u64) = (300, 15_000);
const PERSON_MS: (u64, u64) = (20_000, 600_000);
const ANSWER_MS: (u64, u64) = (500, 8_000);

/// Ids of a kind's prompt lie above those of all sessions.
const KIND_IDS: u64 = 1 << 40;
/// Ids that one session or kind may use.
const IDS_EACH: u64 = 1 << 24;

impl Workload {
    /// Session `index` of this workload.
    pub fn session(&self, index: usize) -> Session {
        let kind = index % self.agent_kinds.max(1);
        let prompt = |kind: usize| Numbers(mix(self.seed ^ mix(kind as u64 + GOLDEN))).within(self.prompt_tokens);
        let mut making = Making {
            workload: self,
            numbers: Numbers(mix(self.seed.wrapping_add(mix(index as u64 + 1)))),
            kind: kind as u64,
            next_id: index as u64 * IDS_EACH,
            now_ms: 0,
            prompt_tokens: prompt(kind),
            session: Session {
                id: format!("generated-{:x}-{index}", self.seed),
                block_tokens: self.block_tokens,
                scope: Scope::Global,
                tool_tokens: prompt(kind) * 3 / 4,
                system_tokens: prompt(kind) - prompt(kind) * 3 / 4,
                agents: vec![Agent::default()],
                requests: Vec::new(),
            },
        };
        let turns = making.numbers.within(self.turns);
        making.agent(0, turns, 0);
        making.session
    }

    /// All sessions, one after the other.
    pub fn all(&self) -> impl Iterator<Item = Session> {
        (0..self.sessions).map(|index| self.session(index))
    }
}

/// A session being made up.
struct Making<'a> {
    workload: &'a Workload,
    numbers: Numbers,
    kind: u64,
    next_id: u64,
    now_ms: u64,
    prompt_tokens: u64,
    session: Session,
}

/// What an agent has in its window.
struct Context {
    chain: Vec<u64>,
    tokens: u64,
    /// Blocks in common with the chain of the previous request.
    kept_blocks: usize,
}

impl Making<'_> {
    fn agent(&mut self, agent: usize, turns: u64, depth: u64) {
        let mut context = Context { chain: Vec::new(), tokens: self.prompt_tokens / (depth + 1), kept_blocks: 0 };
        let first_prompt_id = KIND_IDS + (self.kind * 2 + depth.min(1)) * IDS_EACH;
        context.chain.extend((first_prompt_id..).take((context.tokens / self.block_tokens()) as usize));
        let prompt_blocks = context.chain.len();
        for turn in 0..turns {
            if turn > 0 {
                self.now_ms += self.numbers.within(PERSON_MS);
            }
            context.tokens += self.numbers.within(QUESTION_TOKENS);
            let tool_calls = self.numbers.within(self.workload.tool_calls) / (depth + 1);
            for _ in 0..tool_calls {
                self.request(agent, &mut context, Stop::ToolUse);
                context.tokens += self.tool(agent, depth);
            }
            self.request(agent, &mut context, Stop::EndTurn);
            if self.numbers.happens(self.workload.compactions_permille) {
                context.chain.truncate(prompt_blocks);
                context.kept_blocks = context.kept_blocks.min(prompt_blocks);
                context.tokens = prompt_blocks as u64 * self.block_tokens() + self.numbers.within(SUMMARY_TOKENS);
            }
        }
    }

    /// One request with everything in the window, and its answer.
    fn request(&mut self, agent: usize, context: &mut Context, stop: Stop) {
        let blocks = (context.tokens / self.block_tokens()) as usize;
        while context.chain.len() < blocks {
            context.chain.push(self.next_id);
            self.next_id += 1;
        }
        let output_tokens = self.numbers.within(ANSWER_TOKENS);
        self.now_ms += 1 + self.numbers.within(ANSWER_MS);
        self.session.requests.push(Request {
            agent,
            start_ms: self.now_ms,
            kept_blocks: context.kept_blocks,
            added_ids: context.chain[context.kept_blocks..].to_vec(),
            input_tokens: context.tokens,
            output_tokens,
            stop,
        });
        context.kept_blocks = blocks;
        context.tokens += output_tokens;
    }

    /// Runs a tool; tells the tokens of its result.
    fn tool(&mut self, agent: usize, depth: u64) -> u64 {
        self.now_ms += 1 + self.numbers.within(TOOL_MS);
        if depth < 2 && self.numbers.happens(self.workload.subagents_permille) {
            let started = self.session.agents.len();
            self.session.agents.push(Agent { parent: Some(agent), start_ms: self.now_ms });
            self.agent(started, 1, depth + 1);
        }
        self.numbers.within(self.workload.result_tokens)
    }

    fn block_tokens(&self) -> u64 {
        self.workload.block_tokens.into()
    }
}

/// A random number as one from 0 on and below 1.
pub fn share(number: u64) -> f64 {
    (number >> 11) as f64 / (1u64 << 53) as f64
}

/// Random numbers that a seed fixes.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// From least to most, small ones more often: the square of an even spread has the long tail of prompts and pauses.
    fn within(&mut self, (least, most): (u64, u64)) -> u64 {
        let even = share(self.next());
        least + ((most - least) as f64 * even * even) as u64
    }

    fn happens(&mut self, permille: u64) -> bool {
        self.next() % 1000 < permille
    }
}
