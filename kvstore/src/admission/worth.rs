//! Is a block worth a write to disk? Flash wears, and most blocks of a chat are never read again. With a budget of bytes a day the
//! first half of what was saved up is for everything, the second half only for blocks that were used again; without one all are
//! admitted. A block that comes back after it was lost counts as used again.

use tender_proto::BlockKey;

/// Admission to disk.
#[derive(Debug)]
pub struct Worth {
    budget: Option<Budget>,
    /// Fingerprints of blocks that were lost, each at the place that its key says: a newer one takes the place of an older one.
    lost: Vec<u32>,
}

#[derive(Debug)]
struct Budget {
    bytes_per_day: u64,
    /// Below zero when more was written than was saved up.
    saved_bytes: i64,
    filled_ms: u64,
}

const DAY_MS: u64 = 24 * 3_600 * 1_000;
/// 64 Ki fingerprints of 4 bytes: remembers about as many blocks as 1 GiB of 16 KiB blocks holds.
const LOST_MAX: usize = 1 << 16;

impl Worth {
    /// Admission under a budget of bytes per day, or under none.
    pub fn new(bytes_per_day: Option<u64>) -> Self {
        let budget = bytes_per_day.map(|bytes_per_day| Budget {
            bytes_per_day,
            saved_bytes: Budget::saved_bytes_max(bytes_per_day) as i64,
            filled_ms: 0,
        });
        Self { budget, lost: vec![0; LOST_MAX] }
    }

    /// Whether a block may be written; if so the budget is charged.
    pub fn admit(&mut self, bytes: u64, reused: bool, now_ms: u64) -> bool {
        let Some(budget) = &mut self.budget else { return true };
        budget.fill(now_ms);
        let reserve = if reused { 0 } else { Budget::saved_bytes_max(budget.bytes_per_day) / 2 };
        if i128::from(budget.saved_bytes) < i128::from(reserve) + i128::from(bytes) {
            return false;
        }
        budget.saved_bytes = budget.saved_bytes.saturating_sub_unsigned(bytes);
        true
    }

    /// Bytes are written whatever is left of the budget: they are missing later.
    pub fn charge(&mut self, bytes: u64, now_ms: u64) {
        if let Some(budget) = &mut self.budget {
            budget.fill(now_ms);
            budget.saved_bytes = budget.saved_bytes.saturating_sub_unsigned(bytes);
        }
    }

    /// The most bytes of a block that may ever be written, unless somebody waits for it.
    pub fn block_bytes_max(&self) -> Option<u64> {
        self.budget.as_ref().map(|budget| Budget::saved_bytes_max(budget.bytes_per_day))
    }

    fn fingerprint(key: &BlockKey) -> (usize, u32) {
        let [a, b, c, d, e, f, ..] = *key.as_bytes();
        (usize::from(u16::from_le_bytes([a, b])), u32::from_le_bytes([c, d, e, f]) | 1)
    }

    /// A block was lost.
    pub fn remember_lost(&mut self, key: &BlockKey) {
        let (place, fingerprint) = Self::fingerprint(key);
        self.lost[place] = fingerprint;
    }

    /// Whether a block that is put was here before.
    pub fn was_lost(&self, key: &BlockKey) -> bool {
        let (place, fingerprint) = Self::fingerprint(key);
        self.lost[place] == fingerprint
    }
}

impl Budget {
    /// What can be saved up: an hour's worth.
    fn saved_bytes_max(bytes_per_day: u64) -> u64 {
        (bytes_per_day / 24).min(i64::MAX as u64)
    }

    fn fill(&mut self, now_ms: u64) {
        let elapsed_ms = now_ms - self.filled_ms;
        let earned = (u128::from(self.bytes_per_day) * u128::from(elapsed_ms) / u128::from(DAY_MS)) as u64;
        if earned > 0 {
            let max = Self::saved_bytes_max(self.bytes_per_day) as i64;
            self.saved_bytes = self.saved_bytes.saturating_add_unsigned(earned).min(max);
            self.filled_ms = now_ms;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_budget_everything_is_admitted() {
        assert!(Worth::new(None).admit(u64::MAX, false, 0));
    }

    #[test]
    fn the_second_half_of_the_budget_is_for_what_was_used_again() {
        let mut worth = Worth::new(Some(24 * 1_000));
        assert!(worth.admit(500, false, 0));
        assert!(!worth.admit(1, false, 0), "a new block is refused at half");
        assert!(worth.admit(500, true, 0), "a used one is not");
        assert!(!worth.admit(1, true, 0), "until nothing is left");
        assert!(worth.admit(400, true, DAY_MS / 24), "an hour later an hour's worth is there");
    }

    #[test]
    fn a_lost_block_is_known_when_it_comes_back() {
        let mut worth = Worth::new(None);
        let [one, other] = [1, 2].map(|byte| BlockKey::from_bytes([byte; 32]));
        worth.remember_lost(&one);
        assert!(worth.was_lost(&one) && !worth.was_lost(&other));
    }
}
