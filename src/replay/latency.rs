//! Durations counted in classes that are 3 % wide, so that quantiles of any number of them take a fixed 15 KiB.

/// Classes per doubling; half a class is 1.6 %, less than runs differ.
const STEPS: u64 = 32;
const STEPS_BITS: u32 = STEPS.ilog2();
const CLASSES: usize = ((64 - STEPS_BITS as usize) + 1) * STEPS as usize;

/// Counts of durations.
#[derive(Clone, Debug)]
pub struct Latencies {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: vec![0; CLASSES].into(), total: 0 }
    }
}

impl Latencies {
    /// Counts one.
    pub fn add(&mut self, micros: u64) {
        self.counts[class(micros)] += 1;
        self.total += 1;
    }

    /// The duration that `share` of all do not exceed, in microseconds; none when there are none.
    pub fn quantile_us(&self, share: f64) -> Option<u64> {
        let rank = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        let class = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(middle(class as u64))
    }
}

/// Small numbers have a class each; from `STEPS` on, the highest bits choose it.
fn class(micros: u64) -> usize {
    let shift = (64 - micros.leading_zeros()).saturating_sub(STEPS_BITS + 1);
    (u64::from(shift) * STEPS + (micros >> shift)) as usize
}

fn middle(class: u64) -> u64 {
    let shift = (class / STEPS).saturating_sub(1);
    let least = (class - shift * STEPS) << shift;
    least + ((1 << shift) - 1) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_three_percent() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantile_us(0.5), None);
        (1..=100_000).for_each(|micros| latencies.add(micros));
        for (share, right) in [(0.5, 50_000.0), (0.99, 99_000.0), (1.0, 100_000.0)] {
            let found = latencies.quantile_us(share).unwrap() as f64;
            assert!((found / right - 1.0).abs() < 0.03, "{share}: {found} instead of {right}");
        }
    }

    #[test]
    fn every_duration_has_a_class_near_it() {
        for micros in [0, 1, 31, 32, 33, 63, 64, 65, 1000, 123_456_789, u64::MAX / 2, u64::MAX] {
            let near = middle(class(micros) as u64) as f64;
            assert!((near - micros as f64).abs() <= micros as f64 * 0.02, "{micros}: {near}");
        }
    }
}
