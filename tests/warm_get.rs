//! A warm get makes no system call: counted by `strace` around a process that does nothing else.
//!
//! Where others have the processors the daemon goes to sleep between two gets, and is woken by one; so does the runtime of the process
//! look for events now and then. Both are far fewer than the gets, and a get that needed one each time would be far above.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use support::blocks::{Run, attach_to};
use support::site::{Site, TOKEN};
use support::{run, stderr, until};
use tender_client::proto::{BlockLayout, Shard};
use tender_client::{Attach, BlockStore, BlockView, Doors, GetEnd, Remote, Target};

/// Where the process that gets finds the daemon, and how often it gets.
const SOCKET: &str = "WARM_GET_SOCKET";
const GETS: &str = "WARM_GET_GETS";

/// Gets in one count, and the system calls that there may be for each that is made.
const MANY: u64 = 20_000;
const GETS_PER_CALL: u64 = 10;

/// Of these one must hold: a busy machine may spoil some.
const ROUNDS: usize = 10;

const BLOCKS: usize = 4;

/// Skipped, and says so, where `strace` is not there or may not trace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_get_makes_no_system_call() {
    let may_trace = Command::new("strace").args(["-c", "-f", "true"]).stderr(Stdio::null()).status();
    if !may_trace.is_ok_and(|status| status.success()) {
        return eprintln!("SKIPPED: strace is not there, or may not trace");
    }
    let site = Site::of_two_tenants(&["--host", "64MiB", "--disk", "0"]);
    let daemon = site.start_ready().await;
    for store in stores(&site.socket()).await {
        Run::new(&store, 1, BLOCKS).put(&store).await;
        store.close().await;
    }
    let holds = |round| {
        let (without, with) = (calls(&site, 0), calls(&site, MANY));
        println!("round {round}: {without} system calls without gets, {with} with {MANY}");
        with.saturating_sub(without) * GETS_PER_CALL < MANY
    };
    assert!((0..ROUNDS).any(holds), "no round came to less than one system call for {GETS_PER_CALL} gets");
    daemon.stop();
}

/// A client of each tenant, each in its own group and with blocks of its own size.
async fn stores(socket: &Path) -> Vec<Remote> {
    let mut stores = Vec::new();
    for (group, token, block_bytes) in [("default", None, 64 << 10), ("other", Some(TOKEN.to_owned()), 16 << 10)] {
        let attach = Attach { group: group.to_owned(), ..attach_to("warm", BlockLayout::opaque(block_bytes)) };
        let store = Remote::attach(Target::Unix(socket.to_owned()), token, attach).await.unwrap();
        assert_eq!(store.door(), Doors::Ring);
        stores.push(store);
    }
    stores
}

/// System calls of a process that starts, gets, and ends.
fn calls(site: &Site, gets: u64) -> u64 {
    let summary = site.path("strace");
    let mut command = Command::new("strace");
    command.args(["-c", "-f", "-o"]).arg(&summary).arg(std::env::current_exe().unwrap());
    command.args(["a_process_that_gets", "--exact", "--ignored"]);
    let output = run(command.env(SOCKET, site.socket()).env(GETS, gets.to_string()));
    assert!(output.status.success(), "{}", stderr(&output));
    let summary = std::fs::read_to_string(summary).unwrap();
    let total = summary.lines().find(|line| line.ends_with(" total")).unwrap_or_else(|| panic!("no total: {summary}"));
    // % time, seconds, usecs/call, calls
    total.split_whitespace().nth(3).unwrap().parse().unwrap()
}

/// No test: a process that the test starts.
#[tokio::test(flavor = "current_thread")]
#[ignore = "a process that the other test starts"]
async fn a_process_that_gets() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let gets: u64 = std::env::var(GETS).unwrap().parse().unwrap();
    let stores = stores(Path::new(&socket)).await;
    let runs: Vec<Run> = stores.iter().map(|store| Run::new(store, 1, BLOCKS)).collect();
    for (run, store) in runs.iter().zip(&stores) {
        // Until they lie in memory that only the daemon writes they are copied out.
        let is_leased = async || store.get(&run.keys, Shard::WHOLE).await.blocks.iter().all(BlockView::is_leased);
        until("a lease in place", is_leased).await;
    }
    for at in 0..gets as usize {
        let (run, store) = (&runs[at % 2], &stores[at % 2]);
        let got = store.get(&run.keys, Shard::WHOLE).await;
        assert_eq!(got.end, GetEnd::Complete);
        assert!(got.blocks.iter().all(BlockView::is_leased));
    }
    for store in stores {
        store.close().await;
    }
}
