//! What became of the blocks of a request; of many, when added up.

use serde::{Deserialize, Serialize};
use tender_client::{GetEnd, PutOutcome, Tier};

macro_rules! counts {
    ($(#[$of_struct:meta])* $name:ident: $($(#[$of_field:meta])* $field:ident)*) => {
        $(#[$of_struct])*
        pub struct $name {
            $($(#[$of_field])* pub $field: u64,)*
        }

        impl std::ops::AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                $(self.$field += other.$field;)*
            }
        }
    };
}

counts! {
    /// Counts, under the names of the report. Every block asked for is a hit in one tier or a miss; what was wrong counts as a miss too.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(default)]
    Tally:
    requests
    blocks
    hit_blocks_host
    hit_blocks_disk
    hit_blocks_peer
    miss_blocks
    wrong_blocks
    tokens_saved
    hit_blocks_object
    wrong_bytes
    input_tokens
    got_bytes
    put_bytes
    put_stored_blocks
    put_present_blocks
    put_being_written_blocks
    put_no_room_blocks
    put_over_quota_blocks
    put_refused_blocks
    put_shed_blocks
    put_unavailable_blocks
    /// Not offered, since a block before them was not taken.
    put_unsent_blocks
    /// Gets that ended for another reason than a miss or the end.
    get_deadlines
    get_sheds
    get_unavailables
    get_sum_mismatches
}

impl Tally {
    /// Blocks found, in any tier.
    pub fn hit_blocks(&self) -> u64 {
        self.hit_blocks_host + self.hit_blocks_disk + self.hit_blocks_peer + self.hit_blocks_object
    }

    /// Share of blocks that were found, in percent.
    pub fn hit_percent(&self) -> f64 {
        100.0 * self.hit_blocks() as f64 / self.blocks.max(1) as f64
    }

    pub(super) fn hit(&mut self, tier: Tier) {
        *match tier {
            Tier::Host => &mut self.hit_blocks_host,
            Tier::Disk => &mut self.hit_blocks_disk,
            Tier::Peer => &mut self.hit_blocks_peer,
            Tier::Object => &mut self.hit_blocks_object,
        } += 1;
    }

    pub(super) fn ended(&mut self, end: GetEnd) {
        match end {
            GetEnd::Complete | GetEnd::Miss => {}
            GetEnd::Deadline => self.get_deadlines += 1,
            GetEnd::Shed => self.get_sheds += 1,
            GetEnd::Unavailable => self.get_unavailables += 1,
            GetEnd::SumMismatch => self.get_sum_mismatches += 1,
        }
    }

    pub(super) fn put(&mut self, outcome: PutOutcome) {
        *match outcome {
            PutOutcome::Stored | PutOutcome::ShardStored => &mut self.put_stored_blocks,
            PutOutcome::AlreadyPresent => &mut self.put_present_blocks,
            PutOutcome::BeingWritten => &mut self.put_being_written_blocks,
            PutOutcome::NoRoom => &mut self.put_no_room_blocks,
            PutOutcome::OverQuota => &mut self.put_over_quota_blocks,
            PutOutcome::Refused => &mut self.put_refused_blocks,
            PutOutcome::Shed => &mut self.put_shed_blocks,
            PutOutcome::Unavailable => &mut self.put_unavailable_blocks,
        } += 1;
    }
}
