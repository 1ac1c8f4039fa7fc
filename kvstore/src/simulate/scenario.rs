//! What a seed makes of it: tenants, namespaces of several sizes with chains that share prefixes, tiers far too small for them, and
//! how often what goes wrong.

use std::fmt;

use tender_proto::{BlockKey, BlockLayout, Namespace, TenantSalt};

use super::random::Random;
use crate::device::block::simulated::Faults;
use crate::names::TenantId;
use crate::pipeline::{CoreConfig, DiskConfig, TenantConfig};

/// Requests that a file takes at once.
const DEPTH: usize = 8;

/// A namespace, and the blocks that will ever be asked for in it.
#[derive(Clone, Debug)]
pub(super) struct Space {
    pub(super) tenants: Vec<TenantId>,
    pub(super) namespace: Namespace,
    pub(super) layout: BlockLayout,
    pub(super) root: BlockKey,
    pub(super) keys: Vec<BlockKey>,
    /// Chains as indices of `keys`.
    pub(super) chains: Vec<Vec<usize>>,
}

/// A world before its first step.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) seed: u64,
    pub(super) core: CoreConfig,
    pub(super) spaces: Vec<Space>,
    pub(super) faults: Faults,
    /// Disks may lose or misplace writes, so what was durable or purged need not stay so.
    pub(super) lossy: bool,
    /// Crashes in a million operations.
    pub(super) crashes: u64,
    /// Restarts of the worker alone in a million operations.
    pub(super) warm_restarts: u64,
    pub(super) group_count: usize,
    /// Longest time between two operations.
    pub(super) pause_us: u64,
}

impl Scenario {
    pub(super) fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed, 1);
        let tenant_count = random.between(2, 3);
        let host_segment_bytes = random.pick(&[128 << 10, 192 << 10, 256 << 10]);
        let host_segment_count = random.between(4, 8) as u32;
        let ingest_segment_count = random.between(1, 6) as u32;
        let host_bytes = host_segment_bytes * u64::from(host_segment_count);
        let disk = (!random.happens(50)).then(|| DiskConfig {
            segment_bytes: random.pick(&[128 << 10, 256 << 10]),
            segment_count: random.between(8, 32) as u32,
            file_count: random.between(1, 3) as u32,
            depth: random.pick(&[1, 2, DEPTH, DEPTH, 32]),
            page_key: [seed as u8; 32],
        });
        let disk_bytes = disk.as_ref().map_or(0, |disk| disk.segment_bytes * u64::from(disk.segment_count));
        let tenants = (0..tenant_count).map(|id| {
            let name = format!("tenant-{id}");
            let mut quota = |bytes: u64| random.happens(250).then(|| bytes * random.between(1, 3) / 4);
            let (host_quota_bytes, disk_quota_bytes) = (quota(host_bytes), quota(disk_bytes));
            TenantConfig { salt: TenantSalt::of_tenant(b"simulation", &name), name, host_quota_bytes, disk_quota_bytes }
        });
        let tenants: Vec<TenantConfig> = tenants.collect();
        let spaces = spaces(random, &tenants);
        let (faults, lossy) = faults(random);
        let write_bytes_per_day = random.happens(150).then(|| 24 * random.between(64, 100_000) * 4096);
        let core = CoreConfig {
            tenants,
            host_segment_bytes,
            host_segment_count,
            ingest_segment_count,
            disk,
            write_bytes_per_day,
            allow_public: true,
            seed,
        };
        let crashes = random.pick(&[0, 300, 1_000, 4_000]);
        let pause_us = random.pick(&[100, 400, 2_000]);
        let group_count = random.between(6, 12) as usize;
        let warm_restarts = random.pick(&[0, 1_000, 5_000, 20_000]);
        Self { seed, core, spaces, faults, lossy, crashes, warm_restarts, group_count, pause_us }
    }
}

/// In one line, for whoever reads of a failure.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CoreConfig { tenants, host_segment_bytes, host_segment_count, disk, .. } = &self.core;
        write!(f, "{} tenants, host {host_segment_count} x {host_segment_bytes}, ", tenants.len())?;
        match disk {
            Some(DiskConfig { segment_bytes, segment_count, file_count, depth, .. }) => {
                write!(f, "disk {segment_count} x {segment_bytes} in {file_count} files of depth {depth}, ")?;
            }
            None => write!(f, "no disk, ")?,
        }
        write!(f, "{} crashes and {} warm restarts per million, {:?}", self.crashes, self.warm_restarts, self.faults)
    }
}

fn spaces(random: &mut Random, tenants: &[TenantConfig]) -> Vec<Space> {
    /// One page, less and more than one, many shards' worth, more than one fragment.
    const BLOCK_BYTES: [u64; 6] = [4096, 8192, 6000, 24_576, 70_000, 100_000];
    let mut spaces = Vec::new();
    let all: Vec<TenantId> = (0..tenants.len() as u16).map(TenantId).collect();
    let owners = all.iter().map(|&tenant| vec![tenant]).cycle().take(2 * all.len()).chain([all.clone()]);
    for (number, owners) in owners.enumerate() {
        let mut namespace = Namespace::text(&format!("model-{number}"), "bf16", 4);
        namespace.public = owners.len() > 1;
        let root = namespace.root(&tenants[owners[0].0 as usize].salt);
        let layout = BlockLayout::opaque(random.pick(&BLOCK_BYTES));
        let (keys, chains) = chains(random, root);
        spaces.push(Space { tenants: owners, namespace, layout, root, keys, chains });
    }
    spaces
}

/// A tree: each chain follows an earlier one for a while.
fn chains(random: &mut Random, root: BlockKey) -> (Vec<BlockKey>, Vec<Vec<usize>>) {
    let mut keys: Vec<BlockKey> = Vec::new();
    let mut chains: Vec<Vec<usize>> = Vec::new();
    for _ in 0..random.between(4, 16) {
        let shared = match chains.len() {
            0 => Vec::new(),
            count => {
                let other = &chains[random.index(count)];
                other[..random.index(other.len() + 1)].to_vec()
            }
        };
        let mut chain = shared;
        for _ in 0..random.between(1, 12) {
            let parent = chain.last().map_or(root, |&last| keys[last]);
            chain.push(keys.len());
            keys.push(parent.child(&[random.next() as u32; 4], &[]));
        }
        chains.push(chain);
    }
    (keys, chains)
}

/// A third of the disks are sound, a third fail openly, a third lie.
fn faults(random: &mut Random) -> (Faults, bool) {
    let mut faults = Faults { latency_us_max: random.pick(&[200, 2_000, 10_000]), ..Faults::default() };
    let kind = random.below(3);
    let mut rate = |per_mille: u64| random.below(per_mille + 1) as u32;
    if kind > 0 {
        faults.read_error_per_mille = rate(20);
        faults.write_error_per_mille = rate(20);
        faults.flush_error_per_mille = rate(100);
        faults.short_per_mille = rate(10);
        faults.bit_flip_per_mille = rate(20);
        faults.stall_per_mille = rate(20);
    }
    if kind > 1 {
        faults.lost_write_per_mille = rate(10);
        faults.misplaced_write_per_mille = rate(10);
    }
    (faults, faults.lost_write_per_mille + faults.misplaced_write_per_mille > 0)
}
