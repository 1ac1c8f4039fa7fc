//! A worker, from configuration to the last flush: what was recovered, which threads run, when it stops.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tender_proto::TenantSalt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use crate::clock::Clock;
use crate::config::{Config, Geometry};
use crate::device::block::file::{OpenError, Opened, TierFile};
use crate::device::block::{self, BlockDevice, PageFile};
use crate::device::memory::{Arena, Extent};
use crate::device::shared::SharedFile;
use crate::doctor::{Finding, Verdict};
use crate::driver::{Driver, Input};
use crate::keeper::{Handed, Keeper, KeptIngest, Sockets, records_of};
use crate::names::{AttachmentId, TenantId};
use crate::pipeline::{Core, CoreConfig, DiskConfig, RecoveredFile, TenantConfig};
use crate::request::door::{Before, Door};
use crate::request::identity::{Identities, TokenError};
use crate::request::listen::{ListenError, Listeners, Operators};
use crate::request::server::{BlocksServer, random};
use crate::size::Size;
use crate::tier::disk::format::Superblock;
use crate::tier::disk::recover::{self, RecoverError};
use crate::tier::host::records::Records;
use crate::verb::Verb;
use crate::{doctor, limits, telemetry};

/// Why a daemon does not start. Each says what, why, and the cure.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A token file.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A tier file.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What a tier file holds.
    #[error("tier file {path}: {source}")]
    Recover {
        /// Which.
        path: PathBuf,
        /// Why.
        source: RecoverError,
    },
    /// A folder.
    #[error("cannot make folder {path}: {source}; give a --dir that this user may write to")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Memory.
    #[error("cannot reserve {size} of memory: {source}; give less with --host")]
    Memory {
        /// How much.
        size: Size,
        /// Why.
        source: io::Error,
    },
    /// The secret of the salts.
    #[error("cannot read salt_secret_file {path}: {source}")]
    Secret {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log's filter.
    #[error("log is `{0}`: {1}; write a level such as info, or a filter such as info,tender_kvstore=debug")]
    Log(String, String),
    /// The metrics page.
    #[error("cannot serve metrics on {0}: {1}; give another --metrics, or none")]
    Metrics(std::net::SocketAddr, String),
    /// What the keeper hands over.
    #[error("the keeper's memory cannot be used: {0}; stop the daemon and start it anew")]
    Keeper(io::Error),
    /// Threads, runtime, serving.
    #[error("the system refuses a thread or a socket: {0}")]
    System(io::Error),
}

/// Name of the tier file in the folder of that number.
pub fn tier_file_name(index: u32) -> String {
    format!("tender-{index}.tier")
}

/// Runs a worker until SIGTERM or SIGINT, or until the keeper behind `socket` wants another one; then writes back what is only in memory,
/// for a while, and returns. Ends with the keeper.
pub fn work(config: Config, socket: OwnedFd) -> Result<(), StartError> {
    telemetry::start_log(&config.log, config.log_format).map_err(|error| StartError::Log(config.log.clone(), error))?;
    stop_on_broken_invariant();
    die_with_keeper().map_err(StartError::Keeper)?;
    let (keeper, handed) = Keeper::meet(socket, config.host.segment_bytes).map_err(StartError::Keeper)?;
    check_memory(&config, &handed).map_err(StartError::Keeper)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8))
        .thread_name("tender-grpc")
        .enable_all()
        .build()
        .map_err(StartError::System)?;
    runtime.block_on(run(config, Arc::new(keeper), handed))
}

/// A panic of the core, or of a thread that it counts on, ends the process: a daemon that lives on without them answers nothing. A
/// panic in a request's task ends that request alone.
fn stop_on_broken_invariant() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let own = ["tender-core", "tender-disk", "tender-prepare", "tender-promote", "tender-door", "tender-mapper"];
        if std::thread::current().name().is_some_and(|name| own.contains(&name)) {
            std::process::abort();
        }
    }));
}

/// What the files are, once open.
struct Disks {
    devices: Vec<Box<dyn BlockDevice>>,
    recovered: Vec<RecoveredFile>,
    page_key: [u8; 32],
    depth: usize,
    findings: Vec<Finding>,
}

/// The system ends this process when the keeper dies: it could serve on, but nobody would hold what outlives it.
fn die_with_keeper() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(())
}

/// That the memory is the one that the configuration speaks of: another worker's may have been started from another one.
/// Maps what holds blocks from before, as it is. What clients were offered and did not use yet is forgotten.
fn take_memory_back(
    core: &Core,
    arena: &Arena,
    keeper: &Keeper,
    ingest: Vec<KeptIngest>,
) -> io::Result<Vec<KeptIngest>> {
    let in_use = core.segments_in_use();
    for &(segment, tenant) in in_use.iter().filter(|(segment, _)| !arena.is_ingest(*segment)) {
        arena.prepare(segment, tenant, false)?;
    }
    let (used, unused): (Vec<_>, Vec<_>) =
        ingest.into_iter().partition(|memory| in_use.iter().any(|(segment, _)| *segment == memory.segment));
    for memory in &used {
        arena.install(memory.segment, &memory.file, 0, memory.file.bytes())?;
    }
    for memory in unused {
        keeper.forget_ingest(memory.segment)?;
    }
    let has = |segment: u32| used.iter().any(|memory| memory.segment == segment);
    match in_use.iter().find(|(segment, _)| arena.is_ingest(*segment) && !has(*segment)) {
        None => Ok(used),
        Some((segment, _)) => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("segment {segment} of host memory is recorded, and the keeper does not have it"),
        )),
    }
}

fn check_memory(config: &Config, handed: &Handed) -> io::Result<()> {
    let (files, tenants) = (handed.memory.len(), config.tenants.len());
    let (bytes, wanted) = (handed.memory.iter().map(SharedFile::bytes).min().unwrap_or(0), config.host.bytes());
    if files == tenants && bytes == wanted {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "the configuration has changed: memory was made for {files} tenants and {} each, but {tenants} and {} are wanted",
            Size(bytes),
            Size(wanted)
        ),
    ))
}

async fn run(config: Config, keeper: Arc<Keeper>, handed: Handed) -> Result<(), StartError> {
    let clock = Clock::start();
    let identities = Arc::new(Identities::load(&config.tenants)?);
    let salts = salts(&config)?;
    let Handed { sockets, memory, table, members, ingest, next_mapping } = handed;
    let Sockets { unix, door, tcp } = sockets;
    let listeners = Listeners::new(unix, tcp).map_err(StartError::System)?;
    let memory: Arc<[SharedFile]> = memory.into();
    let Geometry { segment_bytes, segment_count } = config.host;
    let arena = Arena::on(&memory, segment_bytes, segment_count, config.ingest_segment_count);
    let arena = Arc::new(arena.map_err(|source| StartError::Memory { size: Size(config.host.bytes()), source })?);
    let mut findings = doctor::doctor(&config);
    findings.retain(|finding| finding.what != "socket");
    let disks = match config.disk {
        None => None,
        Some(geometry) => Some(open_disks(&config, geometry, &arena)?),
    };
    let core_config = core_config(&config, salts, disks.as_ref());
    let mut core = Core::new(core_config);
    let mut devices = Vec::new();
    if let Some(disks) = disks {
        for warning in core.recover(disks.recovered) {
            tracing::warn!("{warning}");
        }
        findings.extend(disks.findings);
        devices = disks.devices;
    }
    let words = table.map().map_err(StartError::Keeper)?;
    let records = Records::open(Box::new(words), records_of(&config));
    let records = records.map_err(|error| StartError::Keeper(io::Error::other(error)))?;
    for warning in core.recover_host(records) {
        tracing::warn!("{warning}");
    }
    let ingest = take_memory_back(&core, &arena, &keeper, ingest).map_err(StartError::Keeper)?;
    let recovered = core.counters().recovered_blocks;
    // It had been let in, and died before anybody was to watch it: it was granted nothing.
    let unwatched: Vec<AttachmentId> = core
        .local_processes()
        .into_iter()
        .filter(|local| members.iter().all(|member| member.attachment != *local))
        .collect();
    let driver = Driver::new(core, config.tenants.len(), &arena, devices, clock);
    let (mut driver, handle) = driver.map_err(StartError::System)?;
    for memory in &ingest {
        driver.name_mapping(memory.segment, memory.mapping);
    }
    for attachment in unwatched {
        // The queue is empty, and the core has not begun.
        let _ = driver.queue().try_send(Input::Gone(attachment));
    }
    let before = Before { members, ingest, next_mapping };
    let door = Door::open(door, memory, Arc::clone(&arena), driver.queue(), Arc::clone(&keeper), before);
    let door = door.map_err(StartError::System)?;
    driver.serve_door(door.queue());
    let core_thread = std::thread::Builder::new().name("tender-core".to_owned()).spawn(move || driver.run());
    let core_thread = core_thread.map_err(StartError::System)?;
    if let Some(address) = config.metrics {
        telemetry::start_metrics(address).map_err(|error| StartError::Metrics(address, error))?;
    }
    let epoch = random();
    let config = Arc::new(config);
    greet(&config, &findings, recovered);
    let blocks = BlocksServer::new(handle.clone(), Arc::clone(&identities), epoch);
    let operators = Operators {
        core: handle.clone(),
        identities,
        config: Arc::clone(&config),
        findings: Arc::new(findings),
        epoch,
        keeper: Arc::clone(&keeper),
    };
    let (stop, stopped) = watch::channel(false);
    // Before anything is served: what a client was told to be stored is not lost to a signal that comes early.
    let asked_to_stop = asked_to_stop().map_err(StartError::System)?;
    let server = tokio::spawn(listeners.serve(blocks, operators, stopped));
    keeper.serving().map_err(StartError::Keeper)?;
    let (retire, retirement) = oneshot::channel();
    // Not a task of the runtime, which would wait for it at its end.
    let listening = std::thread::Builder::new().name("tender-keeper".to_owned()).spawn(move || {
        let _ = retire.send(keeper.wait_for_retirement());
    });
    listening.map_err(StartError::System)?;
    tokio::select! {
        () = asked_to_stop => {}
        retired = retirement => {
            if !matches!(retired, Ok(Ok(()))) {
                tracing::error!("the keeper is gone, and this worker ends with it");
                std::process::exit(1);
            }
        }
    }
    tracing::info!("stopping: writing back what is only in memory, for at most {} s", limits::DRAIN.as_secs());
    // Whatever the drain did not manage in its time is a miss after the next start.
    let _ = handle.ask(TenantId(0), limits::DRAIN, Verb::Drain).await;
    stop.send_replace(true);
    /// Streams that clients hold open (watches) end with the process.
    const LAST_WORDS: Duration = Duration::from_secs(1);
    let _ = tokio::time::timeout(LAST_WORDS, server).await;
    handle.stop();
    let _ = tokio::task::spawn_blocking(move || (core_thread.join(), door.stop())).await;
    tracing::info!("stopped");
    Ok(())
}

/// Resolves at SIGTERM or SIGINT, which from this call on do not end the process by themselves.
fn asked_to_stop() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn salts(config: &Config) -> Result<Vec<TenantSalt>, StartError> {
    let secret = match &config.salt_secret_file {
        None => Vec::new(),
        Some(path) => std::fs::read(path).map_err(|source| StartError::Secret { path: path.clone(), source })?,
    };
    Ok(config.tenants.iter().map(|tenant| TenantSalt::of_tenant(&secret, &tenant.name)).collect())
}

fn core_config(config: &Config, salts: Vec<TenantSalt>, disks: Option<&Disks>) -> CoreConfig {
    let tenants = config.tenants.iter().zip(salts).map(|(tenant, salt)| TenantConfig {
        name: tenant.name.clone(),
        salt,
        host_quota_bytes: tenant.host_quota.map(|size| size.0),
        disk_quota_bytes: tenant.disk_quota.map(|size| size.0),
    });
    let file_count = config.dirs.len() as u32;
    let disk = config.disk.zip(disks).map(|(geometry, disks)| DiskConfig {
        segment_bytes: geometry.segment_bytes,
        segment_count: geometry.segment_count * file_count,
        file_count,
        depth: disks.depth,
        page_key: disks.page_key,
    });
    CoreConfig {
        tenants: tenants.collect(),
        host_segment_bytes: config.host.segment_bytes,
        host_segment_count: config.host.segment_count,
        ingest_segment_count: config.ingest_segment_count,
        disk,
        write_bytes_per_day: config.write_budget_per_day.map(|size| size.0),
        allow_public: config.allow_public,
        seed: random(),
    }
}

fn open_disks(config: &Config, geometry: Geometry, arena: &Arc<Arena>) -> Result<Disks, StartError> {
    let mut disks = Disks {
        devices: Vec::new(),
        recovered: Vec::new(),
        page_key: [0; 32],
        depth: usize::MAX,
        findings: Vec::new(),
    };
    let mut files = Vec::new();
    for (dir, index) in config.dirs.iter().zip(0u32..) {
        files.push(open_file(config, geometry, dir, index)?);
    }
    // From all files, before any is written to: a file that lost its superblock joins the store of the others, whichever it is.
    let (identity, page_key) = store_of(&files)?.unwrap_or_else(new_identity);
    disks.page_key = page_key;
    for DiskFile { path, mut file, fresh, superblock, is_new } in files {
        let superblock = Superblock { identity, page_key, ..superblock };
        let held = if is_new { make_new(&mut file, &superblock, fresh, &path) } else { read(&mut file, &superblock) };
        let held = held.map_err(|source| StartError::Recover { path: path.clone(), source })?;
        disks.recovered.push(held);
        let (device, depth) = open_device(&file, arena, fresh, &mut disks.findings, &path)?;
        disks.depth = disks.depth.min(depth);
        disks.devices.push(device);
    }
    Ok(disks)
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
    let (mut device, refused) = block::open_device(file, Arc::clone(arena), DEPTH_MAX).map_err(StartError::System)?;
    let mut depth = block::probe::DEPTH_UNPROBED;
    let mut measured = String::new();
    let scratch_bytes = (DEPTH_MAX as u64 * u64::from(PROBE_BYTES)).min(arena.segment_bytes());
    if !fresh {
        // Nothing is in the arena yet, so its first segment can be read into.
        let scratch = Extent { segment: 0, offset: 0, bytes: scratch_bytes as u32 };
        let bytes = file.bytes();
        let probe = block::probe::probe_depth(device.as_mut(), bytes, scratch, PROBE_BYTES, random());
        depth = probe.depth;
        measured = format!(", reads {:.1} GB/s", probe.read_bytes_per_s as f64 / 1e9);
    }
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

fn greet(config: &Config, findings: &[Finding], recovered: u64) {
    for finding in findings.iter().filter(|finding| finding.verdict != Verdict::Good) {
        tracing::warn!("{}: {}. {}", finding.what, finding.found, finding.cure);
    }
    let disk = match config.disk {
        None => "no disk".to_owned(),
        Some(disk) => {
            let dirs: Vec<String> = config.dirs.iter().map(|dir| dir.display().to_string()).collect();
            format!("{} of disk in {}", Size(disk.bytes() * config.dirs.len() as u64), dirs.join(", "))
        }
    };
    let socket = config.socket.display();
    eprintln!("tender {}: {} of host memory, {disk}", env!("CARGO_PKG_VERSION"), Size(config.host.bytes()));
    if recovered > 0 {
        eprintln!("  recovered   {recovered} blocks from disk");
    }
    eprintln!("  socket      {socket}");
    if let Some(address) = config.listen {
        eprintln!("  address     {address} (with a token)");
    }
    if let Some(address) = config.metrics {
        eprintln!("  metrics     http://{address}/metrics");
    }
    if config.socket == crate::config::default_socket() {
        eprintln!("  try next    tender status");
    } else {
        eprintln!("  try next    tender status --socket {socket}");
    }
}
