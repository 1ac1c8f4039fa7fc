//! The worker is killed while its requests are on their way to a slow disk; the system carries them out all the same, seconds later. Or it
//! is stopped meanwhile, and does not wait for them.
//!
//! Needs a virtual machine with a disk whose speed can be changed. `TENDER_RDMA_VM` names a program that boots one on the files of this
//! system and runs a command in it as root, with an empty disk at [`DEVICE`]: `$TENDER_RDMA_VM --hosts 0 --disk 16G --timeout 900 -- COMMAND`.
//!
//! ```text
//!  tier file on ext4    directories, what was never written    blocks to be loaded    the rest of the file
//!  reads                at once                                delayed                at once
//!  writes               delayed                                delayed                delayed
//! ```
//! So the next worker, which serves at once, is not held up by the delay, and would meet them if it used what they write to.

use std::fmt::Write as _;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tender_client::proto::Shard;
use tender_client::proto::wire::Tier;
use tender_client::{BlockStore, PutOutcome, Remote};
use tokio::time::sleep;

use crate::leases::lease;
use crate::raw::Raw;
use crate::support::blocks::Run;
use crate::support::site::Running;
use crate::support::{PATIENCE, last_object, run, tender, until};
use crate::{HOST_BYTES, LARGE, SMALL, attach_as, client, site, store_bytes};

/// Set where the disk is there to be written over.
const IN_MACHINE: &str = "LATE_IO_IN_MACHINE";

const DEVICE: &str = "/dev/nvme0n1";
const SECTOR_BYTES: u64 = 512;

/// Requests go from here to the device, at once or later.
const SLOW: &str = "slow";

/// Requests go from here to the slow one, and are counted, which a device that delays them does not do. This one is mounted.
const COUNTED: &str = "counted";

/// Long enough for memory to be filled, on a slow machine too, before the dead worker's last request has ended.
const DELAY: Duration = Duration::from_secs(10);

/// Blocks that are on their way from the disk when the worker is killed: as many as are in flight at a time on a new file, with the writes.
const LOADED: usize = 24;

#[test]
fn requests_of_a_dead_worker_that_end_late_change_nothing() {
    let Some(machine) = std::env::var_os("TENDER_RDMA_VM") else {
        return eprintln!("SKIPPED: TENDER_RDMA_VM names no program that runs a command in a virtual machine");
    };
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(machine);
    command.args(["--hosts", "0", "--disk", "16G", "--timeout", "900", "--"]).arg(std::env::current_exe().unwrap());
    command.args(["late_io::in_a_machine", "--exact", "--ignored", "--nocapture"]);
    let status = command.env(IN_MACHINE, "1").current_dir(&folder).status().unwrap();
    assert!(status.success(), "{status}: see above what was said in the virtual machine");
}

/// No test where no machine was booted for it: it makes a file system on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "what another test runs in a virtual machine"]
async fn in_a_machine() {
    if std::env::var_os(IN_MACHINE).is_none() {
        return;
    }
    let disk = SlowDisk::make();
    what_a_dead_worker_was_loading_is_not_used_before_it_has_ended(&disk).await;
    a_replay_goes_on_through_the_deaths_of_workers(&disk);
    a_stop_leaves_what_a_stalled_disk_has_in_flight(&disk).await;
}

/// A file system on a device that can be made slow, part by part.
struct SlowDisk {
    sectors: u64,
    /// Where the system says how much is on its way.
    in_flight: PathBuf,
}

/// How long reads and writes of some sectors take, in milliseconds.
type Slow = (Range<u64>, u64, u64);

impl SlowDisk {
    fn make() -> Self {
        let mut beginning = vec![0; 1 << 20];
        File::open(DEVICE).unwrap().read_exact_at(&mut beginning, 0).unwrap();
        assert!(beginning.iter().all(|&byte| byte == 0), "{DEVICE} is not empty, and is left alone");
        let sectors = tool("blockdev", &["--getsz", DEVICE]).trim().parse().unwrap();
        tool("modprobe", &["dm-delay"]);
        tool("dmsetup", &["create", SLOW, "--table", &format!("0 {sectors} linear {DEVICE} 0")]);
        tool("dmsetup", &["create", COUNTED, "--table", &format!("0 {sectors} linear /dev/mapper/{SLOW} 0")]);
        let number = tool("dmsetup", &["info", "--columns", "--noheadings", "-o", "minor", COUNTED]);
        let in_flight = PathBuf::from(format!("/sys/class/block/dm-{}/inflight", number.trim()));
        Self { sectors, in_flight }
    }

    /// Mounts a new file system there.
    fn mount(&self, place: &Path) {
        std::fs::create_dir_all(place).unwrap();
        let device = format!("/dev/mapper/{COUNTED}");
        tool("mkfs.ext4", &["-q", "-F", &device]);
        tool("mount", &["-o", "noinit_itable", &device, place.to_str().unwrap()]);
    }

    /// Makes these parts slow, which come in their order, and all others fast. What was delayed is done at once.
    fn slow_down(&self, parts: &[Slow]) {
        let (mut table, mut at) = (String::new(), 0);
        let linear = |table: &mut String, from: u64, to: u64| {
            if from < to {
                writeln!(table, "{from} {} linear {DEVICE} {from}", to - from).unwrap();
            }
        };
        for (Range { start, end }, read_ms, write_ms) in parts {
            linear(&mut table, at, *start);
            let at_ms = |delay_ms: u64| format!("{DEVICE} {start} {delay_ms}");
            let (reads, writes, flushes) = (at_ms(*read_ms), at_ms(*write_ms), at_ms(0));
            writeln!(table, "{start} {} delay {reads} {writes} {flushes}", end - start).unwrap();
            at = *end;
        }
        linear(&mut table, at, self.sectors);
        tool("dmsetup", &["load", SLOW, "--table", table.trim_end()]);
        tool("dmsetup", &["resume", SLOW]);
    }

    /// Reads and writes that are on their way.
    fn in_flight(&self) -> (u64, u64) {
        let numbers = std::fs::read_to_string(&self.in_flight).unwrap();
        let mut numbers = numbers.split_whitespace().map(|number| number.parse().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
    }
}

/// A part of a file.
struct Extent {
    /// Its sectors in the file.
    sectors: Range<u64>,
    /// Its first sector on the device.
    place: u64,
    is_written: bool,
}

fn extents(file: &Path) -> Vec<Extent> {
    let said = tool("filefrag", &["-v", "-b512", file.to_str().unwrap()]);
    let range = |text: &str| {
        let (first, last) = text.split_once("..")?;
        Some(first.trim().parse::<u64>().ok()?..last.trim().parse::<u64>().ok()? + 1)
    };
    let extent = |line: &str| {
        let mut fields = line.split(':').skip(1);
        let (sectors, place) = (range(fields.next()?)?, range(fields.next()?)?.start);
        Some(Extent { sectors, place, is_written: !line.contains("unwritten") })
    };
    said.lines().filter_map(extent).collect()
}

/// Has writes to all of a file take their time, and reads of a part of it.
fn slow_parts(file: &Path, read: &Range<u64>) -> Vec<Slow> {
    let delay_ms = DELAY.as_millis() as u64;
    let mut parts: Vec<Slow> = Vec::new();
    for Extent { sectors: Range { start, end }, place, .. } in extents(file) {
        let cuts = [start, read.start.clamp(start, end), read.end.clamp(start, end), end];
        for (cut, read_ms) in cuts.windows(2).zip([0, delay_ms, 0]) {
            if cut[0] < cut[1] {
                parts.push((place + cut[0] - start..place + cut[1] - start, read_ms, delay_ms));
            }
        }
    }
    parts.sort_by_key(|(sectors, ..)| sectors.start);
    parts
}

/// The sectors of a tier file in which the blocks of a run lie.
fn sectors_of(run: &Run, file: &Path) -> Range<u64> {
    const PAGE_BYTES: usize = 4096;
    let beginnings: Vec<_> = (0..run.keys.len()).map(|block| run.payload(block).slice(..16)).collect();
    let is_one = |page: &[u8]| beginnings.iter().any(|beginning| page.starts_with(beginning));
    let mut found = Vec::new();
    for Extent { sectors: Range { start, end }, .. } in extents(file).into_iter().filter(|extent| extent.is_written) {
        let mut bytes = vec![0; ((end - start) * SECTOR_BYTES) as usize];
        File::open(file).unwrap().read_exact_at(&mut bytes, start * SECTOR_BYTES).unwrap();
        let pages = bytes.chunks(PAGE_BYTES).zip((start * SECTOR_BYTES..).step_by(PAGE_BYTES));
        found.extend(pages.filter(|(page, _)| is_one(page)).map(|(_, at)| at));
    }
    found.sort_unstable();
    assert_eq!(found.len(), run.keys.len(), "where the blocks lie");
    let (first, last) = (found[0], found[found.len() - 1]);
    assert!(last - first < 4 << 20, "blocks that were put together lie together");
    first / SECTOR_BYTES..(last + run.payload(0).len() as u64).div_ceil(SECTOR_BYTES)
}

fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

async fn is_on_disk_alone(store: &Remote, run: &Run) -> bool {
    let found = store.lookup(&run.keys).await;
    found.disk.iter().all(|&on_disk| on_disk) && !found.host.contains(&true)
}

async fn at_rest(daemon: &Running) {
    until("the end of all write-backs", async || {
        daemon.tier(Tier::Host).await.busy_slots + daemon.tier(Tier::Disk).await.busy_slots == 0
    })
    .await;
}

/// Puts other blocks until late requests may end, which nothing is put over then; compares them when all have ended, and goes on until
/// memory was filled twice: all that was put, the last run last, and when the first block had been.
async fn fill(store: &Remote, seed: u32, late: &Range<Instant>) -> (Vec<Run>, Instant) {
    let (mut runs, mut stored, mut first, mut is_compared) = (Vec::<Run>::new(), 0, None, false);
    let (began, block_bytes) = (Instant::now(), store.terms().shard_bytes(1) as u64);
    for seed in seed.. {
        let run = Run::new(store, seed, 64);
        let outcomes = run.put_in(store, 1).await;
        match outcomes.iter().filter(|outcome| **outcome == PutOutcome::Stored).count() as u64 {
            0 => sleep(Duration::from_millis(5)).await,
            count => {
                first = first.or(Some(Instant::now()));
                stored += count * block_bytes;
                runs.push(run);
            }
        }
        if Instant::now() > late.start && !is_compared {
            is_compared = true;
            tokio::time::sleep_until(late.end.into()).await;
            let mut found = 0;
            for run in runs.iter().rev() {
                found += run.present(store).await.iter().filter(|&&is_there| is_there).count();
            }
            println!("{found} of {} blocks of {block_bytes} bytes compared", runs.len() * 64);
        }
        if is_compared && stored > 2 * HOST_BYTES {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{stored} bytes were stored");
    }
    (runs, first.expect("something was stored"))
}

async fn what_a_dead_worker_was_loading_is_not_used_before_it_has_ended(disk: &SlowDisk) {
    let site = site("12GiB");
    disk.mount(&site.path("data"));
    let daemon = site.start_ready().await;
    let reader = Arc::new(client(&site, false, attach_as("reader", "model", SMALL)).await);
    let filler = client(&site, false, attach_as("filler", "model", SMALL)).await;
    let other = client(&site, true, attach_as("other", "model", LARGE)).await;

    // Written by this worker, so that it reads them in place; then on disk alone.
    let loaded = Run::new(&*reader, 1, LOADED);
    loaded.put_durably(&*reader).await;
    let leased = Run::new(&filler, 2, 100);
    leased.put(&filler).await;
    let views = lease(&reader, &leased).await;
    let mut seed = 1_000;
    until("room for other blocks", async || {
        store_bytes(&filler, seed, HOST_BYTES / 2).await;
        seed += 1_000;
        is_on_disk_alone(&filler, &loaded).await
    })
    .await;
    at_rest(&daemon).await;
    let mut writer = Raw::open(&site.socket(), None, &attach_as("writer", "model", SMALL)).await;
    let written = writer.run(3, 24);
    let slots = writer.reserve(&written);
    for (block, slot) in slots.iter().enumerate() {
        writer.fill(slot, &written.payload(block)[..SMALL as usize / 2]);
    }
    let sectors = sectors_of(&loaded, &site.tier_file());
    disk.slow_down(&slow_parts(&site.tier_file(), &sectors));

    // Few enough writes that reads have a place beside them.
    let put_late = Run::new(&filler, 4, 8);
    put_late.put(&filler).await;
    until("writes on their way", async || disk.in_flight().1 > 0).await;
    let began = Instant::now();
    let got = tokio::spawn({
        let (reader, keys) = (Arc::clone(&reader), loaded.keys.clone());
        async move { reader.get(&keys, Shard::WHOLE).await }
    });
    until("reads on their way", async || disk.in_flight().0 > 0).await;
    daemon.kill_worker();
    let on_their_way = disk.in_flight();
    assert!(on_their_way.0 > 0 && on_their_way.1 > 0 && began.elapsed() < DELAY, "nothing ends late");
    // Whatever was loaded when nobody waited for the end has arrived before anything is compared.
    let late = began + DELAY - Duration::from_secs(2)..began + DELAY + Duration::from_millis(500);
    let next = async { tokio::join!(fill(&filler, 100_000, &late), fill(&other, 200_000, &late)) };
    let last = async {
        // Writes of the next worker's own may hide that the last one has ended.
        until("the end of what was on its way", async || disk.in_flight().0 == 0).await;
        Instant::now()
    };
    let (((filled, granted), (filled_other, granted_other)), ended) = tokio::join!(next, last);
    let granted = granted.min(granted_other);
    disk.slow_down(&[]);
    println!(
        "{on_their_way:?} on their way at the death, ended after {:?}, memory granted after {:?}",
        ended - began,
        granted - began
    );

    // The newest first: what is still in host memory is where a late read might have arrived.
    for (store, runs) in [(&filler, &filled), (&other, &filled_other)] {
        let mut found = 0;
        for run in runs.iter().rev() {
            found += run.present(store).await.iter().filter(|&&is_there| is_there).count();
        }
        assert!(found * store.terms().shard_bytes(1) >= 8 << 20, "{found} blocks to compare");
    }
    assert!(leased.equals(&views), "leased bytes changed");
    let late = got.await.unwrap();
    assert!(loaded.equals(&late.blocks), "wrong bytes");
    until("the disk's return", async || filler.lookup(&loaded.keys).await.disk.iter().all(|&on_disk| on_disk)).await;
    loaded.expect(&*reader, None).await;
    put_late.present(&filler).await;

    assert_eq!(filler.lookup(&written.keys).await.prefix_blocks, 0, "half of a block was published");
    let mut writer = writer.come_again(&site.socket(), None, &attach_as("writer", "model", SMALL)).await;
    assert_eq!(writer.confirm(&slots), slots.len(), "a reservation was lost");
    writer.fill_and_commit(&written, &slots);
    written.expect(&filler, None).await;
    writer.leave();
    assert!(granted < ended, "host memory was not served before the dead worker's last request had ended");
    assert_eq!(daemon.counter("tender_sum_mismatches_total").await, 0, "a block was written over on disk");
    drop(views);
    daemon.stop();
    tool("umount", &[site.path("data").to_str().unwrap()]);
}

/// Conversations that are taken up again when their blocks are on disk alone; a new block is put with every answer.
fn a_replay_goes_on_through_the_deaths_of_workers(disk: &SlowDisk) {
    let folder = tempfile::tempdir().unwrap();
    let place: PathBuf = folder.path().join("disk");
    disk.mount(&place);
    let (mut text, mut chains) = (String::new(), Vec::<Vec<u64>>::new());
    for request in 0..900 {
        let mut chain = if request < 300 { vec![0, 1] } else { chains[request - 300].clone() };
        chain.extend((0..4).map(|block| (1000 + request * 10 + block) as u64));
        let (timestamp, tokens) = (request * 50, chain.len() * 512 - 100);
        writeln!(text, r#"{{"timestamp":{timestamp},"input_length":{tokens},"output_length":9,"hash_ids":{chain:?}}}"#)
            .unwrap();
        chains.push(chain);
    }
    let trace = folder.path().join("trace.jsonl");
    std::fs::write(&trace, text).unwrap();
    disk.slow_down(&[(0..disk.sectors, 20, 400)]);
    let mut command = tender();
    command.arg("replay").arg(&trace).arg("--dir").arg(&place);
    command.args(["--host", "64MiB", "--disk", "512MiB", "--block-bytes", "64KiB", "--json"]);
    command.args(["--speed", "1x", "--kill-worker-every", "6"]);
    let object = last_object(&run(&mut command));
    println!("{object}");
    disk.slow_down(&[]);
    let number = |name: &str| object[name].as_u64().unwrap_or_else(|| panic!("no {name} in {object}"));
    assert_eq!((number("requests"), number("wrong_blocks")), (900, 0));
    assert!(number("killed_workers") > 1 && number("hit_blocks_disk") > 0 && number("hit_blocks_host") > 0);
    tool("umount", &[place.to_str().unwrap()]);
}

async fn a_stop_leaves_what_a_stalled_disk_has_in_flight(disk: &SlowDisk) {
    let site = site("12GiB");
    disk.mount(&site.path("data"));
    let daemon = site.start_ready().await;
    let store = client(&site, false, attach_as("group", "model", LARGE)).await;
    let safe = Run::new(&store, 1, 8);
    safe.put_durably(&store).await;
    let lost = Run::new(&store, 2, 8);
    lost.put(&store).await;
    store.close().await;
    let began = Instant::now();
    disk.slow_down(&[(0..disk.sectors, 0, PATIENCE.as_millis() as u64)]);
    daemon.stop();
    assert!(disk.in_flight().1 > 0, "it waited for what was in flight");
    println!("stopped after {:?} with {:?} in flight", began.elapsed(), disk.in_flight());
    let said = std::fs::read_to_string(site.path("daemon.log")).unwrap();
    assert!(said.contains("stopped without the disk"), "{said}");
    disk.slow_down(&[]);
    let daemon = site.start_ready().await;
    let store = client(&site, false, attach_as("group", "model", LARGE)).await;
    safe.expect(&store, Some(tender_client::Tier::Disk)).await;
    lost.present(&store).await;
    store.close().await;
    daemon.stop();
    tool("umount", &[site.path("data").to_str().unwrap()]);
}
