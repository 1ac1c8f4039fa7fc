//! Who may write in place, and how much of what there is.

use tender_proto::{BlockKey, BlockLayout, Namespace, Shard, TenantSalt, sum};

use super::*;
use crate::pipeline::{CoreConfig, Event, TenantConfig};
use crate::transfer::TransferId;
use crate::verb::{AttachVerb, CommitOutcome, Filled, RefusalKind, Reply, Request, ReserveOutcome, Verb};

const SEGMENT_BYTES: u64 = 4 << 20;
const SMALL: u64 = 16 << 10;
const LARGE: u64 = 1 << 20;

/// A core without a disk, whose clients map at once what is made for them.
struct Site {
    core: Core,
    now_ms: u64,
    requests: u64,
    attachments: u64,
    replies: BTreeMap<RequestId, Reply>,
    /// Copies to shared memory that were begun.
    promotions: Vec<TransferId>,
}

/// A process under a namespace.
#[derive(Clone, Copy)]
struct Process {
    tenant: TenantId,
    id: AttachmentId,
    root: BlockKey,
}

impl Site {
    fn new(tenant_count: u32, ingest_segment_count: u32) -> Self {
        let tenant = |number: u32| {
            let name = number.to_string();
            let salt = TenantSalt::of_tenant(b"", &name);
            TenantConfig { name, salt, host_quota_bytes: None, disk_quota_bytes: None }
        };
        let core = Core::new(CoreConfig {
            tenants: (0..tenant_count).map(tenant).collect(),
            host_segment_bytes: SEGMENT_BYTES,
            host_segment_count: 4,
            ingest_segment_count,
            disk: None,
            write_bytes_per_day: None,
            allow_public: false,
            seed: 1,
        });
        let mut site =
            Self { core, now_ms: 0, requests: 0, attachments: 0, replies: BTreeMap::new(), promotions: Vec::new() };
        site.step(Event::Tick);
        site
    }

    fn step(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.step(event, self.now_ms, &mut actions);
        for action in actions {
            match action {
                Action::Reply(id, reply) => _ = self.replies.insert(id, reply),
                Action::PrepareSegment { segment, .. } => self.step(Event::SegmentReady(segment)),
                Action::MakeIngest { segment, .. } => self.step(Event::IngestMade { segment, made: true }),
                Action::Promote { id, .. } => self.promotions.push(id),
                _ => {}
            }
        }
        self.core.check();
    }

    fn ask(&mut self, tenant: TenantId, verb: Verb) -> Option<Reply> {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.step(Event::Request(Request { id, tenant, deadline_ms: self.now_ms, verb }));
        self.replies.remove(&id)
    }

    fn attach(&mut self, tenant: u16, group: &str, adapter: &str, block_bytes: u64) -> Process {
        self.attachments += 1;
        let (tenant, attachment) = (TenantId(tenant), AttachmentId(self.attachments));
        let mut namespace = Namespace::text("model", "bf16", 16);
        namespace.adapter = adapter.to_owned();
        let attach = AttachVerb {
            attachment,
            group: group.to_owned(),
            member: String::new(),
            namespace,
            layout: BlockLayout::opaque(block_bytes),
            expected_root: None,
        };
        let reply = self.ask(tenant, Verb::Attach(Box::new(attach)));
        let Some(Reply::Attached(attached)) = reply else { panic!("not attached: {reply:?}") };
        Process { tenant, id: attachment, root: attached.root }
    }

    fn join(&mut self, process: Process, former: Option<Process>) -> Reply {
        let former = former.map(|former| former.id);
        self.ask(process.tenant, Verb::Join { attachment: process.id, former }).expect("answered at once")
    }

    /// A process of a group of its own that writes in place.
    fn local(&mut self, tenant: u16) -> Process {
        let process = self.attach(tenant, &format!("group-{}", self.attachments), "", SMALL);
        assert!(matches!(self.join(process, None), Reply::Joined { .. }));
        process
    }

    /// The key of the next block that is reserved.
    fn next_key(&self, root: BlockKey) -> BlockKey {
        root.child(&[self.requests as u32; 16], &[])
    }

    /// A block that nobody has reserved yet.
    fn reserve(&mut self, Process { tenant, id, root }: Process, door: Door) -> ReserveOutcome {
        let keys = vec![self.next_key(root)];
        let (shard, bytes_max) = (Shard::WHOLE, u64::MAX);
        let verb = Verb::Reserve { attachment: id, parent: root, keys, shard, bytes_max, door };
        match self.ask(tenant, verb) {
            Some(Reply::Reserved(outcomes)) => outcomes[0],
            reply => panic!("no reservation: {reply:?}"),
        }
    }

    fn commit(&mut self, process: Process, hold: Hold, block_bytes: u64, door: Door) -> CommitOutcome {
        let filled = vec![Filled { hold, sums: vec![0; sum::fragment_count(block_bytes as usize)] }];
        match self.ask(process.tenant, Verb::Commit { attachment: process.id, filled, door }) {
            Some(Reply::Committed(outcomes)) => outcomes[0],
            reply => panic!("not committed: {reply:?}"),
        }
    }

    /// Reserves in place, asking again as a client does.
    fn write(&mut self, process: Process) -> Option<Hold> {
        for _ in 0..20 {
            if let ReserveOutcome::Granted { hold, .. } = self.reserve(process, Door::Ring) {
                return Some(hold);
            }
            self.pass(20);
        }
        None
    }

    /// Has all that is being copied come to shared memory.
    fn promote(&mut self) {
        while let Some(id) = self.promotions.pop() {
            let sums = vec![0; sum::fragment_count(SMALL as usize)];
            self.step(Event::TransferDone(id, Outcome::Done(sums)));
        }
    }

    fn pass(&mut self, time_ms: u64) {
        self.now_ms += time_ms;
        self.step(Event::Tick);
    }
}

#[test]
fn a_block_is_committed_under_its_own_namespace_alone() {
    let mut site = Site::new(1, 2);
    let small = site.attach(0, "engine", "", SMALL);
    let large = site.attach(0, "engine", "adapter", LARGE);
    let ReserveOutcome::Granted { hold, .. } = site.reserve(small, Door::Stream) else { panic!("there is room") };
    assert_eq!(site.commit(large, hold, LARGE, Door::Stream), CommitOutcome::Gone);
    let ReserveOutcome::Granted { hold, .. } = site.reserve(small, Door::Stream) else { panic!("it was ended") };
    assert_eq!(site.commit(small, hold, SMALL, Door::Stream), CommitOutcome::Stored);
}

#[test]
fn a_process_comes_back_to_its_place_when_all_places_are_taken() {
    let mut site = Site::new(64, 2);
    let places: Vec<Process> = (0..limits::LOCALS_MAX / 64).map(|_| site.local(0)).collect();
    let one_more = site.attach(0, "group-0", "", SMALL);
    assert!(matches!(site.join(one_more, None), Reply::Refused(refusal) if refusal.kind == RefusalKind::Busy));
    assert!(matches!(site.join(one_more, Some(places[0])), Reply::Joined { .. }));
}

#[test]
fn a_tenant_that_comes_late_gets_its_part_of_the_memory_to_write_to() {
    let mut site = Site::new(2, 4);
    let many: Vec<Process> = (0..6).map(|_| site.local(0)).collect();
    let mut writing: Vec<(Process, Hold)> =
        many.iter().filter_map(|&process| Some((process, site.write(process)?))).collect();
    assert_eq!(writing.len(), 4, "each of them has a segment");
    let late = site.local(1);
    // The first keeps what it has, and may hold up nobody for long; the others end one block when they have begun the next.
    for _ in 0..20 {
        if site.write(late).is_some() {
            return;
        }
        for (process, hold) in &mut writing[1..] {
            if let ReserveOutcome::Granted { hold: next, .. } = site.reserve(*process, Door::Ring) {
                site.ask(process.tenant, Verb::Abort(By::Daemon, vec![*hold]));
                *hold = next;
            } else {
                // Its segment takes no more: it goes when it has come to the end of what it has there.
                site.ask(process.tenant, Verb::Abort(By::Daemon, vec![*hold]));
            }
        }
    }
    panic!("a tenant was left without memory to write to");
}

#[test]
fn memory_that_was_made_for_who_did_not_wait_for_it_is_given_to_others() {
    let mut site = Site::new(1, 1);
    let (hasty, other) = (site.local(0), site.local(0));
    assert_eq!(site.reserve(hasty, Door::Ring), ReserveOutcome::NoRoom);
    assert!(site.write(other).is_some(), "it lies ready for nobody");
}

#[test]
fn what_a_stream_holds_only_that_stream_ends() {
    let mut site = Site::new(1, 2);
    let local = site.local(0);
    let group = site.core.attachments.group(local.id).expect("it is attached");
    let key = site.next_key(local.root);
    let ReserveOutcome::Granted { hold, .. } = site.reserve(local, Door::Stream) else { panic!("there is room") };
    site.ask(local.tenant, Verb::Abort(By::Group(group, Door::Ring), vec![hold]));
    assert_eq!(site.commit(local, hold, SMALL, Door::Ring), CommitOutcome::Gone, "the ring holds nothing");
    assert_eq!(site.commit(local, hold, SMALL, Door::Stream), CommitOutcome::Stored);
    let acquire = Verb::Acquire { attachment: local.id, keys: vec![key], bytes_max: u64::MAX, door: Door::Stream };
    let Some(Reply::Acquired(acquired)) = site.ask(local.tenant, acquire) else { panic!("it is there") };
    let lease = acquired.blocks[0].parts[0].hold;
    site.ask(local.tenant, Verb::Release(By::Group(group, Door::Ring), vec![lease]));
    assert_eq!(site.core.holder(lease).map(|holder| holder.door), Some(Door::Stream), "it is still being sent");
}

#[test]
fn what_a_stream_holds_outlives_what_a_process_that_comes_again_confirms() {
    let mut site = Site::new(1, 2);
    let former = site.attach(0, "engine", "", SMALL);
    assert!(matches!(site.join(former, None), Reply::Joined { .. }));
    let ReserveOutcome::Granted { hold, .. } = site.reserve(former, Door::Stream) else { panic!("there is room") };
    let again = site.attach(0, "engine", "", SMALL);
    assert!(matches!(site.join(again, Some(former)), Reply::Joined { .. }));
    let confirmed = site.ask(again.tenant, Verb::Confirm(again.id, Vec::new()));
    assert!(matches!(confirmed, Some(Reply::Confirmed(holds)) if holds.is_empty()));
    assert_eq!(site.commit(again, hold, SMALL, Door::Stream), CommitOutcome::Stored);
}

#[test]
fn a_get_of_what_must_come_to_shared_memory_first_leases_all_of_its_window() {
    let mut site = Site::new(1, 1);
    let local = site.local(0);
    let keys = (0..6).map(|_| {
        let hold = site.write(local).expect("there is room");
        let key = local.root.child(&[site.requests as u32 - 1; 16], &[]);
        assert_eq!(site.commit(local, hold, SMALL, Door::Ring), CommitOutcome::Stored);
        key
    });
    let keys = keys.collect();
    site.requests += 1;
    let (id, deadline_ms) = (RequestId(site.requests), site.now_ms + 1_000);
    let verb = Verb::Acquire { attachment: local.id, keys, bytes_max: 4 * SMALL, door: Door::Stream };
    site.step(Event::Request(Request { id, tenant: local.tenant, deadline_ms, verb }));
    site.promote();
    let Some(Reply::Acquired(acquired)) = site.replies.remove(&id) else { panic!("all is there") };
    assert_eq!((acquired.blocks.len(), acquired.end), (4, None));
}

#[test]
fn a_segment_that_was_to_go_to_another_client_stays_when_nobody_asks_for_it_any_more() {
    let mut site = Site::new(1, 2);
    let first = site.attach(0, "first", "adapter", LARGE);
    assert!(matches!(site.join(first, None), Reply::Joined { .. }));
    // More than one segment holds.
    for _ in 0..=SEGMENT_BYTES / LARGE {
        assert!(site.write(first).is_some(), "it is alone");
    }
    let second = site.local(0);
    assert_eq!(site.reserve(second, Door::Ring), ReserveOutcome::NoRoom);
    assert_eq!(site.reserve(first, Door::Ring), ReserveOutcome::NoRoom, "one of its segments is to be emptied");
    site.pass(STUCK_MS);
    assert!(matches!(site.reserve(first, Door::Ring), ReserveOutcome::Granted { .. }), "it does not come to be empty");
}

#[test]
fn a_tenant_has_its_part_of_the_holds_and_others_have_theirs() {
    let mut site = Site::new(64, 1);
    let process = site.attach(0, "engine", "", SMALL);
    let key = site.next_key(process.root);
    let ReserveOutcome::Granted { hold, .. } = site.reserve(process, Door::Stream) else { panic!("there is room") };
    assert_eq!(site.commit(process, hold, SMALL, Door::Stream), CommitOutcome::Stored);
    let part = limits::GRANTS_MAX / 64;
    let (keys, bytes_max) = (vec![key; part], u64::MAX);
    let verb = Verb::Acquire { attachment: process.id, keys, bytes_max, door: Door::Stream };
    let Some(Reply::Acquired(acquired)) = site.ask(process.tenant, verb) else { panic!("it is there") };
    assert_eq!((part, acquired.blocks.len()), (16_384, part));
    assert_eq!(site.reserve(process, Door::Stream), ReserveOutcome::NoRoom);
    let other = site.attach(1, "engine", "", SMALL);
    assert!(matches!(site.reserve(other, Door::Stream), ReserveOutcome::Granted { .. }));
    site.ask(process.tenant, Verb::Release(By::Daemon, vec![acquired.blocks[0].parts[0].hold]));
    assert!(matches!(site.reserve(process, Door::Stream), ReserveOutcome::Granted { .. }));
}

#[test]
fn a_block_whose_shards_came_by_both_doors_comes_to_shared_memory_when_it_holds_a_part_of_its_room() {
    let mut site = Site::new(1, 1);
    // Three of four segments hold one block each; the last one holds two shards of the other size.
    let whole = site.attach(0, "whole", "adapter", SEGMENT_BYTES);
    for _ in 0..3 {
        let ReserveOutcome::Granted { hold, .. } = site.reserve(whole, Door::Stream) else { panic!("there is room") };
        assert_eq!(site.commit(whole, hold, SEGMENT_BYTES, Door::Stream), CommitOutcome::Stored);
    }
    let local = site.attach(0, "halves", "", SEGMENT_BYTES);
    assert!(matches!(site.join(local, None), Reply::Joined { .. }));
    let keys = vec![site.next_key(local.root)];
    for (index, door) in [(0, Door::Stream), (1, Door::Ring)] {
        let (shard, keys) = (Shard { index, count: 2 }, keys.clone());
        let (attachment, parent, bytes_max) = (local.id, local.root, u64::MAX);
        let reserve = Verb::Reserve { attachment, parent, keys, shard, bytes_max, door };
        let mut reply = site.ask(local.tenant, reserve.clone());
        if door == Door::Ring {
            reply = site.ask(local.tenant, reserve);
        }
        let Some(Reply::Reserved(outcomes)) = reply else { panic!("no reservation: {reply:?}") };
        let ReserveOutcome::Granted { hold, .. } = outcomes[0] else { panic!("there is room: {outcomes:?}") };
        let stored = [CommitOutcome::ShardStored, CommitOutcome::Stored][usize::from(index)];
        assert_eq!(site.commit(local, hold, SEGMENT_BYTES / 2, door), stored);
    }
    for _ in 0..600 {
        site.pass(20);
    }
    assert_eq!(site.promotions.len(), 2, "nobody uses the others, and it waits for a second slot for ever");
}
