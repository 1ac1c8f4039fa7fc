//! Every answer, checked: once, in time, and only what the oracle allows.

use tender_proto::{Shard, sum};

use super::clients::{Group, Lease, Put, Question};
use super::oracle::Block;
use super::payload::{self, Version};
use super::world::World;
use crate::limits;
use crate::names::{AttachmentId, By, Door, Place, RequestId, TenantId};
use crate::status::{CoreStatus, Health};
use crate::verb::{Acquired, CommitOutcome, LookupReply, PrefetchReply, RefusalKind, Reply, ReserveOutcome, Verb};

impl World {
    pub(super) fn answered(&mut self, id: RequestId, reply: Reply) {
        let asked = self.asked.remove(&id).unwrap_or_else(|| panic!("{id:?} is answered twice: {reply:?}"));
        let late_ms = 2 * limits::TICK.as_millis() as u64;
        let at_once = asked.step + 1 == self.summary.steps;
        assert!(at_once || self.now_ms() <= asked.deadline_ms + late_ms, "answered after the deadline: {asked:?}");
        self.trace_reply(id, &reply);
        match (asked.question.clone(), reply) {
            (Question::Own, reply) => drop(self.heard.insert(id, reply)),
            (Question::Any, _) => {}
            (Question::Attach { group }, Reply::Attached(attached)) => {
                let Group { space, tenant, .. } = self.groups[group];
                assert_eq!(attached.root, self.scenario.spaces[space].root, "both sides derive the same root");
                if self.groups[group].members.is_empty() && self.groups[group].formers.is_empty() {
                    self.last_version += 1;
                    self.groups[group].version = Version::new(self.last_version, tenant);
                }
                let attachment = attached.attachment;
                if self.groups[group].door == Door::Stream {
                    self.groups[group].members.push(attachment);
                } else {
                    let (tenant, deadline_ms) = (self.groups[group].tenant, self.now_ms());
                    let verb = Verb::Join { attachment, former: None };
                    self.ask(tenant, deadline_ms, verb, Question::Join { group, attachment });
                }
            }
            (Question::Reattach { group, former }, Reply::Attached(attached)) => {
                self.reattached(group, former, attached.attachment);
            }
            (Question::Rejoin { group, former, attachment }, Reply::Joined { .. }) => {
                self.rejoined(group, former, attachment)
            }
            (Question::Confirm { held }, Reply::Confirmed(confirmed)) => {
                assert!(confirmed.iter().all(|&confirmed| confirmed), "not found to be held: {held:?}, {confirmed:?}");
                assert_eq!(held.len(), confirmed.len(), "one answer per hold");
                self.summary.confirmed_holds += held.len() as u64;
            }
            (Question::Gone { .. }, Reply::Done) => {}
            (Question::Lookup { space, at }, Reply::Lookup(reply)) => self.looked_up(space, &at, &reply),
            (Question::Join { group, attachment }, Reply::Joined { .. }) => {
                self.groups[group].members.push(attachment);
            }
            (Question::Reserve { group, attachment, door, version, at, shard }, Reply::Reserved(outcomes)) => {
                self.reserved((group, attachment, door), version, &at, shard, &outcomes);
            }
            (Question::Commit { puts }, Reply::Committed(outcomes)) => {
                self.committed(&puts, &outcomes);
                self.give_back(asked.tenant, &puts);
            }
            (Question::Commit { puts }, Reply::Refused(_)) => self.give_back(asked.tenant, &puts),
            (Question::Acquire { reader, space, at }, Reply::Acquired(acquired)) => {
                self.acquired(asked.tenant, asked.step, reader, (space, &at), &acquired);
            }
            (Question::Prefetch { count }, Reply::Prefetch(reply)) => {
                let PrefetchReply { resident, loaded, missing, shed, done } = reply;
                assert!(loaded <= resident, "what was loaded is resident");
                if done {
                    assert_eq!((resident + missing + shed) as usize, count, "each key has one fate: {reply:?}");
                } else {
                    self.asked.insert(id, asked);
                }
            }
            (Question::Durable { space, at }, Reply::Durable(durable)) => {
                assert_eq!(at.len(), durable.len(), "one answer per key");
                for (&at, _) in at.iter().zip(durable).filter(|(_, durable)| *durable) {
                    self.oracle.acknowledged(Block { space, at });
                }
            }
            (Question::Purge { space, at }, Reply::Purged { .. }) => {
                self.summary.purges += 1;
                let all = 0..self.scenario.spaces[space].keys.len();
                let at: Vec<usize> = at.unwrap_or_else(|| all.collect());
                at.into_iter().for_each(|at| self.oracle.purged(Block { space, at }, asked.step, self.summary.steps));
            }
            (Question::Status, Reply::Status(status)) => Self::within_quotas(&status),
            (question, Reply::Refused(refusal)) => {
                let may_be = matches!(refusal.kind, RefusalKind::Busy | RefusalKind::Unattached);
                let never_refused = matches!(question, Question::Attach { .. } | Question::Status);
                assert!(may_be && !never_refused, "refused: {refusal:?}, asked: {question:?}");
            }
            (question, reply) => panic!("the answer belongs to another question: {reply:?}, asked: {question:?}"),
        }
    }

    /// Short, and without keys: what they stand for is in the question.
    fn trace_reply(&mut self, id: RequestId, reply: &Reply) {
        match reply {
            Reply::Events(events) => {
                let count = events.as_ref().map(Vec::len);
                self.trace.note(format_args!("  {id:?} answered: {count:?} events"));
            }
            Reply::Snapshot { present, .. } => {
                self.trace.note(format_args!("  {id:?} answered: {} present", present.len()));
            }
            Reply::Attached(attached) => self.trace.note(format_args!("  {id:?} answered: {:?}", attached.attachment)),
            reply => self.trace.note(format_args!("  {id:?} answered: {reply:?}")),
        }
    }

    /// The answer to something that is always answered at once.
    fn ask_now(&mut self, tenant: TenantId, verb: Verb) -> Option<Reply> {
        let id = self.ask(tenant, self.now_ms(), verb, Question::Own);
        let reply = self.heard.remove(&id);
        assert!(reply.is_some() || self.is_dead, "answered at once");
        reply
    }

    fn disk_is_usable(&self) -> bool {
        let now_ms = self.now_ms();
        self.core.status().disk.is_some_and(|(_, health)| !matches!(health, Health::Disabled(until) if now_ms < until))
    }

    fn looked_up(&self, space: usize, at: &[usize], reply: &LookupReply) {
        let bit = |bits: &[u8], i: usize| bits[i / 8] >> (i % 8) & 1 == 1;
        let usable = self.disk_is_usable();
        let mut prefix = 0;
        for (i, &at) in at.iter().enumerate() {
            let block = Block { space, at };
            let (on_host, on_disk) = (bit(&reply.host, i), bit(&reply.disk, i));
            assert_eq!(on_host, self.oracle.is_present(block, Place::Host), "{block:?}: events and lookup disagree");
            let told = self.oracle.is_present(block, Place::Disk);
            assert_eq!(on_disk, told && usable, "{block:?}: events and lookup disagree about the disk");
            let found = on_host || on_disk;
            let possible = self.oracle.may_be_present(block) || self.scenario.lossy;
            assert!(!found || possible, "{block:?} is found, but nothing of it was put since it was purged");
            prefix += u32::from(found && prefix as usize == i);
        }
        assert_eq!(reply.prefix_blocks, prefix, "the usable prefix ends at the first block that is missing");
    }

    fn reserved(
        &mut self,
        (group, attachment, door): (usize, AttachmentId, Door),
        version: Version,
        at: &[usize],
        shard: Shard,
        outcomes: &[ReserveOutcome],
    ) {
        assert_eq!(at.len(), outcomes.len(), "one outcome per key");
        let Group { space, tenant, .. } = self.groups[group];
        let mut puts = Vec::new();
        for (&at, outcome) in at.iter().zip(outcomes) {
            let ReserveOutcome::Granted { hold, extent } = *outcome else { continue };
            let payload_bytes = self.scenario.spaces[space].layout.shard_bytes(shard.count) as usize;
            let block = Block { space, at };
            assert_eq!(self.is_ingest(extent.segment), door == Door::Ring, "clients write to their own segments alone");
            self.lies_in_file_of(tenant, extent);
            let is_local = door == Door::Ring;
            let is_ended = false;
            puts.push(Put {
                group,
                version,
                block,
                shard,
                hold,
                extent,
                payload_bytes,
                attachment,
                is_local,
                is_ended,
            });
            // What a disk that lies puts into a slot behind the daemon's back is loaded in place before it is found out.
            if !self.scenario.lossy {
                let mut memory = vec![0; extent.bytes as usize];
                self.arena.read(extent, 0, &mut memory);
                // What was scribbled over looks like nobody's.
                let tenants = self.scenario.core.tenants.len();
                let is_stranger = |other: &TenantId| *other != tenant && usize::from(other.0) < tenants;
                let strangers = payload::tenants(&memory).find(is_stranger);
                assert_eq!(strangers, None, "{extent:?} was granted to {tenant:?} with bytes of another tenant in it");
            }
        }
        self.begin_puts(puts);
    }

    fn committed(&mut self, puts: &[Put], outcomes: &[CommitOutcome]) {
        assert_eq!(puts.len(), outcomes.len(), "one outcome per slot");
        for (put, outcome) in puts.iter().zip(outcomes) {
            if *outcome != CommitOutcome::Gone {
                let group = self.groups[put.group].version;
                assert_eq!(put.version, group, "a group's reservations end with it: {put:?}");
                assert!(!put.is_ended, "a death ends what its group was writing: {put:?}");
                self.oracle.committed(put.block, put.version, self.summary.steps);
                self.summary.committed_shards += 1;
                self.remember_committed(put);
            }
        }
    }

    pub(super) fn acquired(
        &mut self,
        tenant: TenantId,
        asked_step: u64,
        reader: Option<(usize, AttachmentId)>,
        (space, at): (usize, &[usize]),
        acquired: &Acquired,
    ) {
        assert!(acquired.blocks.len() <= at.len(), "no more blocks than were asked for");
        let mut leases = Vec::new();
        for (&at, leased) in at.iter().zip(&acquired.blocks) {
            let first = leases.len();
            for (part, index) in leased.parts.iter().zip(0u16..) {
                let count = leased.parts.len() as u16;
                assert_eq!(part.shard, Shard { index, count }, "a block's shards come whole and in order");
                let mut lease = Lease {
                    tenant,
                    block: Block { space, at },
                    shard: part.shard,
                    hold: part.hold,
                    extent: part.extent,
                    payload_bytes: part.payload_bytes as usize,
                    version: Version::new(0, tenant),
                    reader,
                    in_limbo: false,
                };
                if reader.is_some() {
                    self.lies_in_file_of(tenant, part.extent);
                }
                let is_ingest = self.is_ingest(part.extent.segment);
                assert!(reader.is_some() || !is_ingest, "a stream sends what only the daemon writes");
                let is_unsure =
                    is_ingest && (part.verify || reader.is_some_and(|(group, _)| self.groups[group].scribbles));
                if is_unsure && !self.holds_its_sum(&lease, part.root) {
                    self.summary.refused_leases += 1;
                    self.ask(tenant, self.now_ms(), Verb::Release(By::Daemon, vec![part.hold]), Question::Any);
                    continue;
                }
                self.hold(part.hold, part.extent, true);
                lease.version = self.recognise(&lease, asked_step);
                self.sum_is_right(&lease, part.root);
                leases.push(lease);
            }
            let versions: Vec<Version> = leases[first..].iter().map(|lease| lease.version).collect();
            let mixed = versions.iter().any(|version| *version != versions[0]);
            assert!(!mixed, "a block of shards of several writers: {:?}", &leases[first..]);
            self.summary.leased_blocks += 1;
            self.summary.loaded_blocks += u64::from(leased.place == Place::Disk);
        }
        // Ranks give back what they read one by one.
        let rest = leases.split_off(self.random.index(leases.len() + 1));
        self.keep_leases(leases);
        self.keep_leases(rest);
    }

    pub(super) fn read(&self, lease: &Lease) -> Vec<u8> {
        let mut bytes = vec![0; lease.payload_bytes];
        self.arena.read(lease.extent, 0, &mut bytes);
        bytes
    }

    fn recognise(&self, lease: &Lease, asked_step: u64) -> Version {
        let space = &self.scenario.spaces[lease.block.space];
        assert_eq!(lease.payload_bytes as u64, space.layout.shard_bytes(lease.shard.count), "all bytes of a shard");
        let key = &space.keys[lease.block.at];
        self.oracle.recognise(lease.block, key, lease.shard, &self.read(lease), asked_step)
    }

    fn sum_is_right(&self, lease: &Lease, root: u64) {
        assert!(self.holds_its_sum(lease, root), "a lease's sum is that of its bytes: {lease:?}");
    }

    fn holds_its_sum(&self, lease: &Lease, root: u64) -> bool {
        let space = &self.scenario.spaces[lease.block.space];
        let seed = sum::seed(&space.keys[lease.block.at], lease.shard, space.layout.fingerprint());
        let sums = self.arena.fragment_sums(lease.extent, lease.payload_bytes);
        root == sum::root(seed, &sums)
    }

    pub(super) fn within_quotas(status: &CoreStatus) {
        /// One block that is being copied within host memory is there twice: the largest, in four shards.
        const COPIED_BYTES: u64 = 4 * 28_672;
        for tenant in &status.tenants {
            for ((used, quota), more) in [(tenant.host, COPIED_BYTES), (tenant.disk, 0)] {
                assert!(quota.is_none_or(|quota| used <= quota + more), "more than the quota: {tenant:?}");
            }
        }
        for tier in [Some(&status.host), status.disk.as_ref().map(|(tier, _)| tier)].into_iter().flatten() {
            assert!(tier.usage.used_bytes <= tier.usage.ready_bytes, "more than there is: {tier:?}");
            assert!(tier.usage.ready_bytes <= tier.capacity_bytes, "more than there is: {tier:?}");
        }
    }

    /// A tenant with events that were announced and not read.
    pub(super) fn tenant_with_news(&self) -> Option<TenantId> {
        let news = |tenant: &TenantId| {
            let seen = self.watchers.get(tenant.0 as usize).map(|(_, seen)| *seen);
            seen.is_some_and(|seen| seen < self.announced.get(tenant).copied().unwrap_or(0))
        };
        (0..self.scenario.core.tenants.len() as u16).map(TenantId).find(news)
    }

    /// Events came: the oracle learns them.
    pub(super) fn watch(&mut self, tenant: TenantId) {
        let (attachment, seen) = self.watchers[tenant.0 as usize];
        let Some(reply) = self.ask_now(tenant, Verb::Events { attachment, after: seen }) else { return };
        let Reply::Events(Some(events)) = reply else { panic!("events after {seen} are not known: {reply:?}") };
        for event in &events {
            let block = self.oracle.told(event);
            let (place, present) = (event.place, event.present);
            if present && place == Place::Disk {
                self.found_on_disk.insert(block);
            }
            self.trace.note(format_args!("  {block:?} {} {place:?}", if present { "came to" } else { "left" }));
        }
        assert!(!events.is_empty(), "events of {tenant:?} were announced, but none come after {seen}");
        self.watchers[tenant.0 as usize].1 = seen + events.len() as u64;
    }

    /// What a snapshot says is what the events said, unless more came while it was taken.
    pub(super) fn compare_snapshot(&mut self) {
        let before = self.announced.clone();
        let mut found = Vec::new();
        for (attachment, tenant) in self.watchers.clone().into_iter().zip(0u16..).map(|((id, _), t)| (id, TenantId(t)))
        {
            let mut from = Some(0);
            while let Some(place) = from {
                let reply = self.ask_now(tenant, Verb::Snapshot { attachment, from: place });
                let Some(reply) = reply else { return };
                let Reply::Snapshot { present, next, .. } = reply else { panic!("no snapshot: {reply:?}") };
                found.extend(present.iter().map(|event| (self.oracle.named(event), event.place)));
                from = next;
            }
        }
        found.sort_unstable_by_key(|(block, place)| (*block, place.at()));
        if self.announced == before {
            assert_eq!(found, self.oracle.present(), "snapshot and events disagree");
        }
    }
}
