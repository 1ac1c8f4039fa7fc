//! The tier files: opened, locked and read at a first start; while host memory is served, at any other.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::StartError;
use crate::config::{Config, Geometry};
use crate::device::block::file::{OpenError, Opened, TierFile};
use crate::device::block::{self, BlockDevice, PageFile, probe};
use crate::device::memory::{Arena, Extent};
use crate::doctor::{Finding, Verdict};
use crate::driver::{Found, Joiner};
use crate::limits;
use crate::pipeline::RecoveredFile;
use crate::request::server::random;
use crate::size::Size;
use crate::tier::disk::format::Superblock;
use crate::tier::disk::recover::{self, RecoverError};

/// Name of the tier file in the folder of that number.
pub fn tier_file_name(index: u32) -> String {
    format!("tender-{index}.tier")
}

/// The tag of a disk that nobody knows.
pub(super) const UNKNOWN: [u8; 16] = [0; 16];

/// Which disk the configuration speaks of: a worker that has the locks of its files knows that no former worker reads from them any more,
/// and nothing of any other's. BLAKE3 of the folders, first half.
pub(super) fn tag(config: &Config) -> [u8; 16] {
    let mut hash = blake3::Hasher::new_derive_key("tender.v1 disk of a worker");
    for dir in config.disk.iter().flat_map(|_| &config.dirs) {
        let name = dir.as_os_str().as_bytes();
        hash.update(&(name.len() as u64).to_le_bytes()).update(name);
    }
    std::array::from_fn(|i| hash.finalize().as_bytes()[i])
}

/// Opens the tier files and reads what they held; waits up to [`limits::LOCK_WAIT`] for the lock of each. Tells what there is to be said
/// of them, too.
pub(super) fn open(
    config: &Config,
    geometry: Geometry,
    arena: &Arc<Arena>,
) -> Result<(Found, Vec<Finding>), StartError> {
    let mut found = Found { depth: usize::MAX, ..Found::default() };
    let mut findings = Vec::new();
    let mut files = Vec::new();
    for (dir, index) in config.dirs.iter().zip(0u32..) {
        files.push(open_file(config, geometry, dir, index)?);
    }
    // From all files, before any is written to: a file that lost its superblock joins the store of the others, whichever it is.
    let (identity, page_key) = store_of(&files)?.unwrap_or_else(new_identity);
    found.page_key = page_key;
    for DiskFile { path, mut file, fresh, superblock, is_new } in files {
        let superblock = Superblock { identity, page_key, ..superblock };
        let held = if is_new { make_new(&mut file, &superblock, fresh, &path) } else { read(&mut file, &superblock) };
        let held = held.map_err(|source| StartError::Recover { path: path.clone(), source })?;
        found.recovered.push(held);
        let (device, depth) = open_device(&file, arena, fresh, &mut findings, &path)?;
        found.depth = found.depth.min(depth);
        found.devices.push(device);
    }
    Ok((found, findings))
}

/// Opens the tier files while host memory is served, and has the core take them over. Tries for as long as it takes: what keeps them from
/// being used (another process that has their lock, a disk that fails) costs what they hold, but not what host memory does.
pub(super) fn join_late(
    config: &Config,
    geometry: Geometry,
    arena: &Arc<Arena>,
    joiner: &Joiner,
    findings: &Mutex<Vec<Finding>>,
) {
    let began = Instant::now();
    let mut warned: Option<Instant> = None;
    loop {
        let joined = open(config, geometry, arena).and_then(|(found, of_disks)| {
            joiner.join(found).map_err(StartError::System)?;
            Ok(of_disks)
        });
        let error = match joined {
            Ok(of_disks) => {
                super::warn_of(&of_disks);
                findings.lock().unwrap_or_else(PoisonError::into_inner).extend(of_disks);
                return tracing::info!("the disk tier has joined after {} ms", began.elapsed().as_millis());
            }
            Err(error) => error,
        };
        if warned.is_none_or(|warned| warned.elapsed() >= limits::DISK_RETRY) {
            warned = Some(Instant::now());
            tracing::warn!(
                "the disk tier is not there: {error}. Host memory is served without it, nothing is written back, and it is tried again"
            );
        }
        // The lock was waited for already.
        if !matches!(error, StartError::Open(OpenError::Locked { .. })) {
            std::thread::sleep(limits::DISK_RETRY);
        }
    }
}

/// A tier file that is open and has the right size and geometry.
struct DiskFile {
    path: PathBuf,
    file: TierFile,
    /// It was made just now.
    fresh: bool,
    /// As found; of a new file all but identity and key.
    superblock: Superblock,
    /// It has no superblock yet.
    is_new: bool,
}

fn open_file(config: &Config, geometry: Geometry, dir: &Path, index: u32) -> Result<DiskFile, StartError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| StartError::Folder { path: dir.to_owned(), source })?;
    let path = dir.join(tier_file_name(index));
    let Opened { file, fresh } = TierFile::open(&path, geometry.file_bytes(), limits::LOCK_WAIT)?;
    let wanted = Superblock {
        file_index: index,
        file_count: config.dirs.len() as u32,
        segment_count: geometry.segment_count,
        segment_bytes: geometry.segment_bytes,
        identity: [0; 16],
        page_key: [0; 32],
    };
    match recover::superblock(&file).and_then(|found| found.map(|found| check_geometry(found, &wanted)).transpose()) {
        Ok(Some(superblock)) => Ok(DiskFile { path, file, fresh, superblock, is_new: false }),
        Ok(None) => Ok(DiskFile { path, file, fresh, superblock: wanted, is_new: true }),
        Err(source) => Err(StartError::Recover { path, source }),
    }
}

/// A superblock that says of its file what the configuration says.
fn check_geometry(found: Superblock, wanted: &Superblock) -> Result<Superblock, RecoverError> {
    let wanted = Superblock { identity: found.identity, page_key: found.page_key, ..wanted.clone() };
    if found == wanted {
        return Ok(found);
    }
    let geometry = |superblock: &Superblock| {
        format!(
            "file {} of {} with {} segments of {}",
            superblock.file_index,
            superblock.file_count,
            superblock.segment_count,
            Size(superblock.segment_bytes)
        )
    };
    Err(RecoverError::Geometry { found: geometry(&found), wanted: geometry(&wanted) })
}

/// Identity and page key of a store.
type StoreIdentity = ([u8; 16], [u8; 32]);

/// What the files that have a superblock agree on; `None` where none has one.
fn store_of(files: &[DiskFile]) -> Result<Option<StoreIdentity>, StartError> {
    let of = |file: &DiskFile| (file.superblock.identity, file.superblock.page_key);
    let mut known = files.iter().filter(|file| !file.is_new);
    let Some(first) = known.next() else { return Ok(None) };
    match known.find(|file| of(file) != of(first)) {
        Some(stranger) => Err(StartError::Recover {
            path: stranger.path.clone(),
            source: RecoverError::OtherStore { other: first.path.clone() },
        }),
        None => Ok(Some(of(first))),
    }
}

/// Makes a file part of the store.
fn make_new(
    file: &mut TierFile,
    superblock: &Superblock,
    fresh: bool,
    path: &Path,
) -> Result<RecoveredFile, RecoverError> {
    if !fresh {
        tracing::warn!(
            "tier file {} has its full size but no superblock: it begins empty, and the blocks that it may have held are gone. \
             Unless its first start was cut off, something wrote over its beginning: look for errors of the disk in the kernel's \
             log, and at who else may write there",
            path.display()
        );
    }
    recover::initialize(file, superblock, !fresh)?;
    Ok(RecoveredFile::default())
}

/// Reads what a file held.
fn read(file: &mut TierFile, superblock: &Superblock) -> Result<RecoveredFile, RecoverError> {
    // A killed daemon's last pages may be in the disk's cache only; what is read below is taken for flushed, so it must be.
    file.flush()?;
    let mut recovered = RecoveredFile::default();
    let segments = &mut recovered.segments;
    recovered.counter = recover::directories(file, superblock, |segment| segments.push(segment))?;
    Ok(recovered)
}

fn new_identity() -> StoreIdentity {
    let words: [u64; 6] = std::array::from_fn(|_| random());
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (mut identity, mut page_key) = ([0; 16], [0; 32]);
    identity.copy_from_slice(&bytes[..16]);
    page_key.copy_from_slice(&bytes[16..]);
    (identity, page_key)
}

/// Opens the device and finds the depth that it wants. A new file has nothing to read: the disk is not even asked.
fn open_device(
    file: &TierFile,
    arena: &Arc<Arena>,
    fresh: bool,
    findings: &mut Vec<Finding>,
    path: &Path,
) -> Result<(Box<dyn BlockDevice>, usize), StartError> {
    /// Most requests in flight on one file.
    const DEPTH_MAX: usize = 64;
    /// Reads of the probe: the middle of what blocks are.
    const PROBE_BYTES: u32 = 256 << 10;
    let open = |arena| block::open_device(file, arena, DEPTH_MAX).map_err(StartError::System);
    let mut depth = probe::DEPTH_UNPROBED;
    let mut measured = String::new();
    let scratch_bytes = (DEPTH_MAX as u64 * u64::from(PROBE_BYTES)).min(arena.segment_bytes());
    if !fresh {
        // Memory of its own, since blocks may lie in the arena; and so a device of its own, which ends before the other begins.
        let memory = Arc::new(Arena::new(scratch_bytes, 1).map_err(StartError::System)?);
        let (mut device, _) = open(memory)?;
        let scratch = Extent { segment: 0, offset: 0, bytes: scratch_bytes as u32 };
        let bytes = file.bytes();
        let probe = probe::probe_depth(device.as_mut(), bytes, scratch, PROBE_BYTES, random());
        depth = probe.depth;
        measured = format!(", reads {:.1} GB/s", probe.read_bytes_per_s as f64 / 1e9);
    }
    let (device, refused) = open(Arc::clone(arena))?;
    let depth = depth.clamp(1, device.depth());
    let what = format!("tier file {}", path.display());
    let found = format!("{}, depth {depth}{measured}", device.describe());
    let (verdict, cure) = match (refused, file.is_direct()) {
        (Some(refused), _) => (Verdict::Fallback, format!("io_uring: {refused}")),
        (None, false) => (Verdict::Fallback, "O_DIRECT is refused here: put --dir on ext4 or xfs".to_owned()),
        (None, true) => (Verdict::Good, String::new()),
    };
    findings.push(Finding { what, found, verdict, cure });
    Ok((device, depth))
}
