use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{hint, thread};

use memmap2::{MmapOptions, MmapRaw};
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::sum::{GOLDEN, mix};

// SAFETY: a mapping stays where it is until it is dropped; the files of these tests are never cut, and nothing here touches them but
// through `shared` and, in one test, by reading the file.
unsafe impl Mapping for MmapRaw {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.as_mut_ptr()).expect("mapped")
    }

    fn bytes(&self) -> usize {
        self.len()
    }
}

/// A mapping that claims to be another one, in part.
struct Piece {
    whole: MmapRaw,
    from: usize,
    bytes: usize,
}

// SAFETY: as for the whole, of which it is a part.
unsafe impl Mapping for Piece {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.whole.as_mut_ptr().wrapping_add(self.from)).expect("mapped")
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A ring's file: each mapping of it is at another address, as in another process.
struct Memory(File);

impl Memory {
    fn new() -> Self {
        let file = memfd_create(c"ring", MemfdFlags::CLOEXEC).expect("a file in memory");
        ftruncate(&file, RING_BYTES as u64).expect("room for a ring");
        Self(file.into())
    }

    fn map(&self) -> MmapRaw {
        MmapOptions::new().len(RING_BYTES).map_raw(&self.0).expect("mapped")
    }

    fn bytes<const BYTES: usize>(&self, offset: usize) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        self.0.read_exact_at(&mut bytes, offset as u64).expect("within the file");
        bytes
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }
}

type Daemon = DaemonRing<MmapRaw>;
type Client = ClientRing<MmapRaw>;

/// Both sides, and a third mapping for whoever does not keep to the rules.
fn rings() -> (Daemon, Client, MmapRaw) {
    let memory = Memory::new();
    let daemon = DaemonRing::format(memory.map()).expect("a ring");
    let client = ClientRing::open(memory.map()).expect("a ring");
    (daemon, client, memory.map())
}

/// As if that many requests had gone through already.
fn rings_after(requests: u32) -> (Daemon, Client, MmapRaw) {
    let (mut daemon, mut client, other) = rings();
    let Counters { submission_tail, submission_head, completion_tail, completion_head, .. } = &shared(&other).counters;
    for counter in [submission_tail, submission_head, completion_tail, completion_head] {
        counter.0.store(requests, Relaxed);
    }
    (daemon.submission_head, daemon.completion_tail, daemon.completion_head_seen) = (requests, requests, requests);
    (client.submission_tail, client.completion_head) = (requests, requests);
    (daemon, client, other)
}

/// Tests of two threads run one by one, so that on two processors their threads meet.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ask(user_data: u64) -> Submission {
    Submission { user_data, verb: 7, deadline_ms: 1_000, attachment: 99 }
}

/// Bytes without a pattern.
fn random_bytes(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| mix(mix(seed).wrapping_add(i.wrapping_mul(GOLDEN))) as u8).collect()
}

fn taken(daemon: &mut Daemon, request: &mut Vec<u8>) -> Taken {
    daemon.take(request).expect("a request").expect("one within the rules")
}

/// Writes a submission as a client without this module might.
fn submit_raw(other: &MmapRaw, user_data: u64, frame: u16, request_bytes: u32) {
    let tail = shared(other).counters.submission_tail.0.load(Relaxed);
    write_entry(&shared(other).submissions[slot(tail)], &[user_data, join_head(7, frame, request_bytes), 0, 0]);
    shared(other).counters.submission_tail.0.store(tail.wrapping_add(1), Release);
}

/// Writes a completion as a daemon without this module might.
fn complete_raw(other: &MmapRaw, user_data: u64, frame: u16, reply_bytes: u32) {
    let tail = shared(other).counters.completion_tail.0.load(Relaxed);
    write_entry(&shared(other).completions[slot(tail)], &[user_data, join_head(1, frame, reply_bytes)]);
    shared(other).counters.completion_tail.0.store(tail.wrapping_add(1), Release);
}

#[test]
fn bytes_stand_where_they_are_drawn() {
    let memory = Memory::new();
    let mut daemon = DaemonRing::format(memory.map()).unwrap();
    let mut client = ClientRing::open(memory.map()).unwrap();
    assert_eq!(&memory.bytes::<8>(0), b"TNDRRING");
    let header = [8, 12, 16, 20, 24, 28].map(|offset| memory.u32_at(offset));
    assert_eq!(header, [1, 32, 64, 64, 65_536, 2_109_440]);

    let submission = |user_data| Submission { user_data, verb: 0x0102, deadline_ms: 0x0304_0506, attachment: 0x0708 };
    client.submit(submission(1), b"a").unwrap();
    client.submit(submission(0xaabb), b"request").unwrap();
    assert_eq!(memory.u32_at(4096), 2, "submission tail");
    let entry = [
        &0xaabbu64.to_le_bytes()[..],
        &0x0102u16.to_le_bytes(),
        &1u16.to_le_bytes(),
        &7u32.to_le_bytes(),
        &0x0304_0506u32.to_le_bytes(),
        &[0; 4],
        &0x0708u64.to_le_bytes(),
        &[0; 32],
    ];
    assert_eq!(memory.bytes::<64>(8192 + 64)[..], entry.concat());
    assert_eq!(memory.bytes::<9>(12_288 + 65_536), *b"request\0\0");

    let mut request = Vec::new();
    let first = taken(&mut daemon, &mut request);
    let second = taken(&mut daemon, &mut request);
    assert_eq!(memory.u32_at(4096 + 128), 2, "submission head");
    daemon.complete(first.ticket, 5, b"");
    daemon.complete(second.ticket, 0x0a0b, b"the reply");
    assert_eq!(memory.u32_at(4096 + 256), 2, "completion tail");
    let entry =
        [&0xaabbu64.to_le_bytes()[..], &0x0a0bu16.to_le_bytes(), &1u16.to_le_bytes(), &9u32.to_le_bytes(), &[0; 48]];
    assert_eq!(memory.bytes::<64>(10_240 + 64)[..], entry.concat());
    assert_eq!(memory.bytes::<10>(12_288 + 65_536), *b"the reply\0");

    client.reap(&mut request).unwrap().unwrap();
    assert_eq!(memory.u32_at(4096 + 384), 1, "completion head");
    assert!(daemon.prepare_to_sleep());
    assert_eq!(memory.u32_at(4096 + 512), 1, "daemon sleeps");
    client.reap(&mut request).unwrap().unwrap();
    assert!(client.prepare_to_sleep());
    assert_eq!(memory.u32_at(4096 + 640), 1, "client sleeps");
    daemon.close();
    assert_eq!(memory.u32_at(4096 + 768), 1, "closing");
}

#[test]
fn what_is_no_ring_is_refused_with_the_cure() {
    let piece = |from, bytes| Piece { whole: Memory::new().map(), from, bytes };
    let error = DaemonRing::format(piece(0, RING_BYTES - 1)).err().unwrap();
    assert_eq!(error, RingError::Bytes { bytes: RING_BYTES - 1 });
    assert!(error.to_string().contains("map the whole file"), "{error}");
    assert_eq!(ClientRing::open(piece(0, 0)).err(), Some(RingError::Bytes { bytes: 0 }));
    for past in [1, 64, 2048] {
        // It claims more than there is, and is found out before anything is touched.
        let error = DaemonRing::format(piece(past, RING_BYTES)).err().unwrap();
        assert_eq!(error, RingError::Misaligned { past });
        assert_eq!(ClientRing::open(piece(past, RING_BYTES)).err(), Some(error));
    }

    let refused = |spoil: &dyn Fn(&Shared)| {
        let memory = Memory::new();
        let _daemon = DaemonRing::format(memory.map()).unwrap();
        spoil(shared(&memory.map()));
        ClientRing::open(memory.map()).err().expect("no ring for this client")
    };
    let fresh = ClientRing::open(Memory::new().map()).err().expect("not laid out yet");
    assert_eq!(fresh, RingError::Magic { found: 0 });
    assert!(fresh.to_string().contains("0x0000000000000000, but that of a ring is 0x474e495252444e54"), "{fresh}");
    assert_eq!(refused(&|shared| shared.header.magic.store(MAGIC ^ 1, Relaxed)), RingError::Magic { found: MAGIC ^ 1 });
    let error = refused(&|shared| shared.header.abi.store(2, Relaxed));
    assert_eq!(error, RingError::Abi { found: 2 });
    assert!(error.to_string().contains("up to date"), "{error}");
    for at in 0..5 {
        let error = refused(&|shared| {
            geometry(&shared.header)[at].1.fetch_add(1, Relaxed);
        });
        let (field, _, expected) = geometry(&shared(&Memory::new().map()).header)[at];
        assert_eq!(error, RingError::Geometry { field, found: expected + 1, expected });
    }
    let used: [fn(&Counters) -> &Line; 4] =
        [|c| &c.submission_tail, |c| &c.submission_head, |c| &c.completion_tail, |c| &c.completion_head];
    for counter in used {
        let error = refused(&|shared| counter(&shared.counters).0.store(3, Relaxed));
        assert!(matches!(error, RingError::Used { found: 3, .. }), "{error}");
    }
}

#[test]
fn a_ring_is_laid_out_anew_over_whatever_was_there() {
    let memory = Memory::new();
    let map = memory.map();
    for word in shared(&map).submissions.iter().chain(&shared(&map).completions).flatten() {
        word.store(u64::MAX, Relaxed);
    }
    let Counters { submission_tail, completion_head, client_sleeps, closing, .. } = &shared(&map).counters;
    for counter in [submission_tail, completion_head, client_sleeps, closing] {
        counter.0.store(77, Relaxed);
    }
    let mut daemon = DaemonRing::format(memory.map()).unwrap();
    let mut client = ClientRing::open(memory.map()).unwrap();
    assert!(!daemon.client_sleeps() && !client.is_closing());
    assert_eq!(daemon.take(&mut Vec::new()), None);
    assert_eq!(client.reap(&mut Vec::new()), None);
}

#[test]
fn each_side_may_change_threads_and_none_may_be_shared() {
    trait Answer<Marker> {
        const SHARED: bool = false;
    }
    struct AnyCase;
    impl<T: ?Sized> Answer<()> for T {}
    impl<T: ?Sized + Sync> Answer<AnyCase> for T {}
    // Ambiguous, and so no program, for a type that is `Sync`.
    const { assert!(!<Daemon as Answer<_>>::SHARED && !<Client as Answer<_>>::SHARED) };
    fn may_move<T: Send>() {}
    may_move::<Daemon>();
    may_move::<Client>();
}

#[test]
fn frames_run_out_before_anything_else() {
    let (mut daemon, mut client, _) = rings();
    let (mut request, mut reply) = (Vec::new(), Vec::new());
    for user_data in 0..FRAMES as u64 {
        client.submit(ask(user_data), &[]).unwrap();
    }
    assert_eq!(client.submit(ask(32), &[]), Err(SubmitError::Full));
    let mut held: Vec<Ticket> = (0..FRAMES).map(|_| taken(&mut daemon, &mut request).ticket).collect();
    assert_eq!(daemon.take(&mut request), None);
    assert_eq!(client.submit(ask(32), &[]), Err(SubmitError::Full), "taken is not completed");
    daemon.complete(held.remove(20), 1, &[]);
    assert_eq!(client.submit(ask(32), &[]), Err(SubmitError::Full), "completed is not reaped");
    assert_eq!(client.reap(&mut reply), Some(Ok(Completion { user_data: 20, status: 1 })));
    client.submit(ask(32), &[]).unwrap();
    assert_eq!((client.in_flight(), daemon.in_flight()), (FRAMES, FRAMES - 1));
    assert_eq!(taken(&mut daemon, &mut request).submission, ask(32));
}

#[test]
fn what_does_not_fit_into_a_frame_is_not_submitted() {
    let (mut daemon, mut client, _) = rings();
    let mut request = Vec::new();
    let bytes = FRAME_BYTES + 1;
    assert_eq!(client.submit(ask(1), &vec![1; bytes]), Err(SubmitError::Length { bytes }));
    assert_eq!((client.in_flight(), daemon.take(&mut request)), (0, None));
    let whole = random_bytes(1, FRAME_BYTES);
    client.submit(ask(1), &whole).unwrap();
    let Taken { ticket, .. } = taken(&mut daemon, &mut request);
    assert!(request == whole);
    daemon.complete(ticket, 1, &whole);
    let mut reply = Vec::new();
    client.reap(&mut reply).unwrap().unwrap();
    assert!(reply == whole);
}

#[test]
#[should_panic(expected = "does not fit into a frame")]
fn a_reply_larger_than_a_frame_is_a_broken_invariant() {
    let (mut daemon, mut client, _) = rings();
    client.submit(ask(1), &[]).unwrap();
    let Taken { ticket, .. } = taken(&mut daemon, &mut Vec::new());
    daemon.complete(ticket, 1, &vec![0; FRAME_BYTES + 1]);
}

#[test]
#[should_panic(expected = "the ticket is another ring's")]
fn a_ticket_of_another_ring_is_a_broken_invariant() {
    let (mut daemon, mut client, _) = rings();
    client.submit(ask(1), &[]).unwrap();
    let Taken { ticket, .. } = taken(&mut daemon, &mut Vec::new());
    rings().0.complete(ticket, 1, &[]);
}

#[test]
fn an_entry_that_breaks_a_rule_is_answered_and_the_next_one_served() {
    let (mut daemon, mut client, other) = rings_after(u32::MAX - 1);
    let mut bytes = Vec::new();
    client.submit(ask(1), b"held").unwrap();
    let held = taken(&mut daemon, &mut bytes);
    // In frame 0, which is in flight, in one that does not exist, and with more bytes than a frame has.
    submit_raw(&other, 2, 0, 0);
    submit_raw(&other, 3, FRAMES as u16, 0);
    submit_raw(&other, 4, u16::MAX, 0);
    submit_raw(&other, 5, 9, FRAME_BYTES as u32 + 1);
    submit_raw(&other, 6, 9, FRAME_BYTES as u32);
    let broken: Vec<Hostile> = (0..4).map(|_| daemon.take(&mut bytes).unwrap().unwrap_err()).collect();
    assert_eq!(broken[0], Hostile::InFlight { frame: 0 });
    assert_eq!(broken[1], Hostile::Range { field: "frame", value: 32, max: 31 });
    assert_eq!(broken[2], Hostile::Range { field: "frame", value: 65_535, max: 31 });
    assert_eq!(broken[3], Hostile::Range { field: "request_bytes", value: 65_537, max: 65_536 });
    assert_eq!(broken[3].to_string(), "request_bytes is 65537, but must be 0 to 65536");
    assert!(!daemon.is_broken());
    let served = taken(&mut daemon, &mut bytes);
    assert_eq!((served.submission.user_data, bytes.len(), daemon.in_flight()), (6, FRAME_BYTES, 2));
    daemon.complete(served.ticket, 1, &[]);
    daemon.complete(held.ticket, 1, b"of the first");

    let completions: Vec<(u64, u16, u16, u32)> = (0..6)
        .map(|i| {
            let entry = &shared(&other).completions[slot((u32::MAX - 1).wrapping_add(i))];
            let (status, frame, reply_bytes) = split_head(entry[1].load(Relaxed));
            (entry[0].load(Relaxed), status, frame, reply_bytes)
        })
        .collect();
    let without = |user_data| (user_data, STATUS_MALFORMED, NO_FRAME, 0);
    assert_eq!(completions[..3], [without(2), without(3), without(4)]);
    assert_eq!(completions[3], (5, STATUS_MALFORMED, 9, broken[3].to_string().len() as u32));
    assert_eq!(completions[4..], [(6, 1, 9, 0), (1, 1, 0, 12)]);
    copy_out(&shared(&other).frames[9], completions[3].3 as usize, &mut bytes);
    assert_eq!(bytes, broken[3].to_string().as_bytes());
}

#[test]
fn a_counter_that_breaks_a_rule_ends_the_ring() {
    let start = u32::MAX - 7;
    for wrong in [start.wrapping_add(33), start.wrapping_sub(1), start.wrapping_add(1 << 31)] {
        let (mut daemon, mut client, other) = rings_after(start);
        shared(&other).counters.submission_tail.0.store(wrong, Relaxed);
        assert!(!daemon.prepare_to_sleep(), "there is something to report");
        let hostile = daemon.take(&mut Vec::new()).unwrap().unwrap_err();
        assert_eq!(
            hostile,
            Hostile::Counter { field: "submission_tail", value: wrong, from: start, ahead_max: FRAMES as u32 }
        );
        assert!(daemon.is_broken() && daemon.take(&mut Vec::new()).is_none(), "said once");
        assert!(daemon.prepare_to_sleep(), "and nothing to stay awake for");

        shared(&other).counters.completion_tail.0.store(wrong, Relaxed);
        assert!(!client.prepare_to_sleep());
        let hostile = client.reap(&mut Vec::new()).unwrap().unwrap_err();
        assert!(matches!(hostile, Hostile::Counter { field: "completion_tail", value, .. } if value == wrong));
        // A counter that is right again makes nothing good.
        for tail in [&shared(&other).counters.submission_tail, &shared(&other).counters.completion_tail] {
            tail.0.store(start.wrapping_add(1), Relaxed);
        }
        assert!(daemon.take(&mut Vec::new()).is_none());
        assert!(client.is_broken() && client.reap(&mut Vec::new()).is_none());
        shared(&other).counters.completion_tail.0.store(start, Relaxed);
        assert!(!client.prepare_to_sleep(), "nobody would wake it");
        assert_eq!(client.submit(ask(1), &[]), Err(SubmitError::Broken));
    }
    // 32 are allowed: whatever their entries say.
    let (mut daemon, _, other) = rings_after(start);
    shared(&other).counters.submission_tail.0.store(start.wrapping_add(32), Relaxed);
    assert!(daemon.take(&mut Vec::new()).is_some() && !daemon.is_broken());
}

#[test]
fn a_completion_head_that_goes_back_or_ahead_ends_the_ring() {
    for wrong in [6u32, 3, u32::MAX] {
        let (mut daemon, mut client, other) = rings();
        let mut bytes = Vec::new();
        for user_data in 0..5 {
            client.submit(ask(user_data), &[]).unwrap();
            let Taken { ticket, .. } = taken(&mut daemon, &mut bytes);
            daemon.complete(ticket, 1, &[]);
        }
        for _ in 0..4 {
            client.reap(&mut bytes).unwrap().unwrap();
        }
        assert!(daemon.has_room());
        shared(&other).counters.completion_head.0.store(wrong, Relaxed);
        client.submit(ask(9), &[]).unwrap();
        assert!(!daemon.has_room());
        let hostile = daemon.take(&mut bytes).unwrap().unwrap_err();
        assert_eq!(hostile, Hostile::Counter { field: "completion_head", value: wrong, from: 4, ahead_max: 1 });
        assert!(daemon.is_broken());
    }
}

#[test]
fn a_client_that_leaves_no_room_for_completions_is_parked_until_it_does() {
    let (mut daemon, _, other) = rings();
    let mut bytes = Vec::new();
    for user_data in 0..31 {
        submit_raw(&other, user_data, 3, 0);
        let Taken { ticket, .. } = taken(&mut daemon, &mut bytes);
        daemon.complete(ticket, 1, &[]);
    }
    submit_raw(&other, 31, 3, 0);
    submit_raw(&other, 32, 4, 0);
    assert!(daemon.has_room());
    let last = taken(&mut daemon, &mut bytes);
    assert!(!daemon.has_room(), "what is taken has its entry set aside");
    assert_eq!(daemon.take(&mut bytes), None);
    daemon.complete(last.ticket, 1, &[]);
    assert_eq!(daemon.take(&mut bytes), None);
    assert!(daemon.prepare_to_sleep(), "a parked client keeps nobody awake");
    assert_eq!(shared(&other).completions[0][0].load(Relaxed), 0, "no completion was written over");
    shared(&other).counters.completion_head.0.store(1, Release);
    assert!(!daemon.prepare_to_sleep());
    assert_eq!(taken(&mut daemon, &mut bytes).submission.user_data, 32);
}

#[test]
fn what_a_daemon_wrote_here_is_not_believed_by_it() {
    let (mut daemon, mut client, other) = rings();
    let (mut request, mut reply) = (Vec::new(), Vec::new());
    for user_data in 0..100 {
        let Shared { header, counters, .. } = shared(&other);
        header.magic.store(user_data, Relaxed);
        for (_, field, _) in geometry(header) {
            field.store(user_data as u32 * 77, Relaxed);
        }
        counters.submission_head.0.store(12_345, Relaxed);
        counters.daemon_sleeps.0.store(9, Relaxed);
        client.submit(ask(user_data), b"question").unwrap();
        assert!(client.daemon_sleeps(), "any number but 0 is a flag that is set");
        let Taken { submission, ticket } = taken(&mut daemon, &mut request);
        assert_eq!((submission, &request[..]), (ask(user_data), &b"question"[..]));
        shared(&other).counters.completion_tail.0.store(54_321, Relaxed);
        daemon.complete(ticket, 1, b"answer");
        assert_eq!(client.reap(&mut reply), Some(Ok(Completion { user_data, status: 1 })));
        assert_eq!(reply, b"answer");
    }
}

#[test]
fn a_completion_that_breaks_a_rule_frees_no_frame() {
    let wrong: [(u64, u16, u32, Hostile); 5] = [
        (7, 1, 0, Hostile::NotInFlight { frame: 1, user_data: 7 }),
        (8, 0, 0, Hostile::NotInFlight { frame: 0, user_data: 8 }),
        (7, 32, 0, Hostile::NotInFlight { frame: 32, user_data: 7 }),
        (7, u16::MAX, 0, Hostile::NotInFlight { frame: u16::MAX, user_data: 7 }),
        (7, 0, 65_537, Hostile::Range { field: "reply_bytes", value: 65_537, max: 65_536 }),
    ];
    for (user_data, frame, reply_bytes, hostile) in wrong {
        let (_, mut client, other) = rings();
        let mut reply = Vec::new();
        client.submit(ask(7), &[]).unwrap();
        complete_raw(&other, user_data, frame, reply_bytes);
        assert_eq!(client.reap(&mut reply), Some(Err(hostile)));
        assert_eq!(client.in_flight(), 1);
        // The right one still comes through; once.
        complete_raw(&other, 7, 0, 0);
        complete_raw(&other, 7, 0, 0);
        assert_eq!(client.reap(&mut reply), Some(Ok(Completion { user_data: 7, status: 1 })));
        assert_eq!(client.reap(&mut reply), Some(Err(Hostile::NotInFlight { frame: 0, user_data: 7 })));
        assert_eq!(client.reap(&mut reply), None);
        assert!(!client.is_broken());
    }
}

#[test]
fn a_closing_ring_takes_nothing_and_still_answers() {
    let (mut daemon, mut client, _) = rings();
    let mut bytes = Vec::new();
    client.submit(ask(1), &[]).unwrap();
    let Taken { ticket, .. } = taken(&mut daemon, &mut bytes);
    client.submit(ask(2), &[]).unwrap();
    assert!(client.prepare_to_sleep());
    daemon.close();
    assert!(daemon.client_sleeps(), "it is to be woken for the news");
    client.woke();
    assert_eq!(daemon.take(&mut bytes), None);
    assert!(daemon.prepare_to_sleep());
    assert!(!client.prepare_to_sleep(), "news that nobody has asked for yet");
    assert!(client.is_closing());
    assert_eq!(client.submit(ask(3), &[]), Err(SubmitError::Closing));
    assert!(client.prepare_to_sleep(), "it may wait for what was taken");
    daemon.complete(ticket, 1, b"answer");
    assert!(daemon.client_sleeps() && !client.prepare_to_sleep());
    assert_eq!(client.reap(&mut bytes), Some(Ok(Completion { user_data: 1, status: 1 })));
}

#[test]
fn who_publishes_first_is_seen_and_who_publishes_later_rings() {
    let (mut daemon, mut client, _) = rings();
    let mut bytes = Vec::new();
    client.submit(ask(1), &[]).unwrap();
    assert!(!client.daemon_sleeps());
    assert!(!daemon.prepare_to_sleep(), "the request was there before");
    assert!(!client.daemon_sleeps(), "who does not sleep is not rung for");
    let first = taken(&mut daemon, &mut bytes);
    assert!(daemon.prepare_to_sleep());
    client.submit(ask(2), &[]).unwrap();
    assert!(client.daemon_sleeps());
    daemon.woke();
    assert!(!client.daemon_sleeps());

    assert!(client.prepare_to_sleep());
    assert!(daemon.client_sleeps());
    client.woke();
    assert!(!daemon.client_sleeps());
    daemon.complete(first.ticket, 1, &[]);
    assert!(!client.prepare_to_sleep(), "the completion was there before");
    assert!(!daemon.client_sleeps());
}

/// What an honest pair may do.
#[derive(Clone, Debug)]
enum Step {
    Submit { request_bytes: usize },
    Take,
    Complete { which: prop::sample::Index, reply_bytes: usize },
    Reap,
}

fn bytes_of_a_frame() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0usize..40, 1 => 0..=FRAME_BYTES, 1 => FRAME_BYTES - 9..=FRAME_BYTES]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => bytes_of_a_frame().prop_map(|request_bytes| Step::Submit { request_bytes }),
        3 => Just(Step::Take),
        2 => (any::<prop::sample::Index>(), bytes_of_a_frame())
            .prop_map(|(which, reply_bytes)| Step::Complete { which, reply_bytes }),
        2 => Just(Step::Reap),
    ]
}

/// What a peer that keeps to no rule may write: anywhere, and mostly what looks as if it were meant.
#[derive(Clone, Debug)]
enum Garbage {
    Header {
        word: usize,
        value: u64,
    },
    Counter {
        counter: usize,
        value: u32,
    },
    /// Counter moved by so much.
    Move {
        counter: usize,
        by: u32,
    },
    Entry {
        queue: bool,
        entry: usize,
        word: usize,
        value: u64,
    },
    FrameWord {
        frame: usize,
        word: usize,
        value: u64,
    },
    /// An entry in its place, and the tail behind it.
    Publish {
        user_data: u64,
        frame: u16,
        bytes: u32,
    },
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let user_data = 0u64..6;
    let frame = prop_oneof![8 => 0u16..6, 4 => 0u16..34, 1 => any::<u16>()];
    let bytes = prop_oneof![4 => 0u32..40, 2 => 65_530u32..65_540, 1 => any::<u32>()];
    prop_oneof![
        1 => (0..FRAMES, any::<u64>()).prop_map(|(word, value)| Garbage::Header { word, value }),
        1 => (0usize..7, any::<u32>()).prop_map(|(counter, value)| Garbage::Counter { counter, value }),
        4 => (0usize..4, prop_oneof![0u32..4, Just(32), Just(33), Just(u32::MAX)])
            .prop_map(|(counter, by)| Garbage::Move { counter, by }),
        3 => (any::<bool>(), 0..FRAMES, 0usize..8, any::<u64>())
            .prop_map(|(queue, entry, word, value)| Garbage::Entry { queue, entry, word, value }),
        1 => (0..FRAMES, 0..FRAME_BYTES / 8, any::<u64>())
            .prop_map(|(frame, word, value)| Garbage::FrameWord { frame, word, value }),
        12 => (user_data, frame, bytes).prop_map(|(user_data, frame, bytes)| Garbage::Publish { user_data, frame, bytes }),
    ]
}

fn counters(shared: &Shared) -> [&AtomicU32; 7] {
    let c = &shared.counters;
    [
        &c.submission_tail,
        &c.submission_head,
        &c.completion_tail,
        &c.completion_head,
        &c.daemon_sleeps,
        &c.client_sleeps,
        &c.closing,
    ]
    .map(|line| &line.0)
}

fn scribble(other: &MmapRaw, garbage: &Garbage, publish: fn(&MmapRaw, u64, u16, u32)) {
    let memory = shared(other);
    match *garbage {
        Garbage::Header { word, value } => match word {
            0 => memory.header.magic.store(value, Relaxed),
            1 => memory.header.abi.store(value as u32, Relaxed),
            _ => geometry(&memory.header)[word % 5].1.store(value as u32, Relaxed),
        },
        Garbage::Counter { counter, value } => counters(memory)[counter].store(value, Relaxed),
        Garbage::Move { counter, by } => {
            counters(memory)[counter].fetch_add(by, Relaxed);
        }
        Garbage::Entry { queue, entry, word, value } => {
            (if queue { &memory.submissions } else { &memory.completions })[entry][word].store(value, Relaxed);
        }
        Garbage::FrameWord { frame, word, value } => memory.frames[frame][word].store(value, Relaxed),
        Garbage::Publish { user_data, frame, bytes } => publish(other, user_data, frame, bytes),
    }
}

#[derive(Clone, Debug)]
enum DaemonStep {
    Garbage(Garbage),
    TakeAll,
    Complete { which: prop::sample::Index, reply_bytes: usize },
    Sleep,
}

fn daemon_step() -> impl Strategy<Value = DaemonStep> {
    prop_oneof![
        6 => garbage().prop_map(DaemonStep::Garbage),
        3 => Just(DaemonStep::TakeAll),
        3 => (any::<prop::sample::Index>(), 0usize..40)
            .prop_map(|(which, reply_bytes)| DaemonStep::Complete { which, reply_bytes }),
        1 => Just(DaemonStep::Sleep),
    ]
}

#[derive(Clone, Debug)]
enum ClientStep {
    Garbage(Garbage),
    Submit { user_data: u64, request_bytes: usize },
    ReapAll,
    Sleep,
}

fn client_step() -> impl Strategy<Value = ClientStep> {
    prop_oneof![
        6 => garbage().prop_map(ClientStep::Garbage),
        4 => (0u64..6, 0usize..40)
            .prop_map(|(user_data, request_bytes)| ClientStep::Submit { user_data, request_bytes }),
        3 => Just(ClientStep::ReapAll),
        1 => Just(ClientStep::Sleep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn each_request_is_answered_once_with_its_own_bytes(
        steps in vec(step(), 0..400),
        start in prop_oneof![Just(0u32), Just(u32::MAX - 40), any::<u32>()],
    ) {
        let (mut daemon, mut client, _) = rings_after(start);
        let mut submitted: VecDeque<(Submission, Vec<u8>)> = VecDeque::new();
        let mut held: Vec<Taken> = Vec::new();
        let mut completed: VecDeque<(Completion, Vec<u8>)> = VecDeque::new();
        let mut bytes = Vec::new();
        for (number, step) in (0u64..).zip(steps) {
            match step {
                Step::Submit { request_bytes } => {
                    let submission =
                        Submission { user_data: mix(number), verb: number as u16, deadline_ms: mix(number) as u32, attachment: !number };
                    let request = random_bytes(number, request_bytes);
                    let full = submitted.len() + held.len() + completed.len() == FRAMES;
                    let expected = if full { Err(SubmitError::Full) } else { Ok(()) };
                    prop_assert_eq!(client.submit(submission, &request), expected);
                    if !full {
                        submitted.push_back((submission, request));
                    }
                }
                Step::Take => match (daemon.take(&mut bytes), submitted.pop_front()) {
                    (Some(Ok(taken)), Some((submission, request))) => {
                        prop_assert_eq!(taken.submission, submission);
                        prop_assert!(bytes == request);
                        held.push(taken);
                    }
                    (None, None) => {}
                    other => prop_assert!(false, "{other:?}"),
                },
                Step::Complete { which, reply_bytes } if !held.is_empty() => {
                    let Taken { submission, ticket } = held.swap_remove(which.index(held.len()));
                    let reply = random_bytes(!number, reply_bytes);
                    daemon.complete(ticket, number as u16, &reply);
                    completed.push_back((Completion { user_data: submission.user_data, status: number as u16 }, reply));
                }
                Step::Complete { .. } => {}
                Step::Reap => match (client.reap(&mut bytes), completed.pop_front()) {
                    (Some(Ok(completion)), Some((expected, reply))) => {
                        prop_assert_eq!(completion, expected);
                        prop_assert!(bytes == reply);
                    }
                    (None, None) => {}
                    other => prop_assert!(false, "{other:?}"),
                },
            }
            prop_assert!(daemon.has_room() || held.len() + completed.len() == FRAMES);
            prop_assert_eq!(daemon.prepare_to_sleep(), submitted.is_empty(), "an honest client is never parked");
            prop_assert_eq!(client.prepare_to_sleep(), completed.is_empty());
            prop_assert_eq!((daemon.in_flight(), client.in_flight()), (held.len(), submitted.len() + held.len() + completed.len()));
        }
    }

    #[test]
    fn no_client_makes_the_daemon_panic_or_yield_what_is_out_of_range(
        steps in vec(daemon_step(), 0..300),
        start in prop_oneof![Just(0u32), Just(u32::MAX - 5)],
    ) {
        let (mut daemon, _, other) = rings_after(start);
        let mut held: Vec<Taken> = Vec::new();
        let (mut request, mut frame) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                DaemonStep::Garbage(garbage) => scribble(&other, &garbage, submit_raw),
                DaemonStep::TakeAll => {
                    for round in 0.. {
                        prop_assert!(round <= FRAMES, "more entries than the queue has");
                        match daemon.take(&mut request) {
                            None => break,
                            Some(Err(hostile)) => prop_assert!(!hostile.to_string().is_empty()),
                            Some(Ok(taken)) => {
                                prop_assert!(usize::from(taken.ticket.frame) < FRAMES);
                                prop_assert!(held.iter().all(|other| other.ticket.frame != taken.ticket.frame), "a frame twice");
                                prop_assert!(request.len() <= FRAME_BYTES);
                                copy_out(&shared(&other).frames[usize::from(taken.ticket.frame)], request.len(), &mut frame);
                                prop_assert!(request == frame);
                                held.push(taken);
                            }
                        }
                    }
                    let asleep = daemon.prepare_to_sleep();
                    prop_assert!(asleep, "all was taken that can be");
                    daemon.woke();
                }
                DaemonStep::Complete { which, reply_bytes } if !held.is_empty() => {
                    let Taken { ticket, .. } = held.swap_remove(which.index(held.len()));
                    daemon.complete(ticket, 1, &random_bytes(1, reply_bytes));
                }
                DaemonStep::Complete { .. } => {}
                DaemonStep::Sleep => {
                    if !daemon.prepare_to_sleep() {
                        let answer = daemon.take(&mut request);
                        prop_assert!(answer.is_some(), "kept awake for nothing");
                        held.extend(answer.into_iter().flatten());
                    }
                    daemon.client_sleeps();
                }
            }
            prop_assert_eq!(daemon.in_flight(), held.len());
            let unreaped = daemon.completion_tail.wrapping_sub(daemon.completion_head_seen);
            prop_assert!(unreaped as usize + held.len() <= FRAMES, "a completion would be written over");
        }
    }

    #[test]
    fn no_daemon_makes_the_client_panic_or_hand_out_a_frame_twice(
        steps in vec(client_step(), 0..300),
        start in prop_oneof![Just(0u32), Just(u32::MAX - 5)],
    ) {
        let (_, mut client, other) = rings_after(start);
        let mut in_flight: Vec<(u16, u64)> = Vec::new();
        let mut reply = Vec::new();
        for step in steps {
            match step {
                ClientStep::Garbage(garbage) => scribble(&other, &garbage, complete_raw),
                ClientStep::Submit { user_data, request_bytes } => {
                    let entry = &shared(&other).submissions[slot(client.submission_tail)];
                    match client.submit(ask(user_data), &random_bytes(user_data, request_bytes)) {
                        Ok(()) => {
                            let (_, frame, _) = split_head(entry[1].load(Relaxed));
                            prop_assert!(in_flight.iter().all(|(other, _)| *other != frame), "frame {frame} twice");
                            in_flight.push((frame, user_data));
                        }
                        Err(SubmitError::Full) => prop_assert_eq!(in_flight.len(), FRAMES),
                        Err(error) => prop_assert!(client.is_broken() || client.is_closing(), "{error}"),
                    }
                }
                ClientStep::ReapAll => {
                    for round in 0.. {
                        prop_assert!(round <= FRAMES, "more entries than the queue has");
                        let before = client.in_flight;
                        match client.reap(&mut reply) {
                            None => break,
                            Some(Err(hostile)) => prop_assert!(!hostile.to_string().is_empty()),
                            Some(Ok(Completion { user_data, .. })) => {
                                prop_assert!(reply.len() <= FRAME_BYTES);
                                let freed = (0..FRAMES).find(|frame| before[*frame] != client.in_flight[*frame]);
                                let freed = freed.map(|frame| (frame as u16, user_data));
                                let place = in_flight.iter().position(|asked| Some(*asked) == freed);
                                prop_assert!(place.is_some(), "an answer to nothing: {freed:?}");
                                in_flight.remove(place.unwrap_or(0));
                            }
                        }
                    }
                }
                ClientStep::Sleep => {
                    if !client.prepare_to_sleep() && !client.is_closing() && !client.is_broken() {
                        prop_assert!(client.waiting() != Ok(0), "kept awake for nothing");
                    }
                    client.daemon_sleeps();
                }
            }
            prop_assert_eq!(client.in_flight(), in_flight.len());
        }
    }
}

#[test]
fn an_entry_that_changes_while_it_is_read_is_read_once() {
    const ROUNDS: usize = 1_000_000;
    let _alone = alone();
    let (mut daemon, _, other) = rings();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (done, memory) = (&done, shared(&other));
        // Also when this side fails: the other would write for ever.
        let _end = AtEnd(|| done.store(true, Relaxed));
        scope.spawn(move || {
            while !done.load(Relaxed) {
                // The next entry and those behind it, valid and invalid in turn. Each value must be taken or refused whole.
                let next = memory.counters.submission_head.0.load(Relaxed);
                for (frame, bytes) in [(3, 8), (77, 8), (4, u32::MAX), (5, 16), (3, 8), (5, 16)] {
                    for ahead in 0..3 {
                        let entry = &memory.submissions[slot(next.wrapping_add(ahead))];
                        entry[1].store(join_head(7, frame, bytes), Relaxed);
                    }
                }
            }
        });
        let mut bytes = Vec::new();
        for _ in 0..ROUNDS {
            memory.counters.submission_tail.0.store(daemon.submission_head.wrapping_add(FRAMES as u32), Release);
            match daemon.take(&mut bytes).expect("a request") {
                Ok(Taken { ticket, .. }) => {
                    let expected = [(0, 0), (3, 8), (5, 16)];
                    let found = (ticket.frame, bytes.len());
                    assert!(expected.contains(&found), "{found:?}: frame and length are of two readings");
                    daemon.complete(ticket, 1, &[]);
                }
                Err(Hostile::Range { field: "frame", value: 77, .. }) => {}
                Err(Hostile::Range { field: "request_bytes", value, .. }) => assert_eq!(value, u32::MAX.into()),
                Err(hostile) => panic!("{hostile}"),
            }
            memory.counters.completion_head.0.store(daemon.completion_tail, Release);
        }
    });
}

struct AtEnd<F: FnMut()>(F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// How long to wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an eventfd is between processes: it remembers that it was rung.
#[derive(Default)]
struct Doorbell {
    rung: Mutex<bool>,
    wakes: Condvar,
}

impl Doorbell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.wakes.notify_one();
    }

    fn wait(&self) {
        let rung = self.rung.lock().unwrap();
        let (mut rung, late) = self.wakes.wait_timeout_while(rung, PATIENCE, |rung| !*rung).unwrap();
        assert!(!late.timed_out(), "a wake-up was lost");
        *rung = false;
    }
}

#[test]
fn no_message_and_no_wake_up_is_lost_between_two_threads_that_sleep() {
    const MESSAGES: u64 = 200_000;
    /// One in so many is as large as can be.
    const LARGE: u64 = 500;
    let _alone = alone();
    let (mut daemon, mut client, _) = rings_after(u32::MAX - 1_000);
    let (for_daemon, for_client) = (Doorbell::default(), Doorbell::default());
    let (daemon_slept, client_slept) = (AtomicU64::new(0), AtomicU64::new(0));
    let request_of = |user_data: u64| {
        let bytes = if user_data.is_multiple_of(LARGE) { FRAME_BYTES } else { (mix(user_data) % 40) as usize };
        [user_data as u8].repeat(bytes)
    };
    let serve = || {
        let (mut random, mut request, mut held, mut answered) = (1u64, Vec::new(), Vec::new(), 0);
        while answered < MESSAGES {
            random = mix(random.wrapping_add(GOLDEN));
            if let Some(taken) = daemon.take(&mut request) {
                let Taken { submission, ticket } = taken.unwrap();
                assert!(request == request_of(submission.user_data), "of {}", submission.user_data);
                assert_eq!(submission, ask(submission.user_data));
                held.push((ticket, submission.user_data));
                if !random.is_multiple_of(3) {
                    continue;
                }
            }
            if held.is_empty() {
                if daemon.prepare_to_sleep() {
                    daemon_slept.fetch_add(1, Relaxed);
                    for_daemon.wait();
                    daemon.woke();
                }
                continue;
            }
            // Some of them, in any order, and one look at the flag for all.
            for _ in 0..=(random >> 8) % held.len() as u64 {
                let (ticket, user_data) = held.swap_remove((random >> 16) as usize % held.len());
                daemon.complete(ticket, user_data as u16, &request_of(!user_data));
                answered += 1;
            }
            if daemon.client_sleeps() {
                for_client.ring();
            }
        }
    };
    let ask_all = || {
        let (mut random, mut reply, mut submitted, mut reaped) = (2u64, Vec::new(), 0, 0);
        while reaped < MESSAGES {
            random = mix(random.wrapping_add(GOLDEN));
            // Often a single request, so that each side is about to sleep when the other publishes.
            let burst = if random.is_multiple_of(2) { 1 } else { 1 + (random >> 8) % FRAMES as u64 };
            for _ in 0..burst.min(MESSAGES - submitted) {
                match client.submit(ask(submitted), &request_of(submitted)) {
                    Ok(()) => submitted += 1,
                    Err(error) => {
                        assert_eq!(error, SubmitError::Full);
                        break;
                    }
                }
            }
            if client.daemon_sleeps() {
                for_daemon.ring();
            }
            let leave = (random >> 16) as usize % (client.in_flight() + 1) / 2;
            while client.in_flight() > leave {
                if let Some(completion) = client.reap(&mut reply) {
                    let Completion { user_data, status } = completion.unwrap();
                    assert_eq!(status, user_data as u16);
                    assert!(reply == request_of(!user_data), "of {user_data}");
                    reaped += 1;
                } else if client.prepare_to_sleep() {
                    client_slept.fetch_add(1, Relaxed);
                    for_client.wait();
                    client.woke();
                }
            }
        }
        assert_eq!((submitted, client.in_flight()), (MESSAGES, 0));
    };
    thread::scope(|scope| {
        scope.spawn(serve);
        scope.spawn(ask_all);
    });
    let slept = [daemon_slept, client_slept].map(AtomicU64::into_inner);
    assert!(slept.iter().all(|times| *times > 0), "both sides sleep: {slept:?}");
}

/// Looks again and again, without sleeping.
fn watch<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    for looks in 1u64.. {
        if let Some(seen) = look() {
            return seen;
        }
        // The two may have to share one processor.
        if looks.is_multiple_of(100) {
            thread::yield_now();
            assert!(since.elapsed() < PATIENCE, "what must happen does not, or the other thread is gone");
        }
        hint::spin_loop();
    }
    unreachable!("counted through all numbers")
}

/// Two threads pass it together, as nearly at once as can be.
#[derive(Default)]
struct Gate(AtomicUsize);

impl Gate {
    fn pass(&self) {
        let round = self.0.fetch_add(1, SeqCst) / 2;
        watch(|| (self.0.load(Acquire) >= 2 * (round + 1)).then_some(()));
    }
}

#[test]
fn what_can_be_seen_is_whole() {
    const ROUNDS: u64 = 100_000;
    let _alone = alone();
    let (mut daemon, mut client, _) = rings();
    let bytes_of = |number: u64| number.to_le_bytes().repeat(64);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut request = Vec::new();
            for user_data in 0..ROUNDS {
                let Taken { submission, ticket } = watch(|| daemon.take(&mut request)).unwrap();
                assert_eq!(submission, ask(user_data));
                assert!(request == bytes_of(user_data), "of {user_data}");
                daemon.complete(ticket, user_data as u16, &bytes_of(!user_data));
            }
        });
        scope.spawn(move || {
            let mut reply = Vec::new();
            for user_data in 0..ROUNDS {
                client.submit(ask(user_data), &bytes_of(user_data)).unwrap();
                let completion = watch(|| client.reap(&mut reply)).unwrap();
                assert_eq!(completion, Completion { user_data, status: user_data as u16 });
                assert!(reply == bytes_of(!user_data), "of {user_data}");
            }
        });
    });
}

/// The fences: each round one side publishes and looks at the flag while the other sets it and looks for work. One must see the other.
#[test]
fn of_two_who_act_at_once_one_sees_the_other() {
    const ROUNDS: usize = 100_000;
    let _alone = alone();
    let (mut daemon, mut client, _) = rings();
    let gate = Gate::default();
    let mut bytes = [Vec::new(), Vec::new()];
    let [request, reply] = &mut bytes;
    let gate = &gate;
    let (daemon_saw, client_saw) = thread::scope(|scope| {
        let daemon_saw = scope.spawn(move || {
            (0..ROUNDS)
                .map(|_| {
                    gate.pass();
                    let submission_seen = !daemon.prepare_to_sleep();
                    gate.pass();
                    daemon.woke();
                    let Taken { ticket, .. } = taken(&mut daemon, request);
                    gate.pass();
                    daemon.complete(ticket, 1, &[]);
                    let sleeper_seen = daemon.client_sleeps();
                    gate.pass();
                    [submission_seen, sleeper_seen]
                })
                .collect::<Vec<_>>()
        });
        let client_saw = scope.spawn(move || {
            (0..ROUNDS)
                .map(|_| {
                    gate.pass();
                    client.submit(ask(1), &[]).unwrap();
                    let sleeper_seen = client.daemon_sleeps();
                    gate.pass();
                    gate.pass();
                    let completion_seen = !client.prepare_to_sleep();
                    gate.pass();
                    client.woke();
                    client.reap(reply).unwrap().unwrap();
                    [sleeper_seen, completion_seen]
                })
                .collect::<Vec<_>>()
        });
        (daemon_saw.join().unwrap(), client_saw.join().unwrap())
    });
    for (round, (one, other)) in daemon_saw.iter().zip(&client_saw).enumerate() {
        assert!(one[0] || other[0], "round {round}: a submission that the daemon would sleep through");
        assert!(one[1] || other[1], "round {round}: a completion that the client would sleep through");
    }
}
