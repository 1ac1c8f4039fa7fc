//! What clients ask, and what they do with what they are granted: groups of one to four shards that come and go, put chains, read them,
//! die in between.

use tender_proto::{BlockKey, Shard, sum};

use super::oracle::Block;
use super::payload::{self, Version};
use super::random::Random;
use super::scenario::Space;
use super::world::{Due, World};
use crate::device::memory::Extent;
use crate::names::{AttachmentId, By, Door, GroupId, Hold, TenantId};
use crate::verb::{AttachVerb, Filled, Held, PurgeWhat, Verb};

/// An engine: one namespace, one number of shards, and as long as it lives one version of everything it writes.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) tenant: TenantId,
    pub(super) space: usize,
    pub(super) shards: u16,
    pub(super) members: Vec<AttachmentId>,
    /// Members of which the daemon, a new one, knows what they hold, and which have not come back yet.
    pub(super) formers: Vec<AttachmentId>,
    pub(super) version: Version,
    /// How its members come to the daemon.
    pub(super) door: Door,
    /// Its members write to what they committed.
    pub(super) scribbles: bool,
}

/// A write to where somebody once might write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scribble {
    extent: Extent,
    incarnation: u64,
}

impl Group {
    pub(super) fn new(number: usize, spaces: &[Space], random: &mut Random) -> Self {
        let space = random.index(spaces.len());
        let ring = random.pick(&[Door::Stream, Door::Ring]);
        // Of public namespaces nothing is read in place.
        let door = if spaces[space].tenants.len() > 1 { Door::Stream } else { ring };
        Self {
            name: format!("group-{number}"),
            tenant: random.pick(&spaces[space].tenants),
            space,
            shards: random.pick(&[1, 1, 2, 4]),
            members: Vec::new(),
            formers: Vec::new(),
            version: Version::new(0, TenantId(0)),
            door,
            scribbles: door == Door::Ring && random.happens(150),
        }
    }
}

/// A slot that a client fills.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub(super) group: usize,
    pub(super) version: Version,
    pub(super) block: Block,
    pub(super) shard: Shard,
    pub(super) hold: Hold,
    pub(super) extent: Extent,
    pub(super) payload_bytes: usize,
    pub(super) attachment: AttachmentId,
    /// Its process writes in place.
    pub(super) is_local: bool,
    /// Another member of the group died: it will not be taken.
    pub(super) is_ended: bool,
}

/// A slot that a client reads.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) tenant: TenantId,
    pub(super) block: Block,
    pub(super) shard: Shard,
    pub(super) hold: Hold,
    pub(super) extent: Extent,
    pub(super) payload_bytes: usize,
    pub(super) version: Version,
    /// The process that reads in place, and its group.
    pub(super) reader: Option<(usize, AttachmentId)>,
    /// From before the worker's last end, and nobody has said since who holds it.
    pub(super) in_limbo: bool,
}

/// What was asked, as the client remembers it.
#[derive(Clone, Debug)]
pub(super) enum Question {
    Attach {
        group: usize,
    },
    Lookup {
        space: usize,
        at: Vec<usize>,
    },
    Reserve {
        group: usize,
        attachment: AttachmentId,
        door: Door,
        version: Version,
        at: Vec<usize>,
        shard: Shard,
    },
    Commit {
        puts: Vec<Put>,
    },
    Acquire {
        /// That asks in place.
        reader: Option<(usize, AttachmentId)>,
        space: usize,
        at: Vec<usize>,
    },
    /// By the process that reads and writes in place.
    Join {
        group: usize,
        attachment: AttachmentId,
    },
    /// By one that did so before the daemon was restarted.
    Reattach {
        group: usize,
        former: AttachmentId,
    },
    Rejoin {
        group: usize,
        former: AttachmentId,
        attachment: AttachmentId,
    },
    Confirm {
        held: Vec<Held>,
    },
    /// Of this process, which is dead, or has left in good order.
    Gone {
        attachment: AttachmentId,
        is_dead: bool,
    },
    Prefetch {
        count: usize,
    },
    Durable {
        space: usize,
        at: Vec<usize>,
    },
    /// Of these blocks, or of all.
    Purge {
        space: usize,
        at: Option<Vec<usize>>,
    },
    Status,
    /// Whatever the answer is.
    Any,
    /// The world's own.
    Own,
}

impl World {
    /// One operation of some client.
    pub(super) fn operate(&mut self) {
        let group = self.random.skewed(self.groups.len());
        let members = self.groups[group].members.len();
        if members == 0 || members < 3 && self.random.happens(20) {
            return self.attach(group);
        }
        /// Of the operations below, in their order.
        const WEIGHTS: [u64; 12] = [12, 90, 300, 300, 50, 60, 25, 1, 15, 10, 12, 1];
        match self.random.weighted(&WEIGHTS) {
            0 => self.detach(group),
            1 => self.lookup(group),
            2 => self.put(group),
            3 => self.get(group),
            4 => self.prefetch(group),
            5 => self.durable(group),
            6 => self.purge(group),
            7 => self.purge_all(group),
            8 => {
                let (tenant, deadline_ms) = (self.groups[group].tenant, self.deadline_ms());
                self.ask(tenant, deadline_ms, Verb::Status, Question::Status);
            }
            9 => self.compare_snapshot(),
            10 => self.ask_nonsense(group),
            _ => {
                let seconds = self.random.between(1, 80);
                self.clients_live = false;
                self.pass(seconds * 1_000_000);
                self.clients_live = true;
                self.schedule(0, Due::Operation);
            }
        }
    }

    pub(super) fn deadline_ms(&mut self) -> u64 {
        let wait_ms = match self.random.below(10) {
            0 => self.random.below(5),
            1..4 => self.random.between(20, 200),
            _ => 5_000,
        };
        self.now_ms() + wait_ms
    }

    /// A member of a group that has one.
    fn member(&mut self, group: usize) -> (TenantId, AttachmentId) {
        let members = &self.groups[group].members;
        (self.groups[group].tenant, members[self.random.index(members.len())])
    }

    /// A run of a chain: mostly from its start, mostly short.
    fn run_of_chain(&mut self, space: usize, len_max: usize) -> (Option<usize>, Vec<usize>) {
        let chains = &self.scenario.spaces[space].chains;
        let chain = &chains[self.random.skewed(chains.len())];
        let start = if self.random.happens(100) { self.random.index(chain.len()) } else { 0 };
        let count = 1 + self.random.index(len_max.min(chain.len() - start));
        (start.checked_sub(1).map(|before| chain[before]), chain[start..start + count].to_vec())
    }

    fn keys(&self, space: usize, at: &[usize]) -> Vec<BlockKey> {
        at.iter().map(|&at| self.scenario.spaces[space].keys[at]).collect()
    }

    pub(super) fn attach_verb(&mut self, space: usize, group: &str) -> (AttachmentId, Verb) {
        let Space { namespace, layout, root, .. } = self.scenario.spaces[space].clone();
        let attachment = self.name_attachment();
        let expected_root = self.random.happens(500).then_some(root);
        let (group, member) = (group.to_owned(), String::new());
        (attachment, Verb::Attach(Box::new(AttachVerb { attachment, group, member, namespace, layout, expected_root })))
    }

    fn attach(&mut self, group: usize) {
        let Group { name, tenant, space, .. } = self.groups[group].clone();
        let (_, verb) = self.attach_verb(space, &name);
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Attach { group });
    }

    fn detach(&mut self, group: usize) {
        let (tenant, member) = self.member(group);
        self.groups[group].members.retain(|&other| other != member);
        let deadline_ms = self.deadline_ms();
        let is_local = self.groups[group].door == Door::Ring;
        let is_dead = is_local && self.random.happens(500);
        if is_local {
            self.process_ends(group, member, is_dead);
        }
        let verb = if is_dead { Verb::Gone(member) } else { Verb::Detach(member) };
        self.ask(tenant, deadline_ms, verb, Question::Gone { attachment: member, is_dead });
        // What comes instead is another engine.
        let is_over = self.groups[group].members.is_empty() && self.groups[group].formers.is_empty();
        if is_over && self.random.happens(700) {
            let name = std::mem::take(&mut self.groups[group].name);
            self.groups[group] = Group { name, ..Group::new(group, &self.scenario.spaces, &mut self.random) };
        }
    }

    /// A process that reads and writes in place is dead, or leaves. What it was writing there is ended, and what its group was reading there
    /// when it was the last. After a death, what others of the group were writing comes to nothing. A child that it forked writes on.
    pub(super) fn process_ends(&mut self, group: usize, member: AttachmentId, is_dead: bool) {
        let is_last = self.groups[group].members.is_empty() && self.groups[group].formers.is_empty();
        let version = self.groups[group].version;
        let of_group = move |puts: &[Put]| (puts[0].group, puts[0].version) == (group, version);
        let ended = self.call_off(|due| match due {
            Due::FinishPut(puts) => puts[0].is_local && (puts[0].attachment == member || is_last && of_group(puts)),
            Due::Release(leases) => is_last && leases[0].reader.is_some_and(|(reader, _)| reader == group),
            _ => false,
        });
        // A process that was not let in yet is nobody's member.
        let is_known = self.names_of(member).iter().any(|name| self.core.local_processes().contains(name));
        if is_dead && is_known {
            self.puts().filter(|puts| of_group(puts)).flatten().for_each(|put| put.is_ended = true);
        }
        let committed: Vec<Scribble> =
            self.committed_in_place.iter().filter(|(by, _)| *by == member).map(|(_, scribble)| *scribble).collect();
        for scribble in committed {
            let after_us = self.random.below(100_000);
            self.schedule(after_us, Due::Scribble(scribble));
        }
        for due in ended {
            match due {
                Due::FinishPut(puts) => {
                    for put in puts {
                        self.let_go(put.extent);
                        if put.attachment == member && self.is_ingest(put.extent.segment) {
                            self.scribble_later(put.extent);
                        }
                    }
                }
                Due::Release(leases) => leases.iter().for_each(|lease| self.let_go(lease.extent)),
                _ => {}
            }
        }
    }

    /// Remembers what a process may write over when it is dead, through a child that it forked.
    pub(super) fn remember_committed(&mut self, put: &Put) {
        /// As many as are written over when a process dies.
        const REMEMBERED: usize = 40;
        if self.is_ingest(put.extent.segment) {
            if self.committed_in_place.len() == REMEMBERED {
                self.committed_in_place.pop_front();
            }
            self.committed_in_place.push_back((put.attachment, self.scribble_to(put.extent)));
        }
    }

    /// A write to the memory that is there now.
    fn scribble_to(&self, extent: Extent) -> Scribble {
        Scribble { extent, incarnation: self.incarnations.get(&extent.segment).copied().unwrap_or(0) }
    }

    fn scribble_later(&mut self, extent: Extent) {
        let after_us = self.random.below(100_000);
        self.schedule(after_us, Due::Scribble(self.scribble_to(extent)));
    }

    /// To memory that is still that of the client's segment; what was dropped is nobody's.
    pub(super) fn scribble(&mut self, scribble: &Scribble) {
        let Scribble { extent, incarnation } = *scribble;
        if self.incarnations.get(&extent.segment).copied().unwrap_or(0) == incarnation {
            self.arena.write(extent, self.random.index(extent.bytes as usize / 2), &[0xee; 16]);
        }
    }

    fn lookup(&mut self, group: usize) {
        let (tenant, member) = self.member(group);
        let space = self.groups[group].space;
        let (_, at) = self.run_of_chain(space, 16);
        let verb = Verb::Lookup(member, self.keys(space, &at));
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Lookup { space, at });
    }

    /// All ranks of a group put their shard of a run, each by itself; now and then one of them does not.
    fn put(&mut self, group: usize) {
        let Group { space, shards, version, .. } = self.groups[group];
        let (before, at) = self.run_of_chain(space, 8);
        let parent = before.map_or(self.scenario.spaces[space].root, |before| self.scenario.spaces[space].keys[before]);
        let keys = self.keys(space, &at);
        let first = self.random.below(shards.into()) as u16;
        for index in (0..shards).map(|index| (first + index) % shards) {
            if shards > 1 && self.random.happens(80) {
                continue;
            }
            let (tenant, attachment) = self.member(group);
            let shard = Shard { index, count: shards };
            let bytes_max = if self.random.happens(100) { self.random.below(200_000) } else { u64::MAX };
            // Who finds no memory to write to puts over gRPC.
            let is_stream = self.random.happens(100);
            let door = if is_stream { Door::Stream } else { self.groups[group].door };
            let verb = Verb::Reserve { attachment, parent, keys: keys.clone(), shard, bytes_max, door };
            let deadline_ms = self.deadline_ms();
            let question = Question::Reserve { group, attachment, door, version, at: at.clone(), shard };
            self.ask(tenant, deadline_ms, verb, question);
        }
    }

    /// Slots were granted: half of the bytes now, the rest (and whether at all) later.
    pub(super) fn begin_puts(&mut self, puts: Vec<Put>) {
        for put in &puts {
            self.hold(put.hold, put.extent, false);
            let payload = self.payload(put);
            self.arena.write(put.extent, 0, &payload[..payload.len() / 2]);
        }
        if !puts.is_empty() {
            let after_us = match self.random.below(100) {
                0 => self.random.below(70_000_000),
                1..20 => self.random.below(200_000),
                _ => self.random.below(2_000),
            };
            self.schedule(after_us, Due::FinishPut(puts));
        }
    }

    fn payload(&self, put: &Put) -> Vec<u8> {
        let key = self.scenario.spaces[put.block.space].keys[put.block.at];
        payload::bytes(&key, put.version, put.shard, put.payload_bytes)
    }

    /// Commits what was granted in one reply, or aborts it; what a client that died had is aborted by its connection's end.
    pub(super) fn finish_puts(&mut self, puts: Vec<Put>) {
        if self.is_cut_off(puts[0].group, puts[0].attachment) {
            // It writes on, and cannot say so.
            for put in &puts {
                self.arena.write(put.extent, 0, &self.payload(put)[..put.payload_bytes / 2]);
            }
            let after_us = self.random.between(1_000, 20_000);
            return self.schedule(after_us, Due::FinishPut(puts));
        }
        for put in &puts {
            let payload = self.payload(put);
            let half = payload.len() / 2;
            self.arena.write(put.extent, half, &payload[half..]);
            self.arena.zero_from(put.extent, payload.len());
        }
        let Group { tenant, ref members, .. } = self.groups[puts[0].group];
        let member = members.first().copied();
        let deadline_ms = self.deadline_ms();
        let holds = puts.iter().map(|put| put.hold).collect();
        let Some(attachment) = member.filter(|_| !self.random.happens(50)) else {
            puts.iter().for_each(|put| self.let_go(put.extent));
            self.ask(tenant, deadline_ms, Verb::Abort(By::Daemon, holds), Question::Any);
            return;
        };
        if self.groups[puts[0].group].scribbles {
            let extents = puts.iter().map(|put| put.extent).filter(|extent| self.is_ingest(extent.segment));
            let extents: Vec<Extent> = extents.collect();
            extents.into_iter().for_each(|extent| self.scribble_later(extent));
        }
        let filled = puts.iter().map(|put| {
            self.let_go(put.extent);
            // What it means to put, whatever somebody has written over it since.
            let sums = sum::fragment_sums(&self.payload(put));
            Filled { hold: put.hold, sums }
        });
        let filled = filled.collect();
        let door = if puts[0].is_local { Door::Ring } else { Door::Stream };
        self.ask(tenant, deadline_ms, Verb::Commit { attachment, filled, door }, Question::Commit { puts });
    }

    /// Whatever a commit did not take is given back, as the daemon does for its streams.
    pub(super) fn give_back(&mut self, tenant: TenantId, puts: &[Put]) {
        let holds = puts.iter().map(|put| put.hold).collect();
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, Verb::Abort(By::Daemon, holds), Question::Any);
    }

    fn get(&mut self, group: usize) {
        let (tenant, attachment) = self.member(group);
        let space = self.groups[group].space;
        let (_, at) = self.run_of_chain(space, 12);
        let bytes_max = if self.random.happens(200) { self.random.below(300_000) } else { u64::MAX };
        let door = if self.random.happens(100) { Door::Stream } else { self.groups[group].door };
        let verb = Verb::Acquire { attachment, keys: self.keys(space, &at), bytes_max, door };
        let deadline_ms = self.deadline_ms();
        let reader = (door == Door::Ring).then_some((group, attachment));
        self.ask(tenant, deadline_ms, verb, Question::Acquire { reader, space, at });
    }

    /// Leases were read once; they are read again when they end, for nobody may have written meanwhile.
    pub(super) fn keep_leases(&mut self, leases: Vec<Lease>) {
        if !leases.is_empty() {
            let after_us = match self.random.below(100) {
                _ if !self.clients_live => 0,
                0 => self.random.below(20_000_000),
                1..20 => self.random.below(100_000),
                _ => self.random.below(1_000),
            };
            self.schedule(after_us, Due::Release(leases));
        }
    }

    pub(super) fn release(&mut self, leases: Vec<Lease>) {
        for lease in &leases {
            let key = &self.scenario.spaces[lease.block.space].keys[lease.block.at];
            let written = payload::bytes(key, lease.version, lease.shard, lease.payload_bytes);
            // Where a client may write, a reader has checked what it copied, or reads what its own group wrote.
            let changed = self.read(lease) != written;
            assert!(!changed || self.is_ingest(lease.extent.segment), "a lease's bytes changed: {lease:?}");
        }
        if leases[0].reader.is_some_and(|(group, attachment)| self.is_cut_off(group, attachment)) {
            // It reads on.
            let after_us = self.random.between(1_000, 20_000);
            return self.schedule(after_us, Due::Release(leases));
        }
        leases.iter().for_each(|lease| self.let_go(lease.extent));
        let holds = leases.iter().map(|lease| lease.hold).collect();
        let deadline_ms = self.deadline_ms();
        let twice = self.random.happens(30);
        let verb = Verb::Release(By::Daemon, holds);
        if twice {
            self.ask(leases[0].tenant, deadline_ms, verb.clone(), Question::Any);
        }
        self.ask(leases[0].tenant, deadline_ms, verb, Question::Any);
    }

    fn prefetch(&mut self, group: usize) {
        let (tenant, attachment) = self.member(group);
        let space = self.groups[group].space;
        let (_, at) = self.run_of_chain(space, 24);
        let verb = Verb::Prefetch(attachment, self.keys(space, &at));
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Prefetch { count: at.len() });
    }

    fn durable(&mut self, group: usize) {
        let (tenant, attachment) = self.member(group);
        let space = self.groups[group].space;
        let (_, at) = self.run_of_chain(space, 12);
        let verb = Verb::Durable(attachment, self.keys(space, &at));
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Durable { space, at });
    }

    fn purge(&mut self, group: usize) {
        let (tenant, attachment) = self.member(group);
        let space = self.groups[group].space;
        let (_, at) = self.run_of_chain(space, 6);
        let verb = Verb::Purge(attachment, PurgeWhat::Keys(self.keys(space, &at)));
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Purge { space, at: Some(at) });
    }

    fn purge_all(&mut self, group: usize) {
        let (tenant, attachment) = self.member(group);
        let space = self.groups[group].space;
        let deadline_ms = self.deadline_ms();
        let verb = Verb::Purge(attachment, PurgeWhat::Namespace);
        self.ask(tenant, deadline_ms, verb, Question::Purge { space, at: None });
    }

    /// What no honest client asks.
    fn ask_nonsense(&mut self, group: usize) {
        let (tenant, attachment) = self.member(group);
        let space = self.groups[group].space;
        let root = self.scenario.spaces[space].root;
        if self.random.happens(300) {
            return self.end_by_other_door(tenant);
        }
        // Guessed: not the group's own, which it may end as it likes.
        let never = u32::MAX - self.random.below(9) as u32;
        let others = self.random.below(9) as u32;
        let hold = Hold { place: self.random.below(40) as u32, generation: others };
        let stranger = By::Group(GroupId(u32::MAX), self.random.pick(&[Door::Stream, Door::Ring]));
        let [one, other] = [1, 2].map(|byte| BlockKey::from_bytes([byte; 32]));
        let shard = Shard { index: 0, count: 1 };
        let reserve = |parent, key| Verb::Reserve {
            attachment,
            parent,
            keys: vec![key],
            shard,
            bytes_max: 0,
            door: Door::Stream,
        };
        let verb = match self.random.below(8) {
            0 => Verb::Lookup(AttachmentId(u64::MAX), vec![root]),
            1 => Verb::Release(stranger, vec![hold]),
            2 => Verb::Abort(stranger, vec![hold]),
            3 => Verb::Commit {
                attachment,
                filled: vec![Filled { hold: Hold { generation: never, ..hold }, sums: vec![sum::GOLDEN] }],
                door: self.random.pick(&[Door::Stream, Door::Ring]),
            },
            4 => Verb::Acquire { attachment, keys: Vec::new(), bytes_max: 0, door: Door::Ring },
            5 => Verb::Reserve {
                attachment,
                parent: root,
                keys: vec![root],
                shard,
                bytes_max: u64::MAX,
                door: Door::Stream,
            },
            6 => reserve(one, other),
            _ => reserve(other, one),
        };
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Any);
    }

    /// A member of a group ends by one door what the group holds by the other, whoever guessed its name: nothing comes of it.
    fn end_by_other_door(&mut self, tenant: TenantId) {
        let mut held: Vec<Hold> = self.puts().flatten().map(|put| put.hold).collect();
        held.extend(self.leases().map(|lease| lease.hold));
        if held.is_empty() {
            return;
        }
        let hold = self.random.pick(&held);
        let Some(holder) = self.core.holder(hold) else { return };
        let door = if holder.door == Door::Ring { Door::Stream } else { Door::Ring };
        let by = By::Group(holder.group, door);
        let filled = vec![Filled { hold, sums: vec![sum::GOLDEN] }];
        let verb = match self.random.below(3) {
            0 => Verb::Release(by, vec![hold]),
            1 => Verb::Abort(by, vec![hold]),
            _ => Verb::Commit { attachment: holder.attachment, filled, door },
        };
        let deadline_ms = self.deadline_ms();
        self.ask(tenant, deadline_ms, verb, Question::Any);
        assert_eq!(self.core.holder(hold), Some(holder), "ended by the other door");
    }
}
