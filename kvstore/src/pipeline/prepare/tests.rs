//! Who gets which segment of host memory, and when; and who waits for room in it.

use std::collections::VecDeque;

use tender_proto::{BlockKey, BlockLayout, Namespace, Shard, TenantSalt, sum};

use super::*;
use crate::names::{AttachmentId, Door, Hold, RequestId};
use crate::pipeline::{CoreConfig, DiskConfig, Event, TenantConfig};
use crate::transfer::{Outcome, Transfer, TransferId};
use crate::verb::{AttachVerb, Filled, Reply, Request, ReserveOutcome, Verb};

const BLOCK_BYTES: u64 = 16 << 10;
const BLOCKS_PER_SEGMENT: u64 = 4;
const WAIT_MS: u64 = 5_000;

/// A core, and what it asked for.
struct Site {
    core: Core,
    now_ms: u64,
    requests: u64,
    roots: Vec<BlockKey>,
    replies: BTreeMap<RequestId, Reply>,
    /// Segments that it wants to have prepared: for whom, and whether they were used.
    asked: VecDeque<(u32, TenantId, bool)>,
    /// What its disk is to do.
    started: VecDeque<(TransferId, Transfer)>,
}

impl Site {
    /// So many segments, with a quota for each tenant, and no disk. Nothing is prepared yet.
    fn new(segment_count: u32, quotas: &[Option<u64>]) -> Self {
        Self::over(None, segment_count, quotas)
    }

    fn over(disk: Option<DiskConfig>, segment_count: u32, quotas: &[Option<u64>]) -> Self {
        let tenant = |(quota, name): (&Option<u64>, u32)| {
            let name = name.to_string();
            let salt = TenantSalt::of_tenant(b"", &name);
            TenantConfig { name, salt, host_quota_bytes: *quota, disk_quota_bytes: None }
        };
        let tenants: Vec<TenantConfig> = quotas.iter().zip(0..).map(tenant).collect();
        let salts: Vec<TenantSalt> = tenants.iter().map(|tenant| tenant.salt).collect();
        let mut core = Core::new(CoreConfig {
            tenants,
            host_segment_bytes: BLOCKS_PER_SEGMENT * BLOCK_BYTES,
            host_segment_count: segment_count,
            ingest_segment_count: 0,
            disk,
            write_bytes_per_day: None,
            allow_public: false,
            seed: 1,
        });
        // The files are new.
        assert!(core.recover(Vec::new()).is_empty());
        let namespace = Namespace::text("model", "bf16", 16);
        let roots = salts.iter().map(|salt| namespace.root(salt)).collect();
        let (replies, asked, started) = Default::default();
        let mut site = Self { core, now_ms: 0, requests: 0, roots, replies, asked, started };
        for id in 0..quotas.len() as u16 {
            let attach = AttachVerb {
                attachment: AttachmentId(id.into()),
                group: "group".to_owned(),
                member: String::new(),
                namespace: namespace.clone(),
                layout: BlockLayout::opaque(BLOCK_BYTES),
                expected_root: None,
            };
            let id = site.ask(TenantId(id), Verb::Attach(Box::new(attach)));
            assert!(matches!(site.replies.remove(&id), Some(Reply::Attached(_))));
        }
        site
    }

    /// The same with all segments prepared.
    fn prepared(segment_count: u32, quotas: &[Option<u64>]) -> Self {
        let mut site = Self::new(segment_count, quotas);
        (0..segment_count).for_each(|_| _ = site.prepare());
        assert_eq!(site.asked, []);
        site
    }

    fn step(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.step(event, self.now_ms, &mut actions);
        for action in actions {
            match action {
                Action::Reply(id, reply) => _ = self.replies.insert(id, reply),
                Action::PrepareSegment { segment, tenant, used } => self.asked.push_back((segment, tenant, used)),
                Action::Start(_, id, transfer) => self.started.push_back((id, transfer)),
                _ => {}
            }
        }
        assert!(self.asked.len() <= 1, "one at a time");
        self.core.check();
    }

    fn ask(&mut self, tenant: TenantId, verb: Verb) -> RequestId {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.step(Event::Request(Request { id, tenant, deadline_ms: self.now_ms + WAIT_MS, verb }));
        id
    }

    /// Prepares the segment that is to be.
    fn prepare(&mut self) -> (u32, TenantId, bool) {
        let (segment, tenant, used) = self.asked.pop_front().expect("one is to be prepared");
        self.step(Event::SegmentReady(segment));
        (segment, tenant, used)
    }

    fn pass(&mut self, time_ms: u64) {
        self.now_ms += time_ms;
        self.step(Event::Tick);
    }

    /// Reserves the block of that number.
    fn reserve(&mut self, tenant: u16, number: u32) -> RequestId {
        let verb = Verb::Reserve {
            attachment: AttachmentId(tenant.into()),
            parent: self.roots[usize::from(tenant)],
            keys: vec![self.key(tenant, number)],
            shard: Shard::WHOLE,
            bytes_max: u64::MAX,
            door: Door::Stream,
        };
        self.ask(TenantId(tenant), verb)
    }

    /// How a reservation ended; `None` while it waits.
    fn outcome(&mut self, id: RequestId) -> Option<ReserveOutcome> {
        let Reply::Reserved(outcomes) = self.replies.remove(&id)? else { panic!("a reservation is answered") };
        Some(outcomes[0])
    }

    /// Reserves, with all the preparing that it takes; and commits. Whether there was room.
    fn put(&mut self, tenant: u16, number: u32) -> bool {
        let id = self.reserve(tenant, number);
        let outcome = loop {
            match self.outcome(id) {
                Some(outcome) => break outcome,
                None if self.asked.is_empty() => self.pass(10),
                None => _ = self.prepare(),
            }
        };
        let ReserveOutcome::Granted { hold, .. } = outcome else { return false };
        let sums = vec![0; sum::fragment_count(BLOCK_BYTES as usize)];
        let (attachment, filled) = (AttachmentId(tenant.into()), vec![Filled { hold, sums }]);
        self.ask(TenantId(tenant), Verb::Commit { attachment, filled, door: Door::Stream });
        true
    }

    fn key(&self, tenant: u16, number: u32) -> BlockKey {
        self.roots[usize::from(tenant)].child(&[number; 16], &[])
    }

    /// Asks for the block of that number.
    fn acquire(&mut self, tenant: u16, number: u32) -> RequestId {
        let (attachment, keys) = (AttachmentId(tenant.into()), vec![self.key(tenant, number)]);
        self.ask(TenantId(tenant), Verb::Acquire { attachment, keys, bytes_max: u64::MAX, door: Door::Stream })
    }

    /// Blocks that an acquire brought; `None` while it waits.
    fn acquired(&mut self, id: RequestId) -> Option<usize> {
        let Reply::Acquired(acquired) = self.replies.remove(&id)? else { panic!("an acquire is answered") };
        Some(acquired.blocks.len())
    }

    /// Has the disk do all of this kind that it was asked for.
    fn disk_does(&mut self, is_wanted: impl Fn(&Transfer) -> bool) {
        let sums = vec![0; sum::fragment_count(BLOCK_BYTES as usize)];
        while let Some(at) = self.started.iter().position(|(_, transfer)| is_wanted(transfer)) {
            let (id, _) = self.started.remove(at).expect("it was found there");
            self.step(Event::TransferDone(id, Outcome::Done(sums.clone())));
        }
    }

    fn hold(&mut self, id: RequestId) -> Hold {
        match self.outcome(id) {
            Some(ReserveOutcome::Granted { hold, .. }) => hold,
            other => panic!("no room: {other:?}"),
        }
    }

    fn used_bytes(&self) -> Vec<u64> {
        self.core.status().tenants.iter().map(|tenant| tenant.host.0).collect()
    }
}

#[test]
fn segments_are_dealt_out_in_turn_and_what_somebody_waits_for_comes_first() {
    let mut site = Site::new(6, &[None; 3]);
    let id = site.reserve(2, 0);
    assert_eq!(site.outcome(id), None, "it waits");
    assert_eq!(site.prepare(), (0, TenantId(0), false));
    assert_eq!(site.prepare(), (2, TenantId(2), false));
    assert!(matches!(site.outcome(id), Some(ReserveOutcome::Granted { .. })));
    let rest = [(1, 1), (3, 0), (4, 1), (5, 2)];
    assert_eq!(rest.map(|_| site.prepare()), rest.map(|(segment, tenant)| (segment, TenantId(tenant), false)));
    assert_eq!(site.asked, []);
}

#[test]
fn a_tenant_alone_comes_to_all_of_memory_before_it_evicts() {
    for mut site in [Site::new(6, &[None; 3]), Site::prepared(6, &[None; 3])] {
        let count = 6 * BLOCKS_PER_SEGMENT;
        for number in 0..count as u32 {
            assert!(site.put(1, number), "block {number}");
        }
        assert_eq!((site.used_bytes(), site.core.counters().evicted_host), (vec![0, count * BLOCK_BYTES, 0], 0));
        assert!(site.put(1, count as u32), "from then on it evicts");
        assert_eq!(site.core.counters().evicted_host, 1);
    }
}

#[test]
fn a_tenant_that_finds_nothing_free_gets_a_segment_that_was_prepared_for_it() {
    let mut site = Site::prepared(2, &[None; 2]);
    for number in 0..8 {
        assert!(site.put(0, number));
    }
    site.pass(1_000);
    let id = site.reserve(1, 0);
    assert_eq!(site.outcome(id), None, "it waits");
    while site.asked.is_empty() {
        site.pass(10);
    }
    let (_, tenant, used) = site.prepare();
    assert_eq!((tenant, used), (TenantId(1), true));
    assert!(matches!(site.outcome(id), Some(ReserveOutcome::Granted { .. })));
    assert_eq!(site.used_bytes(), [4 * BLOCK_BYTES, BLOCK_BYTES]);
}

#[test]
fn what_was_prepared_for_a_tenant_is_not_taken_from_it_at_once() {
    let mut site = Site::prepared(3, &[None; 3]);
    // Blocks that are being written cannot go.
    let fill = |site: &mut Site, tenant| (0..4).map(|number| site.reserve(tenant, number)).last();
    let (ones, others) = (fill(&mut site, 0), fill(&mut site, 1));
    for id in [ones, others] {
        site.hold(id.expect("four"));
    }
    let id = site.reserve(0, 4);
    assert_eq!((site.outcome(id), &site.asked), (None, &VecDeque::from([(2, TenantId(0), false)])));
    // Its deadline comes first.
    site.pass(WAIT_MS + 10);
    assert_eq!(site.outcome(id), Some(ReserveOutcome::NoRoom));
    site.prepare();
    let id = site.reserve(1, 4);
    assert_eq!((site.outcome(id), site.asked.len()), (Some(ReserveOutcome::NoRoom), 0));
    site.pass(KEPT_MS);
    let id = site.reserve(1, 4);
    assert_eq!(site.prepare(), (2, TenantId(1), false));
    site.hold(id);
}

#[test]
fn two_tenants_do_not_take_the_last_segment_from_each_other_in_turns() {
    let mut site = Site::prepared(3, &[None; 3]);
    for (tenant, number) in [0, 1].into_iter().flat_map(|tenant| (0..4).map(move |number| (tenant, number))) {
        let id = site.reserve(tenant, number);
        site.hold(id);
    }
    let ids = [0, 1].map(|tenant| site.reserve(tenant, 4));
    let mut prepared = 0;
    while !site.asked.is_empty() {
        site.prepare();
        prepared += 1;
    }
    assert_eq!(prepared, 1);
    site.hold(ids[0]);
    assert_eq!(site.outcome(ids[1]), Some(ReserveOutcome::NoRoom));
}

#[test]
fn a_tenant_at_its_quota_takes_no_segment_from_others() {
    let mut site = Site::prepared(2, &[Some(4 * BLOCK_BYTES), None]);
    for number in 0..20 {
        assert!(site.put(0, number), "block {number}");
    }
    assert_eq!((site.used_bytes(), site.core.counters().evicted_host), (vec![4 * BLOCK_BYTES, 0], 16));
    assert_eq!([0, 1].map(|tenant| site.core.host.tier.slab.free_count(TenantId(tenant))), [0, 1]);
}

#[test]
fn the_next_segment_comes_before_it_is_waited_for_while_others_have_one_left() {
    let mut site = Site::prepared(4, &[None; 2]);
    for number in 0..5 {
        assert!(site.put(0, number));
    }
    assert_eq!(site.prepare(), (3, TenantId(0), false));
    for number in 5..9 {
        assert!(site.put(0, number));
    }
    assert_eq!(site.asked, [], "the other's last one is left to it");
    assert_eq!(site.core.host.tier.slab.free_count(TenantId(1)), 1);
}

impl Site {
    /// One segment, and a disk. The blocks 0 and 1 are on disk alone; of the four in memory two are leased, and the others, 4 and 5, are
    /// being written.
    fn crowded() -> Self {
        let disk = DiskConfig {
            segment_bytes: BLOCKS_PER_SEGMENT * BLOCK_BYTES,
            segment_count: 4,
            file_count: 1,
            depth: 8,
            page_key: [0; 32],
        };
        let mut site = Self::over(Some(disk), 1, &[None]);
        site.prepare();
        for number in [0, 1] {
            assert!(site.put(0, number));
            site.write(number);
            site.disk_does(|_| true);
        }
        for number in 2..6 {
            assert!(site.put(0, number));
        }
        // What it wrote unasked.
        site.disk_does(|_| true);
        for number in [2, 3] {
            let id = site.acquire(0, number);
            assert_eq!(site.acquired(id), Some(1));
        }
        site.write(4);
        site.write(5);
        assert_eq!(site.core.counters().evicted_host, 2);
        site
    }

    /// Has the block of that number written, sooner or later.
    fn write(&mut self, number: u32) {
        let durable = Verb::Durable(AttachmentId(0), vec![self.key(0, number)]);
        self.ask(TenantId(0), durable);
    }

    fn write_ends(&mut self) {
        let writes = |(_, transfer): &(TransferId, Transfer)| matches!(transfer, Transfer::WriteBack { .. });
        let at = self.started.iter().position(writes).expect("one is under way");
        let (id, _) = self.started.remove(at).expect("it was found there");
        self.step(Event::TransferDone(id, Outcome::Done(Vec::new())));
    }

    fn loads_end(&mut self) {
        self.disk_does(|transfer| matches!(transfer, Transfer::Load { .. }));
    }
}

#[test]
fn a_get_waits_until_its_deadline_while_what_holds_the_room_is_being_written() {
    for is_written in [true, false] {
        let mut site = Site::crowded();
        let id = site.acquire(0, 0);
        (0..(WAIT_MS - 10) / 10).for_each(|_| site.pass(10));
        assert_eq!(site.acquired(id), None, "it waits");
        if is_written {
            site.write_ends();
            site.loads_end();
            assert_eq!(site.acquired(id), Some(1));
        } else {
            site.pass(20);
            assert_eq!(site.acquired(id), Some(0));
        }
    }
}

#[test]
fn gets_that_wait_for_room_come_in_their_order() {
    let mut site = Site::crowded();
    let (first, second) = (site.acquire(0, 0), site.acquire(0, 1));
    site.write_ends();
    site.loads_end();
    assert_eq!((site.acquired(first), site.acquired(second)), (Some(1), None));
    site.write_ends();
    site.loads_end();
    assert_eq!(site.acquired(second), Some(1));
}
