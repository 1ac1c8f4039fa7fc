//! The daemon's beginning and its ends: killed, without power, or asked to stop when nothing is left to do.

use std::sync::Arc;

use tender_proto::BlockKey;

use super::clients::Question;
use super::cut::CutWords;
use super::oracle::Block;
use super::scenario::{Scenario, Space};
use super::world::{Disk, Due, World};
use crate::device::block::simulated::{DiskImage, Faults, SimulatedDisk};
use crate::names::{AttachmentId, Door, Place, TenantId};
use crate::pipeline::{CoreConfig, DiskConfig, Event, RecoveredFile};
use crate::tier::disk::format::{SEGMENTS_OFFSET, Superblock};
use crate::tier::disk::recover;
use crate::transfer::disk::InFlight;
use crate::verb::{AcquireEnd, PurgeWhat, Reply, Verb};

/// Long enough for everything that waits, and for a disk that was left alone.
const LONG_MS: u64 = 120_000;

impl World {
    pub(super) fn blank_images(scenario: &Scenario) -> Vec<DiskImage> {
        let Some(disk) = &scenario.core.disk else { return Vec::new() };
        (0..disk.file_count).map(|file| Self::blank_image(disk, file)).collect()
    }

    fn superblock(disk: &DiskConfig, file_index: u32) -> Superblock {
        let DiskConfig { segment_bytes, segment_count, file_count, page_key, .. } = *disk;
        let segment_count = (segment_count - file_index).div_ceil(file_count);
        Superblock { file_index, file_count, segment_count, segment_bytes, identity: [7; 16], page_key }
    }

    fn blank_image(disk: &DiskConfig, file: u32) -> DiskImage {
        let superblock = Self::superblock(disk, file);
        let bytes = SEGMENTS_OFFSET + u64::from(superblock.segment_count) * disk.segment_bytes;
        let mut image = DiskImage::new(bytes);
        recover::initialize(&mut image, &superblock, false).expect("an image takes what fits");
        image
    }

    /// A daemon on these disks, watched from its first event on.
    pub(super) fn boot(&mut self, images: Vec<DiskImage>) {
        self.forget_queue();
        (self.now_us, self.clients_live) = (0, false);
        (self.asked, self.heard, self.held) = Default::default();
        self.incarnations.clear();
        self.prepared_for.clear();
        self.committed_in_place.clear();
        self.durable_before.clear();
        (self.watchers, self.announced) = Default::default();
        self.groups.iter_mut().for_each(|group| group.members.clear());
        self.groups.iter_mut().for_each(|group| group.formers.clear());
        (0..self.arena.segment_count()).for_each(|segment| self.arena.zero(segment));
        self.records = CutWords::new(Self::geometry(&self.scenario.core).table_bytes());
        self.new_core();
        let durable = self.oracle.restarted();
        let (mut files, mut sound) = (Vec::new(), Vec::new());
        for (image, file) in images.into_iter().zip(0u32..) {
            let (found, image) = self.recover_file(image, file);
            files.push(found);
            sound.push(image);
        }
        for warning in self.core.recover(files) {
            self.trace.note(format_args!("recovery: {warning}"));
        }
        Self::within_quotas(&self.core.status());
        for image in sound {
            let (seed, arena) = (self.random.next(), Arc::clone(&self.arena));
            // What survived is read back before anything may go wrong again.
            let device = SimulatedDisk::new(seed, image, Arc::clone(&arena), Faults::default());
            self.disks.push(Disk { device, in_flight: InFlight::new(arena) });
        }
        self.schedule(0, Due::Tick);
        self.attach_watchers();
        self.step(Event::Tick);
        self.core.check();
        if !self.scenario.lossy {
            self.read_back(durable);
        }
        let faults = self.scenario.faults;
        self.disks.iter_mut().for_each(|disk| disk.device.set_faults(faults));
    }

    pub(super) fn recover_file(&self, image: DiskImage, file: u32) -> (RecoveredFile, DiskImage) {
        let disk = self.scenario.core.disk.as_ref().expect("there is a file");
        let superblock = match recover::superblock(&image) {
            Ok(Some(superblock)) => superblock,
            // A misplaced write may hit both copies.
            Ok(None) | Err(_) if self.scenario.lossy => {
                return (RecoveredFile::default(), Self::blank_image(disk, file));
            }
            lost => panic!("a crash cost the superblock: {lost:?}"),
        };
        assert_eq!(superblock, Self::superblock(disk, file), "a superblock is read as it was written");
        let mut found = RecoveredFile::default();
        let counter = recover::directories(&image, &superblock, |segment| found.segments.push(segment));
        found.counter = counter.expect("an image can be read");
        (found, image)
    }

    pub(super) fn attach_watchers(&mut self) {
        for tenant in (0..self.scenario.core.tenants.len() as u16).map(TenantId) {
            let space = self.scenario.spaces.iter().position(|space| space.tenants == [tenant]);
            let attachment = self.attach_own(tenant, space.expect("each tenant has a namespace of its own"));
            self.watchers.push((attachment, 0));
        }
        while let Some(tenant) = self.tenant_with_news() {
            self.watch(tenant);
        }
    }

    fn attach_own(&mut self, tenant: TenantId, space: usize) -> AttachmentId {
        let (attachment, verb) = self.attach_verb(space, &format!("world-{space}"));
        let reply = self.ask_and_wait(tenant, self.now_ms(), verb);
        assert!(matches!(reply, Reply::Attached(_)), "attached: {reply:?}");
        attachment
    }

    /// Every block that was acknowledged as durable is there, and is what was put.
    fn read_back(&mut self, durable: Vec<Block>) {
        // What was evicted before the crash may be found again, and something goes for it where there is a quota.
        let mut evicted = self.core.counters().evicted_disk;
        for block in durable {
            let Space { tenants, keys, .. } = &self.scenario.spaces[block.space];
            let (tenant, key) = (tenants[0], keys[block.at]);
            if !self.oracle.is_present(block, Place::Disk) {
                let has_quota = self.scenario.core.tenants[tenant.0 as usize].disk_quota_bytes.is_some();
                assert!(has_quota && evicted > 0, "{block:?} was durable and did not survive the crash");
                evicted -= 1;
                continue;
            }
            let attachment = self.attach_own(tenant, block.space);
            self.read_one(tenant, attachment, block, key);
            self.ask(tenant, self.now_ms(), Verb::Detach(attachment), Question::Any);
            self.summary.survived_blocks += 1;
        }
    }

    fn read_one(&mut self, tenant: TenantId, attachment: AttachmentId, block: Block, key: BlockKey) {
        for _ in 0..100 {
            let verb = Verb::Acquire { attachment, keys: vec![key], bytes_max: u64::MAX, door: Door::Stream };
            let reply = self.ask_and_wait(tenant, self.now_ms() + 10_000, verb);
            let Reply::Acquired(acquired) = reply else { panic!("not an answer to an acquire: {reply:?}") };
            match acquired.end {
                None => {
                    self.acquired(tenant, self.summary.steps, None, (block.space, &[block.at]), &acquired);
                    return self.pass(30_000);
                }
                // Host memory is being prepared, or full of what was read before.
                Some(AcquireEnd::Shed) => self.pass(20_000),
                Some(end) => panic!("{block:?} was durable and cannot be read after the crash: {end:?}"),
            }
        }
        let quota = self.scenario.core.tenants[tenant.0 as usize].host_quota_bytes;
        assert!(quota.is_some(), "{block:?} cannot be loaded: there is never room in {:?}", self.core.status().host);
    }

    /// Asked to stop on sound disks, the daemon writes back and flushes what it has; then it does not matter how it ends.
    fn stop(&mut self) {
        self.clients_live = false;
        self.disks.iter_mut().for_each(|disk| disk.device.set_faults(Faults::default()));
        self.pass(LONG_MS * 1000);
        self.drain();
        let CoreConfig { tenants, disk, write_bytes_per_day, .. } = &self.scenario.core;
        let is_bounded =
            write_bytes_per_day.is_some() || tenants.iter().any(|tenant| tenant.disk_quota_bytes.is_some());
        // A disk that had to evict may have no slot of the right size.
        if disk.is_some() && !is_bounded && self.core.counters().evicted_disk == 0 {
            let left = self.oracle.present().into_iter().filter(|(_, place)| *place == Place::Host);
            let left: Vec<Block> = left.map(|(block, _)| block).collect();
            for block in left {
                assert!(self.oracle.is_present(block, Place::Disk), "{block:?} was not written back at the end");
                // What was found after an earlier crash and never read may be torn.
                self.oracle.acknowledged(block);
            }
        }
    }

    /// The daemon dies, alone or with the machine's power, and comes back.
    pub(super) fn crash(&mut self) {
        self.records.restart();
        if self.dying.is_empty() && self.random.happens(100) {
            self.stop();
        }
        let mut disks = std::mem::take(&mut self.disks);
        disks.append(&mut self.dying);
        let power_cut = self.random.happens(600);
        self.trace.note(format_args!("{} us: {}", self.now_us, if power_cut { "power cut" } else { "killed" }));
        self.summary.power_cuts += u64::from(power_cut);
        self.summary.kills += u64::from(!power_cut);
        self.count_time();
        let images =
            disks.into_iter().map(|Disk { device, .. }| if power_cut { device.crash() } else { device.kill() });
        let images = images.collect();
        self.boot(images);
    }

    pub(super) fn count_time(&mut self) {
        self.summary.simulated_ms += self.now_ms();
        let counters = self.core.counters();
        self.summary.evicted_copies += counters.evicted_host + counters.evicted_disk;
        self.summary.sum_mismatches += counters.sum_mismatches;
    }

    /// Clients end what they began, disks work again, everything is purged: nothing may be left over.
    pub(super) fn end(&mut self) {
        self.records.restart();
        self.formers_die();
        self.disks.iter_mut().for_each(|disk| disk.device.set_faults(Faults::default()));
        self.pass(LONG_MS * 1000);
        assert!(self.asked.is_empty(), "never answered: {:?}", self.asked);
        assert!(self.core.is_idle(), "nothing is asked, but the core is busy");
        assert!(self.held.is_empty(), "the world's own books: {:?}", self.held);
        self.compare_snapshot();
        self.core.check();
        for space in 0..self.scenario.spaces.len() {
            let tenant = self.scenario.spaces[space].tenants[0];
            let attachment = self.attach_own(tenant, space);
            let verb = Verb::Purge(attachment, PurgeWhat::Namespace);
            let reply = self.ask_and_wait(tenant, self.now_ms() + LONG_MS, verb);
            assert!(matches!(reply, Reply::Purged { .. }), "purged: {reply:?}");
        }
        assert_eq!(self.oracle.present(), [], "present after everything was purged");
        let status = self.core.status();
        let disk = status.disk.as_ref().map_or(0, |(tier, _)| tier.usage.used_slots);
        assert_eq!(
            (status.host.usage.used_slots, status.ingest.used_slots, disk),
            (0, 0, 0),
            "slots leaked: {status:?}"
        );
        self.drain();
        self.core.check();
        self.count_time();
    }

    fn drain(&mut self) {
        let reply = self.ask_and_wait(TenantId(0), self.now_ms() + LONG_MS, Verb::Drain);
        assert!(matches!(reply, Reply::Done), "drained: {reply:?}");
    }
}
