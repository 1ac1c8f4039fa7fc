//! How the store is, as the core tells it.

/// Everything the core counts, from its start on. One list, so that status page and metrics cannot differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each name is explained in NAMES, which the metrics page shows")]
pub struct Counters {
    pub lookups: u64,
    pub lookup_keys: u64,
    pub hit_blocks_host: u64,
    pub hit_blocks_disk: u64,
    pub miss_blocks: u64,
    pub put_blocks: u64,
    pub put_bytes: u64,
    pub put_present: u64,
    pub put_contended: u64,
    pub put_no_room: u64,
    pub put_over_quota: u64,
    pub promoted_bytes: u64,
    pub load_bytes: u64,
    pub load_failures: u64,
    pub sum_mismatches: u64,
    pub write_back_bytes: u64,
    pub write_back_failures: u64,
    pub write_backs_refused: u64,
    pub directory_bytes: u64,
    pub flushes: u64,
    pub flush_failures: u64,
    pub evicted_host: u64,
    pub evicted_disk: u64,
    pub lost_blocks: u64,
    pub deadlines_missed: u64,
    pub shed: u64,
    pub purged_blocks: u64,
    pub recovered_blocks: u64,
}

impl Counters {
    /// Each counter's name, meaning and value.
    pub fn all(&self) -> [(&'static str, &'static str, u64); 28] {
        [
            ("tender_lookups_total", "lookup requests", self.lookups),
            ("tender_lookup_keys_total", "keys looked up", self.lookup_keys),
            ("tender_hit_blocks_host_total", "blocks leased that were in host memory", self.hit_blocks_host),
            ("tender_hit_blocks_disk_total", "blocks leased that were loaded from disk", self.hit_blocks_disk),
            ("tender_miss_blocks_total", "runs of leases that ended at a block that was not there", self.miss_blocks),
            ("tender_put_blocks_total", "shards of blocks committed", self.put_blocks),
            ("tender_put_bytes_total", "bytes of slots committed", self.put_bytes),
            ("tender_put_present_total", "blocks offered that were there already", self.put_present),
            ("tender_put_contended_total", "blocks offered while somebody else wrote them", self.put_contended),
            ("tender_put_no_room_total", "blocks refused because no slot could be freed", self.put_no_room),
            ("tender_put_over_quota_total", "blocks refused by a tenant's quota", self.put_over_quota),
            (
                "tender_promoted_bytes_total",
                "bytes of slots written in place and copied to shared memory",
                self.promoted_bytes,
            ),
            ("tender_load_bytes_total", "bytes read from disk into host memory", self.load_bytes),
            ("tender_load_failures_total", "reads that the disk refused", self.load_failures),
            ("tender_sum_mismatches_total", "reads that did not hold what was written", self.sum_mismatches),
            ("tender_write_back_bytes_total", "bytes of slots written to disk", self.write_back_bytes),
            ("tender_write_back_failures_total", "writes that the disk refused", self.write_back_failures),
            ("tender_write_backs_refused_total", "blocks not admitted to disk", self.write_backs_refused),
            ("tender_directory_bytes_total", "bytes of directory pages written", self.directory_bytes),
            ("tender_flushes_total", "flushes for durability", self.flushes),
            ("tender_flush_failures_total", "flushes that failed", self.flush_failures),
            ("tender_evicted_host_total", "copies evicted from host memory", self.evicted_host),
            ("tender_evicted_disk_total", "copies evicted from disk", self.evicted_disk),
            ("tender_lost_blocks_total", "blocks whose last copy was evicted or lost", self.lost_blocks),
            ("tender_deadlines_missed_total", "requests answered at their deadline", self.deadlines_missed),
            ("tender_shed_total", "requests shed", self.shed),
            ("tender_purged_blocks_total", "blocks purged", self.purged_blocks),
            (
                "tender_recovered_blocks_total",
                "blocks found at start, on disk and in host memory",
                self.recovered_blocks,
            ),
        ]
    }
}

/// One tier.
#[derive(Clone, Debug)]
pub struct TierStatus {
    /// All of it.
    pub capacity_bytes: u64,
    /// Slots and segments.
    pub usage: Usage,
    /// Blocks with a copy here.
    pub blocks: u64,
    /// Slots that somebody reads.
    pub leased_slots: u64,
    /// Slots being filled.
    pub busy_slots: u64,
    /// Slot bytes, segments, slots, used slots.
    pub classes: Vec<(u64, u32, u64, u64)>,
}

/// What a tenant uses.
#[derive(Clone, Debug)]
pub struct TenantStatus {
    /// Name.
    pub name: String,
    /// Used and allowed bytes of host memory.
    pub host: (u64, Option<u64>),
    /// Used and allowed bytes of disk.
    pub disk: (u64, Option<u64>),
    /// Blocks in any tier.
    pub blocks: u64,
}

/// How the store is.
#[derive(Clone, Debug)]
pub struct CoreStatus {
    /// Host memory.
    pub host: TierStatus,
    /// Disk, with its health.
    pub disk: Option<(TierStatus, Health)>,
    /// Tenants, in the order of the configuration.
    pub tenants: Vec<TenantStatus>,
    /// Everything counted.
    pub counters: Counters,
    /// Segments that clients write to: what is there, and what is in use.
    pub ingest: Usage,
    /// Attachments in use.
    pub attachments: u64,
}

/// What a tier holds, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of used slots.
    pub used_bytes: u64,
    /// All slots of owned segments.
    pub slots: u64,
    /// Used slots.
    pub used_slots: u64,
    /// Bytes of segments that are prepared.
    pub ready_bytes: u64,
}

/// Whether the disk can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Good,
    /// It failed that often in a row.
    Degraded(u32),
    /// It is left alone until then, in milliseconds of the core's clock.
    Disabled(u64),
}

impl Health {
    /// Its files are not there yet: nothing is asked of it.
    pub const AWAITED: Self = Self::Disabled(u64::MAX);
}
