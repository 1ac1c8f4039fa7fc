//! What happens to the disk tier behind the daemon's back: bytes flipped, files cut off or removed. A block may be lost by it, but
//! none is ever wrong.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use support::blocks::{Run, attach_to};
use support::site::{Running, Site};
use tender_client::proto::wire::Tier as WireTier;
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{BlockStore, GetEnd, Remote, Tier};

const PAGE: usize = 4096;
const MISMATCHES: &str = "tender_sum_mismatches_total";

/// The tier file of a daemon that does not run.
struct TierFile {
    file: File,
    bytes: Vec<u8>,
}

impl TierFile {
    fn open(site: &Site) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(site.tier_file()).unwrap();
        Self { bytes: fs::read(site.tier_file()).unwrap(), file }
    }

    /// The page at which these bytes begin.
    fn find(&self, beginning: &[u8]) -> u64 {
        let mut pages = self.bytes.chunks_exact(PAGE);
        (pages.position(|page| page.starts_with(beginning)).expect("a block on disk") * PAGE) as u64
    }

    fn flip(&self, at: u64) {
        let byte = self.bytes[at as usize] ^ 0x40;
        self.file.write_all_at(&[byte], at).unwrap();
        self.file.sync_all().unwrap();
    }

    /// Where directory pages are (both copies), with their number in the segment and their sequence.
    fn directory_pages(&self) -> Vec<(u64, u32, u64)> {
        let number = |page: &[u8]| u32::from_le_bytes(page[44..48].try_into().unwrap());
        let sequence = |page: &[u8]| u64::from_le_bytes(page[24..32].try_into().unwrap());
        let pages = (0u64..).step_by(PAGE).zip(self.bytes.chunks_exact(PAGE));
        let pages = pages.filter(|(_, page)| page.starts_with(b"TDRPAGE1"));
        pages.map(|(at, page)| (at, number(page), sequence(page))).collect()
    }
}

async fn store(site: &Site, block_bytes: u64) -> Remote {
    site.attach(attach_to(&format!("faults-{block_bytes}"), BlockLayout::opaque(block_bytes))).await
}

/// A site whose daemon has stopped, and what it left on disk.
async fn stopped_with_blocks(block_bytes: u64, blocks: usize) -> (Site, Run) {
    let site = Site::small();
    let daemon = site.start_ready().await;
    let of = store(&site, block_bytes).await;
    let run = Run::new(&of, 1, blocks);
    run.put_durably(&of).await;
    daemon.stop();
    (site, run)
}

async fn degraded(daemon: &Running) -> bool {
    let disk = daemon.tier(WireTier::Disk).await;
    let is_degraded = matches!(&disk.state[..], "degraded" | "disabled");
    assert!(!is_degraded || !disk.note.is_empty(), "says why, and the cure");
    is_degraded
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_of_payload_is_a_miss_and_counted() {
    let site = Site::small();
    let daemon = site.start_ready().await;
    let mut runs = Vec::new();
    for block_bytes in [4096, 50_000, 2_000_001] {
        let run = Run::new(&store(&site, block_bytes).await, 1, 6);
        run.put_durably(&store(&site, block_bytes).await).await;
        runs.push((block_bytes, run));
    }
    daemon.stop();
    let file = TierFile::open(&site);
    for (block_bytes, run) in &runs {
        // The first byte of block 1, the last of block 3, one in the middle of block 4.
        for (block, offset) in [(1, 0), (3, block_bytes - 1), (4, block_bytes / 2)] {
            file.flip(file.find(&run.payload(block)[..64]) + offset);
        }
    }
    drop(file);
    let daemon = site.start_ready().await;
    assert_eq!(daemon.counter(MISMATCHES).await, 0, "nothing is read before it is asked for");
    for (block_bytes, run) in &runs {
        let store = store(&site, *block_bytes).await;
        let got = store.get(&run.keys, Shard::WHOLE).await;
        assert_eq!((got.end, got.blocks.len()), (GetEnd::Miss, 1), "a run ends before the block that is damaged");
        assert_eq!(run.present(&store).await, [true, false, true, false, false, true]);
        let found = store.lookup(&run.keys).await;
        assert_eq!(found.disk, [true, false, true, false, false, true], "what is damaged is given up");
        // What was lost can be put again, and read.
        let outcomes = run.put_in(&store, 1).await;
        assert!(outcomes.iter().all(|outcome| outcome.is_there()), "{outcomes:?}");
        run.expect(&store, None).await;
    }
    assert_eq!(daemon.counter(MISMATCHES).await, 9);
    assert!(!degraded(&daemon).await, "a disk that answers is not left alone");
    daemon.at_rest().await;
    daemon.stop();
}

/// Which copies of a page are damaged.
#[derive(Clone, Copy, PartialEq)]
enum Damaged {
    Newer,
    Both,
}

/// Puts 100 blocks, damages a page of the directory, and tells which blocks are there afterwards.
async fn present_after(number: u32, damaged: Damaged) -> Vec<bool> {
    let (site, run) = stopped_with_blocks(4096, 100).await;
    let file = TierFile::open(&site);
    let mut copies = file.directory_pages();
    copies.retain(|(_, page, _)| *page == number);
    copies.sort_by_key(|(_, _, sequence)| std::cmp::Reverse(*sequence));
    assert!(!copies.is_empty(), "page {number} was written");
    copies.truncate(if damaged == Damaged::Newer { 1 } else { 2 });
    for (at, ..) in copies {
        file.flip(at + 200);
    }
    drop(file);
    let daemon = site.start_ready().await;
    let of = store(&site, 4096).await;
    let present = run.present(&of).await;
    let outcomes = run.put_in(&of, 1).await;
    assert!(outcomes.iter().all(|outcome| outcome.is_there()), "{outcomes:?}");
    run.expect(&of, None).await;
    daemon.stop();
    // What was put again is there for good, over the damaged page.
    let daemon = site.start_ready().await;
    run.expect(&store(&site, 4096).await, Some(Tier::Disk)).await;
    daemon.stop();
    present
}

/// A page names 31 blocks: at most these are gone, and none is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_directory_page_loses_its_entries_alone() {
    for damaged in [Damaged::Newer, Damaged::Both] {
        let present = present_after(2, damaged).await;
        let gone = present.iter().filter(|present| !**present).count();
        assert!(gone <= 31, "{gone} blocks are gone with one page");
        assert!(damaged == Damaged::Newer || gone > 0, "its entries are told by nobody else");
    }
}

/// The first page says whose the segment is: without it the segment is empty, and used again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_first_page_may_lose_its_segment_but_nothing_is_wrong() {
    for damaged in [Damaged::Newer, Damaged::Both] {
        assert_eq!(present_after(0, damaged).await.len(), 100);
    }
}

/// Both superblocks gone, the file is none of ours; one of them gone, the other serves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_superblock_is_enough() {
    let (site, run) = stopped_with_blocks(4096, 10).await;
    TierFile::open(&site).flip(20);
    let daemon = site.start_ready().await;
    run.expect(&store(&site, 4096).await, Some(Tier::Disk)).await;
    daemon.stop();
    TierFile::open(&site).flip(PAGE as u64 + 20);
    let said = support::site::refusal(&mut site.command());
    assert!(said.contains("checksum is wrong") && said.contains("--dir"), "{said}");
}

/// Zeros where both superblocks were.
fn blank_superblocks(tier_file: &Path) {
    let file = OpenOptions::new().write(true).open(tier_file).unwrap();
    file.write_all_at(&[0; 2 * PAGE], 0).unwrap();
    file.sync_all().unwrap();
}

/// What lies behind a lost superblock cannot be read: the file begins empty, and somebody should know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_lost_its_superblocks_begins_empty_with_a_warning() {
    let (site, run) = stopped_with_blocks(4096, 10).await;
    let warning = format!("tier file {} has its full size but no superblock", site.tier_file().display());
    let daemon = site.start_ready().await;
    assert!(!daemon.said().contains("superblock"), "nothing is wrong yet: {}", daemon.said());
    daemon.stop();
    blank_superblocks(&site.tier_file());
    let daemon = site.start_ready().await;
    assert!(daemon.said().contains(&warning), "{}", daemon.said());
    run.expect_nothing(&store(&site, 4096).await).await;
    run.put_durably(&store(&site, 4096).await).await;
    daemon.stop();
    let daemon = site.start_ready().await;
    run.expect(&store(&site, 4096).await, Some(Tier::Disk)).await;
    assert_eq!(daemon.said().matches("superblock").count(), 1, "it has one again: {}", daemon.said());
    daemon.stop();
}

/// A site of two folders whose daemon has stopped, and a run in each of its files.
async fn stopped_with_a_run_in_each_file() -> (Site, [Run; 2]) {
    let site = Site::of_two_folders();
    let daemon = site.start_ready().await;
    // Two sizes are two segments, and segments are dealt out to the files in turn.
    let runs = [Run::new(&store(&site, 4096).await, 1, 10), Run::new(&store(&site, 50_000).await, 1, 10)];
    runs[0].put_durably(&store(&site, 4096).await).await;
    runs[1].put_durably(&store(&site, 50_000).await).await;
    daemon.stop();
    (site, runs)
}

/// Which of the two runs are there, whole.
async fn whole_runs(site: &Site, runs: &[Run; 2]) -> [bool; 2] {
    let small = runs[0].present(&store(site, 4096).await).await;
    let large = runs[1].present(&store(site, 50_000).await).await;
    [small, large].map(|present| {
        assert!(present.iter().all(|there| *there == present[0]), "a run lies in one file: {present:?}");
        present[0]
    })
}

/// Whichever file of a store is lost, the others go on, and what it held does not come back with the next start: its directories are
/// of the store's own key, and somebody may have purged their blocks since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_file_of_two_takes_its_own_blocks_and_no_others() {
    for lost in [0, 1] {
        for removed in [false, true] {
            let (site, runs) = stopped_with_a_run_in_each_file().await;
            let path = &site.tier_files()[lost];
            if removed {
                fs::remove_file(path).unwrap()
            } else {
                blank_superblocks(path)
            }
            let daemon = site.start_ready().await;
            assert_eq!(daemon.said().contains("no superblock"), !removed, "{}", daemon.said());
            let present = whole_runs(&site, &runs).await;
            assert!(present[0] != present[1], "file {lost}: {present:?}");
            daemon.stop();
            let daemon = site.start_ready().await;
            assert_eq!(whole_runs(&site, &runs).await, present, "file {lost}, after another start");
            daemon.stop();
        }
    }
}

/// A file of somebody else's store is not taken for a change of size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_two_stores_are_not_mixed() {
    let (site, runs) = stopped_with_a_run_in_each_file().await;
    let (other, _) = stopped_with_a_run_in_each_file().await;
    let [first, second] = site.tier_files();
    let kept = site.path("kept");
    fs::rename(&second, &kept).unwrap();
    fs::copy(&other.tier_files()[1], &second).unwrap();
    let said = support::site::refusal(&mut site.command());
    let names = [first.display().to_string(), format!("tier file {}", second.display())];
    assert!(names.iter().all(|name| said.contains(name)), "{said}");
    assert!(said.contains("belongs to another store") && said.contains("folders of one store"), "{said}");
    assert!(!said.contains("--disk"), "its size is right: {said}");
    fs::rename(&kept, &second).unwrap();
    let daemon = site.start_ready().await;
    assert_eq!(whole_runs(&site, &runs).await, [true, true], "nothing was written to either");
    daemon.stop();
}

/// Reads fail, and are misses; memory serves on, and the status page says what is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_cut_off_under_a_daemon_degrades_its_disk_and_nothing_else() {
    let (site, run) = stopped_with_blocks(50_000, 24).await;
    let daemon = site.start_ready().await;
    let of = store(&site, 50_000).await;
    assert_eq!(of.lookup(&run.keys).await.disk, [true; 24]);
    OpenOptions::new().write(true).open(site.tier_file()).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(run.present(&of).await, [false; 24]);
    assert!(degraded(&daemon).await);
    let in_memory = Run::new(&of, 2, 24);
    in_memory.put(&of).await;
    in_memory.expect(&of, Some(Tier::Host)).await;
    daemon.at_rest().await;
    assert!(daemon.said().contains("disk tier d"), "the log says so: {}", daemon.said());
    daemon.stop();
}

/// The daemon holds its file by the descriptor: a name removed is noticed at the next start, which begins empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_removed_under_a_daemon_serves_until_it_stops() {
    let (site, run) = stopped_with_blocks(50_000, 24).await;
    let daemon = site.start_ready().await;
    fs::remove_file(site.tier_file()).unwrap();
    let of = store(&site, 50_000).await;
    run.expect(&of, Some(Tier::Disk)).await;
    Run::new(&of, 2, 24).put_durably(&of).await;
    daemon.stop();
    let daemon = site.start_ready().await;
    let of = store(&site, 50_000).await;
    run.expect_nothing(&of).await;
    run.put_durably(&of).await;
    daemon.stop();
}

/// Without a disk tier a daemon is a cache in memory: nothing is durable, nothing is kept, and nothing is in the way of that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_without_disk_serves_from_memory() {
    let site = Site::new(&["--host", "64MiB", "--disk", "0"]);
    let daemon = site.start_ready().await;
    let of = store(&site, 50_000).await;
    let run = Run::new(&of, 1, 24);
    run.put(&of).await;
    run.expect(&of, Some(Tier::Host)).await;
    assert_eq!(of.lookup(&run.keys).await.disk, [false; 24]);
    let began = Instant::now();
    assert_eq!(of.durable(&run.keys).await, [false; 24]);
    assert!(began.elapsed() < Duration::from_secs(2), "there is nothing to wait for: {:?}", began.elapsed());
    assert_eq!(daemon.tier(WireTier::Disk).await.state, "off");
    // More than fits: the coldest go, and what is there is right.
    for seed in 2..80 {
        Run::new(&of, seed, 24).put_in(&of, 1).await;
    }
    assert!(daemon.counter("tender_evicted_host_total").await > 0);
    let last = Run::new(&of, 79, 24);
    last.expect(&of, Some(Tier::Host)).await;
    daemon.stop();
    assert!(!site.tier_file().exists());
    let daemon = site.start_ready().await;
    last.expect_nothing(&store(&site, 50_000).await).await;
    daemon.stop();
}
