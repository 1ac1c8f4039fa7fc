//! Every bound of the daemon, with the arithmetic that chose it. What a request over a bound gets is an answer, never a queue.

use std::time::Duration;

/// Keys in one request. A prompt of 1 M tokens in 64-token blocks has 15,625; at 100 ns a key one batch holds the core for 1.6 ms.
pub const KEYS_MAX: usize = 16_384;

/// Data in one `PutChunk` or `GetReply`: large enough that framing costs < 0.1 %, small enough that 64 clients hold 64 MiB.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// One gRPC message: a chunk, or 16,384 keys (512 KiB) with their tokens (4 MiB at 64 tokens), and room for framing.
pub const REQUEST_BYTES_MAX: usize = 8 << 20;

/// Requests given to the core and not answered yet. Each holds at most its keys: 4,096 x 512 KiB = 2 GiB at the very worst, 4,096 x
/// 8 KiB = 32 MiB as engines send them.
pub const REQUESTS_MAX: usize = 4_096;

/// Requests that wait in the core for a slot or for a disk; beyond it they are shed.
pub const PENDING_MAX: usize = 2_048;

/// Attachments at once: 64 engines of 64 processes.
pub const ATTACHMENTS_MAX: usize = 4_096;

/// Processes at the local door: 64 engines of 8 ranks. A ring takes 2 MiB if its client fills all of it: 1 GiB at the very worst.
pub const LOCALS_MAX: usize = 512;

/// Connections to the local door that nobody was let in through yet.
pub const GREETINGS_MAX: usize = 128;

/// Descriptors that clients sent and that are neither taken on nor closed: one for each connection that is being greeted, and as many again.
pub const FOREIGN_MAX: usize = 2 * GREETINGS_MAX;

/// An attachment that was not used for so long is gone.
pub const ATTACHMENT_IDLE: Duration = Duration::from_secs(3_600);

/// Namespaces at once, over all tenants: models x adapters; each costs about 500 bytes.
pub const NAMESPACES_MAX: usize = 4_096;

/// Tenants of one daemon. Victims are compared over the tenants' lists, so this bounds the search.
pub const TENANTS_MAX: usize = 64;

/// Shelves (tenant and size class) of one tier; a slot names its shelf in 16 bits, and 512 lists fit into 8 KiB.
pub const SHELVES_MAX: usize = 512;

/// Leased bytes of one acquire over gRPC: two of these in flight per stream keep disk and socket busy, and 32 streams hold 1 GiB.
pub const ACQUIRE_BYTES_MAX: u64 = 16 << 20;

/// Slots of one put held at once over gRPC: the same window.
pub const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// Reservations and leases at once: a lease for each slot of 4 GiB of host memory in 4 KiB blocks, at 28 B of state each 28 MiB.
/// Dealt out to the tenants in equal parts: with 64 of them each may have 16,384.
pub const GRANTS_MAX: usize = 1 << 20;

/// Loads from disk queued or in flight, over all requests: the leases' share (a quarter) of 4 GiB of host memory in 16 KiB blocks, at
/// about 250 B of state each 16 MiB.
pub const LOADS_MAX: usize = 65_536;

/// Memory of the loads of one file that are not read in place, in flight at once: a slot of the largest size, and with slots of 1 MiB the
/// whole depth of a file (64); at 7 GB/s it turns over in 9 ms.
pub const PRIVATE_LOADS_BYTES_MAX: usize = 64 << 20;

/// Copies from ingest to shared memory in flight: enough to keep a copying thread busy, few enough that a get waits for little.
pub const PROMOTIONS_MAX: usize = 64;

/// Write-backs queued: a second of a disk at 64 KiB x 16,384/s. Beyond it a block stays in memory only.
pub const WRITE_BACKS_MAX: usize = 16_384;

/// Nodes looked at to find one victim before the search is given up: the share of a list that may be leased or being written.
pub const VICTIM_STEPS_MAX: usize = 256;

/// Blocks dropped in one continuation of a long job (draining a segment, purging a namespace): about 0.2 ms.
pub const CONTINUATION_BLOCKS: usize = 1_024;

/// Pages of a directory in flight at once, beside the data: enough to keep a disk busy, 256 KiB of memory.
pub const DIRECTORY_WRITES_MAX: usize = 64;

/// Events remembered per tenant for watchers that come back: 32,768 x 96 B = 3 MiB.
pub const EVENTS_MAX: usize = 32_768;

/// Events or snapshot items in one message: 1,024 x about 100 B = 100 KiB.
pub const EVENTS_PER_MESSAGE: usize = 1_024;

/// Deadline of a request that names none.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(5);

/// Longest deadline a request may name.
pub const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// A client that takes nothing of its stream for so long is treated as gone.
pub const CLIENT_STALL: Duration = Duration::from_secs(30);

/// How long the core sleeps at most: deadlines are met to this.
pub const TICK: Duration = Duration::from_millis(20);

/// Directory pages that changed are written after this long even if nobody asks for durability, so that a crash loses little.
pub const DIRECTORY_DELAY: Duration = Duration::from_millis(500);

/// Consecutive failures after which a disk is left alone.
pub const DISK_FAILURES_MAX: u32 = 16;

/// How long a disk that failed is left alone before it is tried again.
pub const DISK_RETRY: Duration = Duration::from_secs(30);

/// How long to wait at start for the lock of a tier file: a killed daemon's last requests in flight hold it for up to a second.
pub const LOCK_WAIT: Duration = Duration::from_secs(5);

/// How long a daemon that was asked to stop may write back what is only in memory.
pub const DRAIN: Duration = Duration::from_secs(10);

/// For all that is written back at one end: a stop may be asked for while a worker writes back for the next one. What the core may take
/// longer (5 s), last words (1 s) and disks (5 s) come to 23 s with it.
pub const DRAINS: Duration = Duration::from_secs(12);

/// How long a daemon that stops waits for what its disks have in flight after all else has ended: a disk that has not answered by then is
/// stalled, and for what it does later the system holds the lock of its file.
pub const STOP_IO: Duration = Duration::from_secs(5);

/// After which the keeper kills a worker that it has asked to end: the drain and what the core may take longer (10 + 5 s), the last words of
/// requests (1 s), disks (5 s) come to 21 s. Less than the 30 s that a service manager gives both.
pub const STOP: Duration = Duration::from_secs(25);

/// Smallest and largest segment; between them the arena has about 64 (a disk 512), so that a size class can have a small share.
pub const SEGMENT_BYTES_MIN: u64 = 16 << 20;
/// An io_uring fixed buffer is at most 1 GiB.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Largest slot: one block of 64 MiB in one shard.
pub const SLOT_BYTES_MAX: u64 = 64 << 20;

const _: () = assert!(PRIVATE_LOADS_BYTES_MAX as u64 >= SLOT_BYTES_MAX, "every slot can be loaded");
const _: () = assert!(KEYS_MAX * 32 + CHUNK_BYTES_MAX < REQUEST_BYTES_MAX, "a put's header fits into one message");
