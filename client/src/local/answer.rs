//! An answer on its way from who took it off the ring to who asked.

use std::mem;
use std::sync::Arc;

use tender_proto::door::{HoldId, HoldKind, Reply, ReserveOutcome};

use super::debts::{Debts, Origin};
use crate::failure::Failure;

/// A reply. What it grants is given back unless somebody takes it: who asked may be gone.
pub(super) struct Answer {
    reply: Reply,
    origin: Origin,
    debts: Arc<Debts>,
}

impl Answer {
    /// Its names come from there.
    pub(super) fn new(reply: Reply, origin: Origin, debts: &Arc<Debts>) -> Self {
        Self { reply, origin, debts: Arc::clone(debts) }
    }

    /// The answer to what was asked, or why there is none. From here on what it grants is the caller's to give back.
    pub(super) fn take(mut self) -> Result<Reply, Failure> {
        match mem::replace(&mut self.reply, Reply::Done) {
            Reply::Unattached => Err(Failure::Detached),
            Reply::Busy => Err(Failure::Shed),
            Reply::Stopping => Err(Failure::Gone),
            Reply::Refused { message, .. } | Reply::Malformed(message) => {
                tracing::warn!("the daemon refuses: {message}");
                Err(Failure::Refused)
            }
            reply => Ok(reply),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        match &self.reply {
            Reply::Acquired(acquired) => {
                let parts = acquired.blocks.iter().flat_map(|block| &block.parts);
                self.debts.owe(self.origin, HoldKind::Lease, parts.map(|part| part.hold));
            }
            Reply::Reserved(outcomes) => {
                self.debts.owe(self.origin, HoldKind::Reservation, outcomes.iter().filter_map(granted));
            }
            _ => {}
        }
    }
}

fn granted(outcome: &ReserveOutcome) -> Option<HoldId> {
    match outcome {
        ReserveOutcome::Granted { hold, .. } => Some(*hold),
        _ => None,
    }
}
