//! The worker alone dies: host memory, its records, requests on their way to the disks and local clients live on. Clients go on to read
//! what they have leased and to write where they may, come back under another name and say what they hold, or never do, or die.

use std::sync::Arc;

use super::clients::Question;
use super::world::{Disk, Due, World};
use crate::device::block::simulated::SimulatedDisk;
use crate::names::{AttachmentId, Door, Place, RequestId, TenantId};
use crate::pipeline::{Action, Core, CoreConfig, Event};
use crate::tier::host::records::{Geometry, Records};
use crate::transfer::disk::InFlight;
use crate::verb::{Held, Reply, Request, Verb};

impl World {
    pub(super) fn geometry(core: &CoreConfig) -> Geometry {
        Geometry {
            segment_bytes: core.host_segment_bytes,
            shared_count: core.host_segment_count,
            ingest_count: core.ingest_segment_count,
        }
    }

    /// A core that knows what the records say.
    pub(super) fn new_core(&mut self) {
        self.records.restart();
        self.is_dead = false;
        let config = self.scenario.core.clone();
        let records = Records::open(Box::new(self.records.clone()), Self::geometry(&config));
        self.core = Core::new(config);
        let warnings = self.core.recover_host(records.expect("records are of the same memory"));
        assert!(warnings.is_empty(), "a kill damages nothing: {warnings:?}");
    }

    pub(super) fn restart_warm(&mut self) {
        let was_cut = self.is_dead;
        self.trace.note(format_args!("{} us: the worker is killed", self.now_us));
        self.summary.warm_restarts += 1;
        self.summary.cut_steps += u64::from(was_cut);
        self.count_time();
        if was_cut {
            self.hear_the_last();
        }
        self.heard.clear();
        let (mut gone, mut joining) = (Vec::new(), Vec::new());
        for asked in std::mem::take(&mut self.asked).into_values() {
            match asked.question {
                // Nobody was told whether it was done.
                Question::Commit { puts } => {
                    for put in &puts {
                        self.oracle.committed(put.block, put.version, self.summary.steps);
                    }
                }
                Question::Gone { attachment, is_dead } => gone.push((asked.tenant, attachment, is_dead)),
                // A process that was not let in gives up.
                Question::Join { group, attachment } => joining.push((group, attachment)),
                _ => {}
            }
        }
        self.streams_end();
        let disks = std::mem::take(&mut self.disks);
        self.dying.extend(disks);
        let before = self.oracle.present().iter().filter(|(_, place)| *place == Place::Host).count() as u64;
        self.durable_before.extend(self.oracle.restarted());
        (self.watchers, self.announced) = Default::default();
        self.new_core();
        let found = self.core.status().host.blocks;
        assert!(was_cut || found == before, "{before} blocks were in host memory, and {found} are found there");
        self.summary.warm_blocks += found;
        self.core.await_disk();
        self.schedule(0, Due::Tick);
        let after_us = self.random.below(50_000);
        self.schedule(after_us, Due::Lock);
        self.attach_watchers();
        self.step(Event::Tick);
        self.core.check();
        // Whoever keeps the processes' descriptors says again what it was not answered.
        for (tenant, attachment, is_dead) in gone {
            let verb = if is_dead { Verb::Gone(attachment) } else { Verb::Left(attachment) };
            self.ask(tenant, self.now_ms(), verb, Question::Gone { attachment, is_dead });
        }
        for (group, attachment) in joining {
            self.former_dies(group, attachment);
        }
        for group in 0..self.groups.len() {
            for former in self.groups[group].formers.clone() {
                let after_us = self.random.below(100_000);
                self.schedule(after_us, Due::Rejoin { group, former });
            }
        }
    }

    /// What left its tier before the worker's end, and what it had no time to tell: it may have done so for good.
    fn hear_the_last(&mut self) {
        for (tenant, (attachment, after)) in (0u16..).map(TenantId).zip(self.watchers.clone()) {
            let verb = Verb::Events { attachment, after };
            let request = Request { id: RequestId(u64::MAX), tenant, deadline_ms: self.now_ms(), verb };
            let mut actions = Vec::new();
            self.core.step(Event::Request(request), self.now_ms(), &mut actions);
            for action in actions {
                if let Action::Reply(_, Reply::Events(Some(events))) = action {
                    for event in &events {
                        self.oracle.told(event);
                    }
                }
            }
        }
    }

    /// What the daemon did for streams ends with it, and so does what was due in it; local processes become former members.
    fn streams_end(&mut self) {
        for group in &mut self.groups {
            let members = std::mem::take(&mut group.members);
            if group.door == Door::Ring {
                group.formers.extend(members);
            }
        }
        let ended = self.call_off(|due| match due {
            Due::FinishPut(puts) => !puts[0].is_local,
            Due::Release(leases) => leases[0].reader.is_none(),
            Due::Tick | Due::Continue | Due::SegmentReady { .. } | Due::Promote { .. } => true,
            Due::Rejoin { .. } | Due::Lock | Due::IngestMade { .. } => true,
            Due::Operation | Due::Scribble(_) => false,
        });
        self.let_go_of(ended);
        self.leases().for_each(|lease| lease.in_limbo = true);
    }

    fn let_go_of(&mut self, ended: Vec<Due>) {
        for due in ended {
            match due {
                Due::FinishPut(puts) => puts.iter().for_each(|put| self.let_go(put.extent)),
                Due::Release(leases) => leases.iter().for_each(|lease| self.let_go(lease.extent)),
                _ => {}
            }
        }
    }

    /// Whether a process has not come back yet since the worker died.
    pub(super) fn is_cut_off(&self, group: usize, attachment: AttachmentId) -> bool {
        self.groups[group].formers.contains(&attachment)
    }

    pub(super) fn rejoin(&mut self, group: usize, former: AttachmentId) {
        if !self.is_cut_off(group, former) {
            return;
        }
        match self.random.below(100) {
            0..15 => self.former_dies(group, former),
            15..30 => {
                let after_us = self.random.below(10_000_000);
                self.schedule(after_us, Due::Rejoin { group, former });
            }
            _ => {
                let (name, space, tenant) =
                    (self.groups[group].name.clone(), self.groups[group].space, self.groups[group].tenant);
                let (_, verb) = self.attach_verb(space, &name);
                self.ask(tenant, self.now_ms(), verb, Question::Reattach { group, former });
            }
        }
    }

    fn former_dies(&mut self, group: usize, former: AttachmentId) {
        self.groups[group].formers.retain(|&other| other != former);
        self.process_ends(group, former, true);
        // What it had leased is its group's, as long as somebody can still say so.
        if self.groups[group].formers.is_empty() {
            let is_unclaimed = |due: &Due| match due {
                Due::Release(leases) => leases[0].in_limbo && leases[0].reader.is_some_and(|(by, _)| by == group),
                _ => false,
            };
            let ended = self.call_off(is_unclaimed);
            self.let_go_of(ended);
        }
        let tenant = self.groups[group].tenant;
        for attachment in self.names_of(former) {
            self.ask(tenant, self.now_ms(), Verb::Gone(attachment), Question::Gone { attachment, is_dead: true });
        }
    }

    /// Names under which the daemon may know a process: the one that it knows of itself comes last.
    pub(super) fn names_of(&self, known: AttachmentId) -> Vec<AttachmentId> {
        let aliases = self.aliases.iter().filter(|(of, _)| *of == known);
        aliases.map(|(_, name)| *name).chain([known]).collect()
    }

    /// Nobody is left who has not come back.
    pub(super) fn formers_die(&mut self) {
        for group in 0..self.groups.len() {
            for former in self.groups[group].formers.clone() {
                self.former_dies(group, former);
            }
        }
    }

    pub(super) fn reattached(&mut self, group: usize, former: AttachmentId, attachment: AttachmentId) {
        let tenant = self.groups[group].tenant;
        self.aliases.push((former, attachment));
        let verb = Verb::Join { attachment, former: Some(former) };
        self.ask(tenant, self.now_ms(), verb, Question::Rejoin { group, former, attachment });
    }

    /// It has its former place: says what it holds, but for what it has forgotten, and that this is all.
    pub(super) fn rejoined(&mut self, group: usize, former: AttachmentId, attachment: AttachmentId) {
        self.groups[group].formers.retain(|&other| other != former);
        self.groups[group].members.push(attachment);
        self.aliases.retain(|(known, _)| *known != former);
        for (by, _) in self.committed_in_place.iter_mut().filter(|(by, _)| *by == former) {
            *by = attachment;
        }
        let living: Vec<AttachmentId> =
            self.groups[group].formers.iter().chain(&self.groups[group].members).copied().collect();
        let is_its = |due: &Due| match due {
            Due::FinishPut(puts) => puts[0].is_local && puts[0].attachment == former,
            // What a dead one had leased is its group's.
            Due::Release(leases) => leases[0]
                .reader
                .is_some_and(|(by, reader)| reader == former || by == group && !living.contains(&reader)),
            _ => false,
        };
        let mut held = Vec::new();
        for due in self.call_off(is_its) {
            // What a member leased that died since is forgotten by nobody: it was asked for after the restart.
            let may_forget = match &due {
                Due::Release(leases) => leases[0].in_limbo,
                _ => true,
            };
            if may_forget && self.random.happens(100) {
                self.let_go_of(vec![due]);
                continue;
            }
            let after_us = self.random.below(50_000);
            match due {
                Due::FinishPut(mut puts) => {
                    for put in &mut puts {
                        put.attachment = attachment;
                        let (hold, segment, offset) = (put.hold, put.extent.segment, put.extent.offset);
                        held.push(Held { hold, segment, offset, is_reservation: true });
                    }
                    self.schedule(after_us, Due::FinishPut(puts));
                }
                Due::Release(mut leases) => {
                    for lease in &mut leases {
                        (lease.reader, lease.in_limbo) = (Some((group, attachment)), false);
                        let (hold, segment, offset) = (lease.hold, lease.extent.segment, lease.extent.offset);
                        held.push(Held { hold, segment, offset, is_reservation: false });
                    }
                    self.schedule(after_us, Due::Release(leases));
                }
                _ => {}
            }
        }
        let tenant = self.groups[group].tenant;
        for held in held.chunks(7).map(<[Held]>::to_vec) {
            let question = Question::Confirm { held: held.clone() };
            self.ask(tenant, self.now_ms(), Verb::Confirm(attachment, held), question);
        }
        let question = Question::Confirm { held: Vec::new() };
        self.ask(tenant, self.now_ms(), Verb::Confirm(attachment, Vec::new()), question);
    }

    /// The tier files' lock falls with the dead worker's last request.
    pub(super) fn lock(&mut self) {
        if self.scenario.core.disk.is_none() {
            return self.step(Event::DiskLocked);
        }
        if self.dying.iter().any(|disk| disk.device.next_due_us().is_some()) {
            let after_us = self.random.between(100, 5_000);
            return self.schedule(after_us, Due::Lock);
        }
        let mut files = Vec::new();
        let dying = std::mem::take(&mut self.dying);
        for (Disk { device, .. }, file) in dying.into_iter().zip(0u32..) {
            let (found, image) = self.recover_file(device.kill(), file);
            files.push(found);
            let (seed, arena, faults) = (self.random.next(), Arc::clone(&self.arena), self.scenario.faults);
            let mut device = SimulatedDisk::new(seed, image, Arc::clone(&arena), faults);
            device.advance(self.now_us);
            self.disks.push(Disk { device, in_flight: InFlight::new(arena) });
        }
        self.found_on_disk.clear();
        self.step(Event::DiskJoined(files));
        let durable = std::mem::take(&mut self.durable_before);
        if self.is_dead {
            self.durable_before = durable;
        } else if !self.scenario.lossy {
            for block in durable {
                // What was found may have had to go for another in the same step.
                assert!(self.found_on_disk.contains(&block), "{block:?} was durable and did not survive");
            }
        }
    }
}
