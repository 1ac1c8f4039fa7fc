//! Rings of clients that keep to no rule: they are answered or cut off, and nobody else notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tender_client::proto::door::Verb;
use tender_client::proto::ring::{ENTRY_BYTES, FRAME_BYTES, FRAMES, STATUS_MALFORMED};
use tender_client::proto::sum::mix;
use tokio::task::JoinHandle;

use crate::memory::Memory;
use crate::raw::Raw;
use crate::support::blocks::Run;
use crate::support::site::Site;
use crate::support::wait_until;
use crate::{LARGE, SMALL, attach_as, client, site};

// As drawn in `proto/src/ring.rs`.
const SUBMISSION_TAIL: u64 = 4096;
const COMPLETION_TAIL: u64 = 4352;
const COMPLETION_HEAD: u64 = 4480;
const SUBMISSIONS: u64 = 8192;
const COMPLETIONS: u64 = 10_240;
const FRAMES_START: u64 = 12_288;

/// Writes a ring by hand.
struct Forger {
    raw: Raw,
    ring: Memory,
    tail: u32,
    head: u32,
}

/// An entry.
#[derive(Clone, Copy)]
struct Forged {
    user_data: u64,
    verb: u16,
    frame: u16,
    bytes: u32,
    deadline_ms: u32,
    attachment: u64,
}

impl Forger {
    async fn open(site: &Site) -> Self {
        let raw = Raw::open(&site.socket(), None, &attach_as("forger", "model", LARGE)).await;
        let ring = raw.ring_memory();
        Self { raw, ring, tail: 0, head: 0 }
    }

    fn entry(&self, user_data: u64) -> Forged {
        let attachment = self.raw.attachment;
        Forged { user_data, verb: Verb::Lookup.number(), frame: 0, bytes: 4, deadline_ms: 0, attachment }
    }

    fn set(&self, counter: u64, value: u32) {
        self.ring.write(counter, &value.to_le_bytes());
        self.raw.ring_doorbell();
    }

    fn frame(&self, frame: u16, bytes: &[u8]) {
        self.ring.write(FRAMES_START + u64::from(frame) * FRAME_BYTES as u64, bytes);
    }

    fn submit(&mut self, forged: Forged) {
        let Forged { user_data, verb, frame, bytes, deadline_ms, attachment } = forged;
        let mut entry = [0xa5; ENTRY_BYTES];
        entry[..8].copy_from_slice(&user_data.to_le_bytes());
        entry[8..10].copy_from_slice(&verb.to_le_bytes());
        entry[10..12].copy_from_slice(&frame.to_le_bytes());
        entry[12..16].copy_from_slice(&bytes.to_le_bytes());
        entry[16..20].copy_from_slice(&deadline_ms.to_le_bytes());
        entry[24..32].copy_from_slice(&attachment.to_le_bytes());
        self.ring.write(SUBMISSIONS + u64::from(self.tail % FRAMES as u32) * ENTRY_BYTES as u64, &entry);
        self.tail = self.tail.wrapping_add(1);
        self.set(SUBMISSION_TAIL, self.tail);
    }

    fn answered(&self) -> u32 {
        let tail = self.ring.read(COMPLETION_TAIL, 4);
        u32::from_le_bytes(tail.try_into().unwrap()).wrapping_sub(self.head)
    }

    /// Waits for the next answer: whose, and its status.
    fn reap(&mut self) -> (u64, u16) {
        wait_until("an answer to a forged entry", || self.answered() > 0);
        let entry = self.ring.read(COMPLETIONS + u64::from(self.head % FRAMES as u32) * ENTRY_BYTES as u64, 10);
        self.head = self.head.wrapping_add(1);
        self.set(COMPLETION_HEAD, self.head);
        (u64::from_le_bytes(entry[..8].try_into().unwrap()), u16::from_le_bytes(entry[8..].try_into().unwrap()))
    }
}

/// Somebody who keeps to the rules, and puts and gets all the time.
struct Honest {
    rounds: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Honest {
    async fn start(site: &Site, is_other: bool, block_bytes: u64) -> Self {
        let store = client(site, is_other, attach_as("honest", "honest", block_bytes)).await;
        let (rounds, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, ends) = (Arc::clone(&rounds), Arc::clone(&is_over));
        let task = tokio::spawn(async move {
            for seed in 0.. {
                if ends.load(Ordering::Relaxed) {
                    return;
                }
                let run = Run::new(&store, seed, 4);
                run.put(&store).await;
                run.expect(&store, None).await;
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        Self { rounds, is_over, task }
    }

    /// Insists that it comes on.
    fn comes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_until("another client's next put and get", || {
            assert!(!self.task.is_finished(), "another client has failed");
            self.rounds.load(Ordering::Relaxed) > before + 2
        });
    }

    async fn end(self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn forged_entries_are_answered_and_others_go_on() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let honest = [Honest::start(&site, false, LARGE).await, Honest::start(&site, true, SMALL).await];
    let mut forger = Forger::open(&site).await;
    let good = forger.entry(0);
    let forged = [
        Forged { verb: 0, ..good },
        Forged { verb: 999, ..good },
        Forged { frame: FRAMES as u16, ..good },
        Forged { frame: u16::MAX, ..good },
        Forged { bytes: FRAME_BYTES as u32 + 1, ..good },
        Forged { bytes: u32::MAX, ..good },
        Forged { bytes: 0, ..good },
        Forged { bytes: 3, ..good },
        Forged { deadline_ms: u32::MAX, ..good },
    ];
    for (user_data, forged) in (1..).zip(forged) {
        forger.submit(Forged { user_data, ..forged });
        assert_eq!(forger.reap(), (user_data, STATUS_MALFORMED));
    }
    let unattached = tender_client::proto::door::Status::Unattached.number();
    for attachment in [0, good.attachment ^ 1, u64::MAX] {
        forger.frame(0, &[0; 4]);
        forger.submit(Forged { user_data: 99, attachment, ..good });
        assert_eq!(forger.reap(), (99, unattached));
    }
    // Whatever stands in a frame.
    let mut state = 7;
    for user_data in 1000..1400u64 {
        let words = (0..512u64).flat_map(|word| mix(state + word).to_le_bytes());
        let mut garbage: Vec<u8> = words.collect();
        if user_data % 2 == 0 {
            // A count that could be meant.
            garbage[..4].copy_from_slice(&((mix(state) % 200) as u32).to_le_bytes());
        }
        state = mix(state);
        let (verb, frame) = ((state % 12) as u16, (state >> 8) as u16 % FRAMES as u16);
        forger.frame(frame, &garbage);
        let bytes = (state >> 16) as u32 % 4096;
        forger.submit(Forged { user_data, verb, frame, bytes, deadline_ms: 50, ..good });
        assert_eq!(forger.reap().0, user_data);
    }
    honest.iter().for_each(Honest::comes_on);
    for honest in honest {
        honest.end().await;
    }
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn who_takes_no_answers_waits_alone_and_is_served_when_it_does() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let honest = Honest::start(&site, true, SMALL).await;
    let mut forger = Forger::open(&site).await;
    let good = forger.entry(0);
    for user_data in 0..FRAMES as u64 {
        forger.frame(user_data as u16, &[0; 4]);
        forger.submit(Forged { user_data, frame: user_data as u16, ..good });
    }
    wait_until("answers", || forger.answered() == FRAMES as u32);
    // There is no room for the answers to these.
    for user_data in 100..132 {
        forger.submit(Forged { user_data, ..good });
    }
    honest.comes_on();
    assert_eq!(forger.answered(), FRAMES as u32);
    let mut answered: Vec<u64> = (0..2 * FRAMES).map(|_| forger.reap().0).collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..FRAMES as u64).chain(100..132).collect::<Vec<_>>());
    honest.end().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn who_breaks_a_counter_is_cut_off_alone() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let honest = [Honest::start(&site, false, LARGE).await, Honest::start(&site, true, SMALL).await];
    let wild = [FRAMES as u32 + 8, 1 << 31, u32::MAX];
    for (counter, value) in wild.into_iter().flat_map(|value| [(SUBMISSION_TAIL, value), (COMPLETION_HEAD, value)]) {
        let mut forger = Forger::open(&site).await;
        forger.submit(forger.entry(1));
        forger.reap();
        forger.set(counter, value);
        if counter == COMPLETION_HEAD {
            // It is looked at when something is asked.
            forger.submit(forger.entry(2));
        }
        forger.raw.socket.expect_end();
        honest.iter().for_each(Honest::comes_on);
    }
    for honest in honest {
        honest.end().await;
    }
    daemon.stop();
}
