//! A worker, from configuration to the last flush: what was recovered, which threads run, when it stops.

mod disks;
mod members;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tender_proto::TenantSalt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use self::members::{Recorded, Survey};
use crate::clock::Clock;
use crate::config::{Config, Geometry};
use crate::device::block::file::OpenError;
use crate::device::block::probe;
use crate::device::memory::Arena;
use crate::device::shared::SharedFile;
use crate::doctor::{Finding, Verdict};
use crate::driver::{Driver, Found, Input};
use crate::keeper::{Handed, Keeper, KeptIngest, Sockets, records_of};
use crate::names::TenantId;
use crate::pipeline::{Core, CoreConfig, DiskConfig, TenantConfig};
use crate::request::door::{Before, Door};
use crate::request::identity::{Identities, TokenError};
use crate::request::listen::{ListenError, Listeners, Operators};
use crate::request::server::{BlocksServer, random};
use crate::size::Size;
use crate::tier::disk::format::tenant_tag;
use crate::tier::disk::recover::RecoverError;
use crate::tier::host::records::Records;
use crate::verb::Verb;
use crate::{doctor, limits, telemetry};

pub use self::disks::tier_file_name;

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
    #[error("the keeper's memory cannot be used: {0}; stop the daemon and start it anew, with empty host memory")]
    Keeper(io::Error),
    /// Threads, runtime, serving.
    #[error("the system refuses a thread or a socket: {0}")]
    System(io::Error),
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
        let own = [
            "tender-core",
            "tender-disk",
            "tender-prepare",
            "tender-promote",
            "tender-door",
            "tender-closer",
            "tender-mapper",
            "tender-join",
        ];
        if std::thread::current().name().is_some_and(|name| own.contains(&name)) {
            std::process::abort();
        }
    }));
}

/// The system ends this process when the keeper dies: it could serve on, but nobody would hold what outlives it.
fn die_with_keeper() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    Ok(())
}

/// That the memory is the one that the configuration speaks of: it is read anew by each worker, and memory goes by a tenant's place in it.
fn check_memory(config: &Config, handed: &Handed) -> io::Result<()> {
    let refuse = |why: String| {
        let why = format!("the configuration has changed: {why}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    };
    let (files, tenants) = (handed.memory.len(), config.tenants.len());
    let (bytes, wanted) = (handed.memory.iter().map(SharedFile::bytes).min().unwrap_or(0), config.host.bytes());
    if files != tenants || bytes != wanted {
        return refuse(format!(
            "memory was made for {files} tenants and {} each, but {tenants} and {} are wanted",
            Size(bytes),
            Size(wanted)
        ));
    }
    let tenants = config.tenants.iter().zip(&handed.memory_tags).zip(1..);
    let mut moved = tenants.filter(|((tenant, tag), _)| **tag != [0; 16] && **tag != tenant_tag(&tenant.name));
    match moved.next() {
        None => Ok(()),
        Some(((tenant, _), place)) => refuse(format!(
            "tenant {place} is `{}` now, but memory was made for another one in that place",
            tenant.name
        )),
    }
}

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

async fn run(config: Config, keeper: Arc<Keeper>, handed: Handed) -> Result<(), StartError> {
    let clock = Clock::start();
    let identities = Arc::new(Identities::load(&config.tenants)?);
    let salts = salts(&config)?;
    let Handed { sockets, memory, memory_tags: _, table, members, ingest, next_mapping, last_disk } = handed;
    let Sockets { unix, door, tcp } = sockets;
    let listeners = Listeners::new(unix, tcp).map_err(StartError::System)?;
    let memory: Arc<[SharedFile]> = memory.into();
    let Geometry { segment_bytes, segment_count } = config.host;
    let arena = Arena::on(&memory, segment_bytes, segment_count, config.ingest_segment_count);
    let arena = Arc::new(arena.map_err(|source| StartError::Memory { size: Size(config.host.bytes()), source })?);
    let mut findings = doctor::doctor(&config);
    findings.retain(|finding| finding.what != "socket");
    let words = table.map().map_err(StartError::Keeper)?;
    let records = Records::open(Box::new(words), records_of(&config));
    let records = records.map_err(|error| StartError::Keeper(io::Error::other(error)))?;
    // Where there is host memory to serve from, the disk joins late: a former worker's last requests may hold the lock for seconds. A
    // first start has nothing to serve, and whoever made it is there to hear why it fails.
    let (mut found, awaited) = match config.disk {
        Some(geometry) if records.is_new() => {
            let (found, of_disks) = disks::open(&config, geometry, &arena)?;
            findings.extend(of_disks);
            (found, None)
        }
        awaited => (Found { depth: probe::DEPTH_UNPROBED, ..Found::default() }, awaited),
    };
    let core_config = core_config(&config, salts, &found);
    let mut core = Core::new(core_config);
    if awaited.is_some() {
        core.await_disk();
    } else {
        for warning in core.recover(std::mem::take(&mut found.recovered)) {
            tracing::warn!("{warning}");
        }
    }
    for warning in core.recover_host(records) {
        tracing::warn!("{warning}");
    }
    let mut disk = disks::tag(&config);
    if last_disk != disk {
        let left = core.leave_loading_out_of_use();
        if left > 0 {
            // The next worker cannot know of them either that they are at rest.
            disk = disks::UNKNOWN;
            tracing::warn!(
                "{left} slots of host memory are used by nobody until the daemon is stopped and started anew: a worker before this one                  read into them from a disk that is not this one's, and may not be done. `dirs` or `disk` has changed, or the keeper is                  older and does not say"
            );
        }
    }
    let ingest = take_memory_back(&core, &arena, &keeper, ingest).map_err(StartError::Keeper)?;
    let recovered = core.counters().recovered_blocks;
    let recorded = core.local_processes().into_iter().filter_map(|attachment| {
        let (tenant, former) = core.local_process(attachment)?;
        Some(Recorded { attachment, tenant, former })
    });
    let recorded: Vec<Recorded> = recorded.collect();
    let Survey { members, renamed, forgotten, unwatched } =
        members::survey(&recorded, members).map_err(StartError::System)?;
    let kept_anew = members.iter().filter(|member| renamed.contains(&member.attachment));
    let mut kept_anew = kept_anew.map(|member| keeper.keep_member(member.attachment, member.tenant, &member.process));
    kept_anew.try_for_each(|kept| kept).map_err(StartError::Keeper)?;
    forgotten.into_iter().try_for_each(|name| keeper.forget_member(name)).map_err(StartError::Keeper)?;
    let driver = Driver::new(core, config.tenants.len(), &arena, found.devices, clock);
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
    let joiner = driver.joiner();
    let core_thread = std::thread::Builder::new().name("tender-core".to_owned()).spawn(move || driver.run());
    let core_thread = core_thread.map_err(StartError::System)?;
    if let Some(address) = config.metrics {
        telemetry::start_metrics(address).map_err(|error| StartError::Metrics(address, error))?;
    }
    let epoch = random();
    let config = Arc::new(config);
    greet(&config, &findings, recovered, awaited.is_some());
    let findings = Arc::new(Mutex::new(findings));
    let blocks = BlocksServer::new(handle.clone(), Arc::clone(&identities), epoch);
    let operators = Operators {
        core: handle.clone(),
        identities,
        config: Arc::clone(&config),
        findings: Arc::clone(&findings),
        epoch,
        keeper: Arc::clone(&keeper),
    };
    let (stop, stopped) = watch::channel(false);
    // Before anything is served: what a client was told to be stored is not lost to a signal that comes early.
    let mut asked_to_stop = std::pin::pin!(asked_to_stop().map_err(StartError::System)?);
    let server = tokio::spawn(listeners.serve(blocks, operators, stopped));
    keeper.serving(disk).map_err(StartError::Keeper)?;
    if let Some(geometry) = awaited {
        let join = move || disks::join_late(&config, geometry, &arena, &joiner, &findings);
        // It ends with the process: nothing waits for a lock that may never be had.
        std::thread::Builder::new().name("tender-join".to_owned()).spawn(join).map_err(StartError::System)?;
    }
    let (retire, retirement) = oneshot::channel();
    // Not a task of the runtime, which would wait for it at its end.
    let listening = std::thread::Builder::new().name("tender-keeper".to_owned()).spawn(move || {
        let _ = retire.send(keeper.wait_for_retirement());
    });
    listening.map_err(StartError::System)?;
    let write_back = tokio::select! {
        () = &mut asked_to_stop => Verb::Drain,
        retired = retirement => {
            if !matches!(retired, Ok(Ok(()))) {
                tracing::error!("the keeper is gone, and this worker ends with it");
                std::process::exit(1);
            }
            // Nobody is turned away: what is put meanwhile is found in host memory by the next worker.
            Verb::WriteBack
        }
    };
    tracing::info!("stopping: writing back what is only in memory, for at most {} s", limits::DRAIN.as_secs());
    // Whatever this did not manage in its time is a miss after the next start, unless host memory is found again.
    let ask = |deadline, verb| {
        let handle = &handle;
        async move { drop(handle.ask(TenantId(0), deadline, verb).await) }
    };
    end_writing(ask, write_back, asked_to_stop).await;
    stop.send_replace(true);
    /// For what is under way. Who connects from now on waits for the next worker, if one comes: the keeper's sockets take them. Streams
    /// that clients hold open (watches) end with the process.
    const LAST_WORDS: Duration = Duration::from_secs(1);
    let _ = tokio::time::timeout(LAST_WORDS, server).await;
    handle.stop();
    let (ended, end) = oneshot::channel();
    // Not a task of the runtime, which would wait for it at its end.
    let ending = std::thread::Builder::new().name("tender-end".to_owned()).spawn(move || {
        let _ = core_thread.join();
        door.stop();
        let _ = ended.send(());
    });
    ending.map_err(StartError::System)?;
    match tokio::time::timeout(limits::STOP_IO, end).await {
        Ok(_) => tracing::info!("stopped"),
        Err(_) => tracing::warn!(
            "stopped without the disk: requests to it are in flight still, {} s after all else had ended. What a client was told to be \
             durable is; the rest is in host memory alone, for a next worker. Look at the disk: the next start waits for the lock of its \
             tier file",
            limits::STOP_IO.as_secs()
        ),
    }
    Ok(())
}

/// Has the core write back. A stop that is asked for while it does so for the next worker is one: none follows, and what was put meanwhile
/// is to be on disk.
async fn end_writing<Asked: Future<Output = ()>>(
    ask: impl Fn(Duration, Verb) -> Asked,
    write_back: Verb,
    asked_to_stop: impl Future<Output = ()>,
) {
    let began = Instant::now();
    let is_last = matches!(write_back, Verb::Drain);
    let is_stopped = tokio::select! {
        biased;
        () = ask(limits::DRAIN, write_back) => false,
        () = asked_to_stop, if !is_last => true,
    };
    if is_stopped {
        let left = limits::DRAINS.saturating_sub(began.elapsed());
        ask(left.min(limits::DRAIN), Verb::Drain).await;
    }
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

/// Of a disk that is awaited, depth and key are told when it is there.
fn core_config(config: &Config, salts: Vec<TenantSalt>, found: &Found) -> CoreConfig {
    let tenants = config.tenants.iter().zip(salts).map(|(tenant, salt)| TenantConfig {
        name: tenant.name.clone(),
        salt,
        host_quota_bytes: tenant.host_quota.map(|size| size.0),
        disk_quota_bytes: tenant.disk_quota.map(|size| size.0),
    });
    let file_count = config.dirs.len() as u32;
    let disk = config.disk.map(|geometry| DiskConfig {
        segment_bytes: geometry.segment_bytes,
        segment_count: geometry.segment_count * file_count,
        file_count,
        depth: found.depth,
        page_key: found.page_key,
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

/// Says what is not as it could be.
fn warn_of(findings: &[Finding]) {
    for finding in findings.iter().filter(|finding| finding.verdict != Verdict::Good) {
        tracing::warn!("{}: {}. {}", finding.what, finding.found, finding.cure);
    }
}

fn greet(config: &Config, findings: &[Finding], recovered: u64, is_warm: bool) {
    warn_of(findings);
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
        let place = if is_warm { "in host memory; the disk joins later" } else { "from disk" };
        eprintln!("  recovered   {recovered} blocks {place}");
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What a core is asked that comes to the end of its write-back for the next worker, or never does.
    async fn asked(write_back: Verb, ends: bool, is_stopped: bool) -> Vec<(bool, Duration)> {
        let asked = RefCell::new(Vec::new());
        let ask = |deadline, verb: Verb| {
            let is_drain = matches!(verb, Verb::Drain);
            asked.borrow_mut().push((is_drain, deadline));
            async move {
                if !is_drain && !ends {
                    std::future::pending::<()>().await;
                }
            }
        };
        let asked_to_stop = async {
            if !is_stopped {
                std::future::pending::<()>().await;
            }
        };
        end_writing(ask, write_back, asked_to_stop).await;
        asked.into_inner()
    }

    #[tokio::test]
    async fn a_stop_that_comes_while_the_worker_is_replaced_is_a_stop() {
        assert_eq!(asked(Verb::WriteBack, true, false).await, [(false, limits::DRAIN)]);
        assert_eq!(asked(Verb::Drain, true, true).await, [(true, limits::DRAIN)]);
        assert_eq!(asked(Verb::WriteBack, false, true).await, [(false, limits::DRAIN), (true, limits::DRAIN)]);
    }
}
