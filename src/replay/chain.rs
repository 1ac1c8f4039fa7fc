//! From the ids of a trace to keys, each derived once: the chains of a session grow by little from request to request.

use tender_client::proto::{BlockKey, trace_tokens};

use crate::trace::session::Request;

/// Keys of the last request of each agent of a session.
#[derive(Debug)]
pub struct Chains {
    root: BlockKey,
    scope: String,
    block_tokens: u32,
    agents: Vec<Vec<BlockKey>>,
    /// Per agent, how many of its requests are still to come; a chain is dropped with the last.
    left: Vec<usize>,
}

impl Chains {
    /// Chains of a session's requests, rooted in a namespace.
    pub fn new(root: BlockKey, scope: &str, block_tokens: u32, requests: &[Request]) -> Self {
        let agents = requests.iter().map(|request| request.agent + 1).max().unwrap_or_default();
        let mut left = vec![0; agents];
        requests.iter().for_each(|request| left[request.agent] += 1);
        Self { root, scope: scope.to_owned(), block_tokens, agents: vec![Vec::new(); agents], left }
    }

    /// The keys of a request, in the order of the session's requests.
    pub fn next(&mut self, request: &Request) -> Vec<BlockKey> {
        let agent = request.agent;
        let mut keys = std::mem::take(&mut self.agents[agent]);
        keys.truncate(request.kept_blocks);
        extend(&mut keys, &self.root, &self.scope, self.block_tokens, &request.added_ids);
        self.left[agent] = self.left[agent].saturating_sub(1);
        if self.left[agent] > 0 {
            self.agents[agent].clone_from(&keys);
        }
        keys
    }
}

/// The keys of a chain of ids that stands by itself.
pub fn keys_of(root: &BlockKey, scope: &str, block_tokens: u32, ids: &[u64]) -> Vec<BlockKey> {
    let mut keys = Vec::with_capacity(ids.len());
    extend(&mut keys, root, scope, block_tokens, ids);
    keys
}

fn extend(keys: &mut Vec<BlockKey>, root: &BlockKey, scope: &str, block_tokens: u32, ids: &[u64]) {
    keys.reserve(ids.len());
    for id in ids {
        let parent = keys.last().unwrap_or(root);
        keys.push(parent.child(&trace_tokens(scope, *id, block_tokens), &[]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::generate::Workload;

    #[test]
    fn chains_that_grow_are_those_derived_anew() {
        let root = BlockKey::from_bytes([9; 32]);
        let workload = Workload { subagents_permille: 300, compactions_permille: 300, ..Workload::default() };
        let session = workload.session(1);
        assert!(session.agents.len() > 1);
        let mut ids = vec![Vec::new(); session.agents.len()];
        let mut chains = Chains::new(root, session.scope_name(), session.block_tokens, &session.requests);
        for request in &session.requests {
            let ids = &mut ids[request.agent];
            ids.truncate(request.kept_blocks);
            ids.extend(&request.added_ids);
            let anew = keys_of(&root, session.scope_name(), session.block_tokens, ids);
            assert_eq!(chains.next(request), anew);
        }
        assert!(chains.agents.iter().all(Vec::is_empty));
    }
}
