//! Bytes that say whose they are: derived from block, shard and version, so that whatever comes back wrong, mixed, old or of another
//! tenant is recognised.

use tender_proto::sum::{GOLDEN, mix};
use tender_proto::{BlockKey, Shard};

use crate::device::block::PAGE_BYTES;
use crate::names::TenantId;

const PAGE: usize = PAGE_BYTES as usize;

/// In the upper bits of the first word of each page.
const MARK: u64 = 0xa5a5;

/// Names what a group writes: unique for each life of a group, and tells its tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u64);

impl Version {
    pub(super) fn new(number: u64, tenant: TenantId) -> Self {
        Self(number << 8 | u64::from(tenant.0))
    }

    fn tenant(self) -> u64 {
        self.0 & 0xff
    }
}

/// What that version of a shard is, and nothing else is.
pub(super) fn bytes(key: &BlockKey, version: Version, shard: Shard, bytes: usize) -> Vec<u8> {
    let key = key.as_bytes().as_chunks::<8>().0.iter().fold(0, |sum, word| mix(sum ^ u64::from_le_bytes(*word)));
    let seed = mix(key ^ mix(version.0) ^ (u64::from(shard.count) << 32 | u64::from(shard.index) << 16));
    let mut payload = vec![0; bytes.next_multiple_of(8)];
    for (word, number) in payload.as_chunks_mut::<8>().0.iter_mut().zip(1u64..) {
        *word = mix(seed.wrapping_add(number.wrapping_mul(GOLDEN))).to_le_bytes();
    }
    payload.truncate(bytes);
    for page in payload.chunks_mut(PAGE).filter(|page| page.len() >= 8) {
        let low = u64::from_le_bytes(page.first_chunk().copied().unwrap_or_default()) >> 24;
        page[..8].copy_from_slice(&(MARK << 48 | version.tenant() << 40 | low).to_le_bytes());
    }
    payload
}

/// Tenants whose marks are found in raw memory.
pub(super) fn tenants(memory: &[u8]) -> impl Iterator<Item = TenantId> {
    memory
        .chunks(PAGE)
        .filter_map(|page| page.first_chunk().map(|word| u64::from_le_bytes(*word)))
        .filter(|word| word >> 48 == MARK)
        .map(|word| TenantId((word >> 40 & 0xff) as u16))
}
