//! Memory that clients bring: as good as the daemon's own, and trusted no more.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use tender_client::proto::door::{Asked, Reply, Request};
use tender_client::proto::greeting::ToDaemon;
use tender_client::{MemoryState, OwnMemory, Remote, Tier};

use crate::leases::lease;
use crate::memory::Memory;
use crate::overwriting::get_right;
use crate::raw::{Offer, Raw, holds_of};
use crate::support::PATIENCE;
use crate::support::blocks::Run;
use crate::support::site::TOKEN;
use crate::{HOST_BYTES, LARGE, SMALL, attach_as, client, site, store_bytes};

/// What the daemon wants on a file.
const CLOSED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE);

fn memfd(flags: MemfdFlags, bytes: u64, seals: SealFlags) -> OwnedFd {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(c"engine", flags).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

/// Mapped for writing, and closed for others then.
fn closed(bytes: u64) -> (OwnedFd, Memory) {
    let file = memfd(MemfdFlags::empty(), bytes, SealFlags::empty());
    let memory = Memory::to_write(&file, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&file, CLOSED).unwrap();
    (file, memory)
}

/// Memory that was brought to a client, and another way to look into it.
pub fn bring_to(store: &Remote) -> (OwnMemory, Memory) {
    let bytes = store.segment_bytes().expect("the daemon takes memory");
    let file = memfd(MemfdFlags::empty(), bytes, SealFlags::empty());
    let view = Memory::to_read(&file, bytes).unwrap();
    let memory = OwnMemory::new(file).unwrap();
    store.bring(&memory).unwrap();
    (memory, view)
}

/// Whether all blocks of a run lie there.
fn holds(memory: &Memory, run: &Run) -> bool {
    (0..run.keys.len()).all(|block| memory.has_page_with(&run.payload(block)[..64]))
}

/// The next offer, for a run that is reserved.
fn offered(raw: &mut Raw, run: &Run) -> (Offer, Asked) {
    let asked = raw.submit(&Raw::reserve_request(run));
    (raw.offer(), asked)
}

/// Takes the daemon's own memory after all, and puts the run there.
fn go_on(raw: &mut Raw, (offer, asked): (Offer, Asked), run: &Run) {
    raw.accept(&offer);
    let slots = Raw::granted(raw.answer(asked));
    slots.iter().for_each(|slot| assert_eq!(slot.extent.segment, offer.mapping));
    raw.fill_and_commit(run, &slots);
}

/// Two tenants, two sizes, two groups of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_in_memory_that_a_client_brings_reach_others_and_outlive_the_worker() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let mut parties = Vec::new();
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let writer = client(&site, is_other, attach_as("writer", model, block_bytes)).await;
        let reader = client(&site, is_other, attach_as("reader", model, block_bytes)).await;
        let (memory, view) = bring_to(&writer);
        let run = Run::new(&writer, 1, 40);
        run.put(&writer).await;
        assert_eq!(memory.state(), MemoryState::Used);
        assert!(holds(&view, &run), "the blocks were put somewhere else");
        run.expect(&reader, None).await;
        let views = (lease(&reader, &run).await, get_right(&writer, &run).await.0);
        parties.push((writer, reader, memory, view, run, views));
    }
    for round in 0..2 {
        daemon.kill_worker();
        for (writer, reader, memory, view, run, views) in &parties {
            assert!(run.equals(&views.0) && run.equals(&views.1));
            run.expect(reader, Some(Tier::Host)).await;
            // The next worker has the very file.
            let more = Run::new(writer, 10 + round, 40);
            more.put(writer).await;
            assert!(holds(view, &more), "the blocks were put somewhere else");
            more.expect(reader, Some(Tier::Host)).await;
            assert_eq!(memory.state(), MemoryState::Used);
        }
    }
    for (writer, _, _, _, run, views) in &parties {
        store_bytes(writer, 1000, HOST_BYTES).await;
        assert!(run.equals(&views.0) && run.equals(&views.1));
    }
    drop(parties);
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_comes_back_when_its_last_block_has_left_and_may_be_brought_again() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let store = client(&site, false, attach_as("brings", "large", LARGE)).await;
    let reader = client(&site, false, attach_as("reader", "large", LARGE)).await;
    // There are two places for memory of clients: of three who put, one gives its own up.
    let mut others = Vec::new();
    for is_other in [false, true] {
        others.push(client(&site, is_other, attach_as("others", "small", SMALL)).await);
    }
    let (memory, view) = bring_to(&store);
    for round in 0..3 {
        let run = Run::new(&store, round, 16);
        run.put(&store).await;
        assert_eq!(memory.state(), MemoryState::Used);
        assert!(holds(&view, &run), "the blocks were put somewhere else");
        let began = Instant::now();
        let mut seed = 1000 * (round + 1);
        while memory.state() != MemoryState::Own {
            for other in &others {
                Run::new(other, seed, 4).put(other).await;
                seed += 1;
            }
            assert!(began.elapsed() < PATIENCE, "memory that nobody uses is kept: {:?}", memory.state());
        }
        run.expect(&reader, None).await;
        store.bring(&memory).unwrap();
    }
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_could_do_harm_is_refused_with_the_reason_and_the_daemons_is_used() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let reader = client(&site, false, attach_as("reader", "model", LARGE)).await;
    let bytes = reader.segment_bytes().unwrap();
    let plain = MemfdFlags::empty();
    let on_disk = File::create_new(site.path("engine")).unwrap();
    on_disk.set_len(bytes).unwrap();
    let good = closed(bytes).0;
    let path = format!("/proc/self/fd/{}", good.as_raw_fd());
    let read_only = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mut cases: Vec<(Option<OwnedFd>, &str)> = vec![
        (None, "send that of the file"),
        (Some(on_disk.into()), "not a memfd"),
        (Some(memfd(plain, bytes, SealFlags::empty())), "its size can be changed"),
        (Some(memfd(plain, bytes, CLOSED.difference(SealFlags::SHRINK))), "its size can be changed"),
        (Some(memfd(plain, bytes, CLOSED.difference(SealFlags::FUTURE_WRITE))), "others could map it for writing"),
        (Some(memfd(plain, bytes, CLOSED.union(SealFlags::WRITE))), "no slot in it can be filled"),
        (Some(read_only), "for reading and writing"),
        (Some(memfd(plain, bytes - 4096, CLOSED)), "bring one file of that size"),
        (Some(memfd(plain, 2 * bytes, CLOSED)), "bring one file of that size"),
    ];
    match rustix::fs::memfd_create(c"engine", MemfdFlags::HUGETLB) {
        Ok(_) => cases.push((Some(memfd(MemfdFlags::HUGETLB, bytes, CLOSED)), "without MFD_HUGETLB")),
        Err(error) => println!("SKIPPED: this system has no huge pages ({error})"),
    }
    for (seed, (file, telling)) in (0..).zip(cases) {
        let attach = attach_as("hostile", "model", LARGE);
        let mut hostile = Raw::open(&site.socket(), None, &attach).await;
        assert_eq!(hostile.brought_bytes, bytes);
        let run = hostile.run(seed, 8);
        let offer = offered(&mut hostile, &run);
        let why = hostile.bring(offer.0.mapping, file.as_ref().map(AsFd::as_fd)).expect_err(telling);
        assert!(why.contains(telling), "`{telling}` is not in `{why}`");
        // Not even one that is as it should be, for this offer; nor any without one.
        for mapping in [offer.0.mapping, offer.0.mapping + 1, 0] {
            let why = hostile.bring(mapping, Some(good.as_fd())).expect_err("a second one");
            assert!(why.contains("one for each offer"), "{why}");
        }
        go_on(&mut hostile, offer, &run);
        run.expect(&reader, None).await;
        hostile.leave();
    }
    // Nor when the daemon's is mapped, and blocks lie there.
    let mut late = Raw::open(&site.socket(), None, &attach_as("late", "model", LARGE)).await;
    let run = late.run(100, 8);
    let mapping = late.put(&run)[0].extent.segment;
    let why = late.bring(mapping, Some(good.as_fd())).expect_err("after `Mapped`");
    assert!(why.contains("one for each offer"), "{why}");
    run.expect(&reader, None).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_in_use_is_not_taken_from_anybody() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let mut owner = Raw::open(&site.socket(), None, &attach_as("owner", "model", LARGE)).await;
    let (file, memory) = closed(owner.brought_bytes);
    let first = owner.run(1, 8);
    let (offer, asked) = offered(&mut owner, &first);
    owner.bring(offer.mapping, Some(file.as_fd())).expect("nothing is wrong with it");
    owner.own.insert(offer.mapping, memory);
    let slots = Raw::granted(owner.answer(asked));
    owner.fill_and_commit(&first, &slots);

    // By another tenant; by a process of this one that was given it to read, which is a descriptor with all seals on it.
    let mut stranger = Raw::open(&site.socket(), Some(TOKEN), &attach_as("stranger", "model", SMALL)).await;
    let theirs = stranger.run(2, 8);
    let awaited = offered(&mut stranger, &theirs);
    let why = stranger.bring(awaited.0.mapping, Some(file.as_fd())).expect_err("another tenant's memory");
    assert!(why.contains("in use already"), "{why}");
    go_on(&mut stranger, awaited, &theirs);
    let reader = client(&site, true, attach_as("reader", "model", SMALL)).await;
    theirs.expect(&reader, None).await;
    reader.close().await;
    stranger.leave();
    let mut sibling = Raw::open(&site.socket(), None, &attach_as("sibling", "model", LARGE)).await;
    let fetched = sibling.fetch(offer.mapping).expect("memory of its own tenant");
    let run = sibling.run(3, 8);
    let awaited = offered(&mut sibling, &run);
    let why = sibling.bring(awaited.0.mapping, Some(fetched.file.as_fd())).expect_err("a sibling's memory");
    assert!(why.contains("in use already"), "{why}");
    go_on(&mut sibling, awaited, &run);
    sibling.leave();

    // And by its own client, alone now, for a second segment; also after the worker was killed, which has it from its keeper.
    let attach = attach_as("owner", "model", LARGE);
    for is_killed in [false, true] {
        if is_killed {
            daemon.kill_worker();
            owner = owner.come_again(&site.socket(), None, &attach).await;
            assert_eq!(owner.confirm(&[]), 0);
        }
        daemon.at_rest().await;
        // More than a segment.
        let large = owner.run(4, (owner.brought_bytes / LARGE) as usize + 8);
        let (offer, asked) = offered(&mut owner, &large);
        let why = owner.bring(offer.mapping, Some(file.as_fd())).expect_err("the same file");
        assert!(why.contains("in use already"), "{why}");
        owner.socket.say(ToDaemon::Unmappable(offer.mapping), &[]);
        let reply = owner.answer(asked);
        let Reply::Reserved(outcomes) = reply else { panic!("{reply:?}") };
        owner.ask(&Request::Abort(holds_of(&outcomes).into()));
    }
    let reader = client(&site, false, attach_as("reader", "model", LARGE)).await;
    first.expect(&reader, Some(Tier::Host)).await;
    run.expect(&reader, None).await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_overwritten_in_memory_that_was_brought_is_what_was_committed_or_a_miss() {
    let site = site("0");
    let daemon = site.start_ready().await;
    for (is_other, model, block_bytes) in [(false, "large", LARGE), (true, "small", SMALL)] {
        let token = is_other.then_some(TOKEN);
        let mut hostile = Raw::open(&site.socket(), token, &attach_as("hostile", model, block_bytes)).await;
        let reader = client(&site, is_other, attach_as("reader", model, block_bytes)).await;
        let file = memfd(MemfdFlags::empty(), hostile.brought_bytes, SealFlags::empty());
        // A second mapping from before, as a child or another process of the engine may have it.
        let [memory, second] = [(); 2].map(|()| Memory::to_write(&file, hostile.brought_bytes).unwrap());
        rustix::fs::fcntl_add_seals(&file, CLOSED).unwrap();
        let first = hostile.run(0, 16);
        let (offer, asked) = offered(&mut hostile, &first);
        hostile.bring(offer.mapping, Some(file.as_fd())).expect("nothing is wrong with it");
        hostile.own.insert(offer.mapping, memory);
        let slots = Raw::granted(hostile.answer(asked));
        hostile.ask(&Request::Abort(slots.iter().map(|slot| slot.hold).collect::<Vec<_>>().into()));
        for seed in 1..20 {
            let run = hostile.run(seed, 16);
            for slot in hostile.put(&run) {
                assert_eq!(slot.extent.segment, offer.mapping);
                second.write(slot.extent.offset_bytes, &vec![0xee; block_bytes as usize]);
            }
            get_right(&reader, &run).await;
        }
        hostile.leave();
    }
    daemon.stop();
}
