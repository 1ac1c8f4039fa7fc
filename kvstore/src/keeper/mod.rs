//! The keeper: the process that `tender serve` is. It holds what must outlive a crash or an upgrade of the daemon, and starts the worker,
//! which does everything else.
//!
//! ```text
//!            keeper                                        worker (its child)
//!  sockets, shared memory, records  ──handed over──►  serves; its crash loses no host memory:
//!  pidfds and memory of clients     ◄──deposited───   the next one finds it as it was
//!
//!  worker ends by itself        the keeper ends, with the same status
//!  worker is killed, crashes    the next one is started; memory that two in a row could not start from is made anew
//!  no worker can be started     (no process, no memory, no binary for a moment) tried again after a pause; memory stays
//!  keeper is killed             the worker is killed by the system: host memory is lost, the disk tier recovers
//!  SIGTERM                      passed on; the worker drains, and is killed if it takes longer than it may
//!  Replace                      the worker ends what is under way and exits, or is killed as late; the next one is started from the
//!                               binary that is there then
//! ```
//! It has one thread, asks nobody anything that could make it wait, and touches no block.

mod kept;
mod messages;
mod worker;

use std::io;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::kept::Kept;
pub(crate) use self::kept::records_of;
use self::messages::Said;
pub use self::worker::{Handed, Keeper, KeptIngest, KeptMember, Sockets};
use crate::config::Config;
use crate::limits;
use crate::serve::StartError;

/// How long handing over may take.
const HANDOVER: Duration = Duration::from_secs(5);

/// Crashes within `CRASHES_WITHIN` after which starting again is given up: the cause is not one that passes.
const CRASHES_MAX: usize = 8;
const CRASHES_WITHIN: Duration = Duration::from_secs(60);

/// Pause after the first start that the system refused, and so much longer after each further one: the eighth is 36 s later, and an
/// upgrade that moves the binary away has long brought the next one by then.
const SPAWN_PAUSE: Duration = Duration::from_secs(1);

/// Starts from the same memory that may fail before it is made anew.
const WARM_STARTS_MAX: u32 = 2;

/// How a daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As it was asked to.
    Well,
    /// It could not start, or gave up; it has said why.
    Badly,
}

/// Keeps until SIGTERM or SIGINT. `worker` makes the command of a worker, which gets its end of the socket as its standard input.
pub fn keep(config: &Config, worker: impl Fn() -> std::process::Command) -> Result<Ended, StartError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StartError::System)?;
    runtime.block_on(async {
        let mut signals = Signals::new().map_err(StartError::System)?;
        let mut kept = Kept::new(config)?;
        let mut crashes: Vec<Instant> = Vec::new();
        let mut failed_starts = 0;
        let mut is_first = true;
        loop {
            let life = match live(&mut kept, &mut signals, worker()).await {
                Ok(life) => Some(life),
                // Nothing is lost yet, and whoever made this start is there to hear why it fails.
                Err(error) if is_first => return Err(StartError::System(error)),
                Err(error) => {
                    eprintln!("tender: the system does not start the next daemon: {error}; it is tried again, with the same memory");
                    None
                }
            };
            is_first = false;
            if let Some(life) = &life {
                if life.asked_to_end {
                    return Ok(if life.ended_well || !life.exited { Ended::Well } else { Ended::Badly });
                }
                if life.exited && !life.is_replaced {
                    return Ok(if life.ended_well { Ended::Well } else { Ended::Badly });
                }
                if life.is_replaced {
                    continue;
                }
                failed_starts = if life.served { 0 } else { failed_starts + 1 };
            }
            crashes.retain(|crash| crash.elapsed() < CRASHES_WITHIN);
            crashes.push(Instant::now());
            if crashes.len() > CRASHES_MAX {
                eprintln!(
                    "tender: the daemon crashed, or could not be started, more than {CRASHES_MAX} times within {} s; look at its last \
                     words above, and start it again",
                    CRASHES_WITHIN.as_secs()
                );
                return Ok(Ended::Badly);
            }
            if failed_starts >= WARM_STARTS_MAX {
                eprintln!("tender: host memory is made anew, since {failed_starts} starts from it failed");
                kept.renew_memory(config)?;
                failed_starts = 0;
            }
            if life.is_none() {
                let pause = SPAWN_PAUSE * crashes.len() as u32;
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = signals.next() => return Ok(Ended::Well),
                }
            }
        }
    })
}

/// What asks the daemon to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// How a worker's life was.
#[derive(Debug, Default)]
struct Life {
    served: bool,
    /// By itself, not by a signal.
    exited: bool,
    ended_well: bool,
    asked_to_end: bool,
    is_replaced: bool,
}

/// One worker, from its start to its end. An error: none was started.
async fn live(kept: &mut Kept, signals: &mut Signals, worker: std::process::Command) -> io::Result<Life> {
    let mut life = Life::default();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let ours = UnixStream::from_std(ours)?;
    let mut command = Command::from(worker);
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    let mut child = command.kill_on_drop(true).spawn()?;
    // By when it has to have ended, once it was asked to.
    let mut kill_at = None;
    // Whoever holds the worker's end is the worker alone: its death is heard.
    drop(command);
    if let Err(error) = kept.hand_over(ours.as_fd(), Instant::now() + HANDOVER) {
        // It died at once, or cannot be spoken to; its own last words say why.
        tracing::debug!("handing over failed: {error}");
    }
    loop {
        tokio::select! {
            status = child.wait() => {
                // What it said last is still to be heard.
                while let Ok((said, with)) = hear(&ours) {
                    life.served |= matches!(said, Said::Serving { .. });
                    kept.take(said, with);
                }
                let status = status?;
                life.exited = status.code().is_some();
                life.ended_well = status.success();
                if !life.exited && !life.asked_to_end {
                    eprintln!("tender: the daemon was ended by {status}; the next one is started");
                }
                return Ok(life);
            }
            said = ours.async_io(Interest::READABLE, || hear(&ours)) => match said {
                Ok((Said::Replace, _)) => {
                    life.is_replaced = true;
                    kill_at.get_or_insert_with(|| Instant::now() + limits::STOP);
                    // One that does not take it is dying.
                    let _ = Said::Retire.send(ours.as_fd(), &[], Instant::now() + HANDOVER);
                }
                Ok((said, with)) => {
                    life.served |= matches!(said, Said::Serving { .. });
                    kept.take(said, with);
                }
                // Its end comes next, through `wait`.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            () = signals.next() => {
                life.asked_to_end = true;
                kill_at.get_or_insert_with(|| Instant::now() + limits::STOP);
                ask_to_end(&child);
            }
            () = until(kill_at) => {
                kill_at = None;
                eprintln!("tender: the daemon has not ended {} s after it was asked to, and is killed", limits::STOP.as_secs());
                // It may have ended by itself just now.
                let _ = child.start_kill();
            }
        }
    }
}

/// Never, if it is at no time.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// One message, if it is there.
fn hear(socket: &UnixStream) -> io::Result<(Said, Vec<std::os::fd::OwnedFd>)> {
    /// A message is sent in one piece.
    const WHOLE: Duration = Duration::from_millis(100);
    let mut first = [0];
    // Nothing there is no wait at all.
    rustix::net::recv(socket, &mut first, rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT)?;
    Said::receive(socket.as_fd(), Instant::now() + WHOLE)
}

fn ask_to_end(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended by itself just now.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}
