//! Children that do not outlive their parent, and signals that end a command in good order.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;

/// Makes the kernel end this process when its parent dies, which must be `parent`: one that died already would not be noticed.
///
/// The child asks for it itself, since it must be asked for after the fork, where only the child's own code runs.
pub fn die_with(parent: u32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| Failure::of("cannot tie this process to its parent")(error.into()))?;
    let is_ours = getppid().map(Pid::as_raw_nonzero).is_some_and(|id| i64::from(id.get()) == i64::from(parent));
    // Nobody is left to be told.
    if is_ours { Ok(()) } else { Err(Failure::Interrupted) }
}

/// Kills a process with kill -9; whether it was there.
pub fn kill(process_id: u32) -> bool {
    let pid = i32::try_from(process_id).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::kill_process(pid, Signal::KILL).is_ok())
}

/// Waits for Ctrl-C or a request to end.
pub async fn interrupted() -> Failure {
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return Failure::message("cannot listen for signals, so nothing could be cleaned up after one");
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Failure::Interrupted
}
