//! How long a call may take, and how often a daemon that is gone is called. One place, with the reasons.

use std::time::Duration;

/// Connecting and attaching. A daemon on the same node answers in milliseconds, one that is loading a large directory in seconds.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);

/// Opening the local door, once attached: two messages on one node. Who is not answered goes on over gRPC.
pub(crate) const DOOR: Duration = Duration::from_secs(2);

/// One call without its bytes; `Remote::with_deadline` sets another. The daemon's own default.
pub(crate) const REQUEST: Duration = Duration::from_secs(5);

/// What the daemon gets less than we wait, so that its answer ("these came, the next did not") is there before we give up.
pub(crate) const GRACE: Duration = Duration::from_secs(1);

/// The slowest road worth waiting for: a tenth of what loopback gRPC carries on two busy cores.
const ROAD_BYTES_PER_S: u64 = 32 << 20;

/// The longest deadline the daemon takes.
const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// First pause between two attempts to reach a daemon that is gone; doubles up to `RECONNECT_PAUSE_MAX`.
pub(crate) const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(100);

/// Longest pause: a restarted daemon is in use again this long after at the latest.
pub(crate) const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Pause before a worker is looked for that follows one which was about to end: less than it takes to start one.
pub(crate) const NEXT_WORKER_PAUSE: Duration = Duration::from_millis(20);

/// How long a call that finds the daemon gone waits for the first attempt to reach it again, before it answers with a miss. A daemon
/// that was stopped refuses at once; one whose worker is being followed by the next one answers when that one serves.
pub(crate) const RECONNECT_WAIT: Duration = Duration::from_secs(3);

/// A connection with open calls on which nothing is heard for so long is asked whether it lives, and given up after as long again.
pub(crate) const PING: Duration = Duration::from_secs(5);

/// Deadline of a call that moves so many bytes.
pub(crate) fn with_bytes(request: Duration, bytes: u64) -> Duration {
    let road = Duration::from_millis(bytes.saturating_mul(1000) / ROAD_BYTES_PER_S);
    request.saturating_add(road).min(DEADLINE_MAX)
}

/// A deadline on the wire; 0 would mean the daemon's default.
pub(crate) fn wire_ms(deadline: Duration) -> u32 {
    u32::try_from(deadline.min(DEADLINE_MAX).as_millis()).unwrap_or(u32::MAX).max(1)
}
