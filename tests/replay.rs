//! `tender replay`, from the command line: right counts, every byte compared, nothing left behind.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{
    Daemon, children_of, last_object, processes_naming, run, runs, signal, stderr, stdout, tender, wait, wait_until,
};
use tempfile::TempDir;
use tender::trace::generate::Workload;
use tender::trace::session_json;

/// Conversations of a few turns each, interleaved, as Mooncake JSONL; one request every 10 ms.
fn mooncake(requests: usize) -> (String, Vec<Vec<u64>>) {
    let mut text = String::new();
    let mut chains: Vec<Vec<u64>> = Vec::new();
    for i in 0..requests {
        let mut chain = if i < 7 { vec![0, 1] } else { chains[i - 7].clone() };
        chain.extend((0..3).map(|j| 1000 + (i * 10 + j) as u64));
        if i % 20 == 19 {
            chain = vec![0, 1, 5_000_000 + i as u64];
        }
        let (timestamp, tokens) = (i * 10, chain.len() * 512 - 100);
        writeln!(text, r#"{{"timestamp":{timestamp},"input_length":{tokens},"output_length":9,"hash_ids":{chain:?}}}"#)
            .unwrap();
        chains.push(chain);
    }
    (text, chains)
}

/// What a store without limits would find, and the tokens this saves.
fn hits_without_limits(chains: &[Vec<u64>]) -> (u64, u64) {
    let mut stored = HashSet::new();
    let (mut hits, mut tokens) = (0, 0);
    for chain in chains {
        let found = (1..=chain.len()).take_while(|length| stored.contains(&chain[..*length])).count();
        hits += found as u64;
        tokens += (found * 512).min(chain.len() * 512 - 100) as u64;
        stored.extend((1..=chain.len()).map(|length| chain[..length].to_vec()));
    }
    (hits, tokens)
}

fn write_mooncake(folder: &TempDir, requests: usize) -> (PathBuf, Vec<Vec<u64>>) {
    let (text, chains) = mooncake(requests);
    let file = folder.path().join("trace.jsonl");
    fs::write(&file, text).unwrap();
    (file, chains)
}

fn write_sessions(folder: &TempDir, sessions: usize) -> (PathBuf, u64, u64) {
    let place = folder.path().join("sessions");
    fs::create_dir(&place).unwrap();
    let workload = Workload { sessions, prompt_tokens: (400, 900), ..Workload::default() };
    let (mut requests, mut blocks) = (0, 0);
    for (i, session) in workload.all().enumerate() {
        let mut text = Vec::new();
        session_json::write(&session, &mut text).unwrap();
        fs::write(place.join(format!("{i}.json")), text).unwrap();
        requests += session.requests.len() as u64;
        blocks += session.chain_blocks().sum::<usize>() as u64;
    }
    (place, requests, blocks)
}

/// A replay with a small daemon of its own, whose temporary folder lies under `folder`.
fn replay(trace: &Path, folder: &TempDir) -> Command {
    let mut command = tender();
    command.arg("replay").arg(trace).arg("--dir").arg(folder.path());
    command.args(["--host", "64MiB", "--disk", "256MiB", "--block-bytes", "8KiB", "--json"]);
    command
}

fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or_else(|| panic!("no {name} in {object}"))
}

fn hits(object: &Value) -> u64 {
    ["hit_blocks_host", "hit_blocks_disk", "hit_blocks_peer"].iter().map(|name| number(object, name)).sum()
}

fn is_empty(folder: &TempDir) -> bool {
    fs::read_dir(folder.path()).unwrap().next().is_none()
}

#[test]
fn a_store_that_is_large_enough_finds_exactly_what_was_put() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, chains) = write_mooncake(&folder, 150);
    let output = run(replay(&trace, &scratch).args(["--clients", "1", "--concurrency", "1"]));
    let object = last_object(&output);
    let blocks = chains.iter().map(Vec::len).sum::<usize>() as u64;
    let (hits_expected, tokens_expected) = hits_without_limits(&chains);
    assert_eq!((number(&object, "requests"), number(&object, "blocks")), (150, blocks));
    assert_eq!((hits(&object), number(&object, "miss_blocks")), (hits_expected, blocks - hits_expected));
    assert_eq!((number(&object, "tokens_saved"), number(&object, "wrong_blocks")), (tokens_expected, 0));
    assert!(object["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(stdout(&output).lines().count(), 1);
    assert!(is_empty(&scratch), "something was left behind");
}

#[test]
fn several_clients_tenants_and_requests_at_once_lose_and_invent_nothing() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, chains) = write_mooncake(&folder, 300);
    let object = last_object(&run(replay(&trace, &scratch).args(["--clients", "3", "--tenants", "2"])));
    assert_eq!(number(&object, "requests"), 300);
    assert_eq!(hits(&object) + number(&object, "miss_blocks"), number(&object, "blocks"));
    // Two tenants share nothing, so at most what one tenant would find.
    assert!(hits(&object) <= hits_without_limits(&chains).0);
    assert_eq!(number(&object, "wrong_blocks"), 0);
}

#[test]
fn sessions_are_replayed_whole_and_a_limit_is_kept() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, requests, blocks) = write_sessions(&folder, 6);
    let object = last_object(&run(&mut replay(&trace, &scratch)));
    assert_eq!((number(&object, "requests"), number(&object, "blocks")), (requests, blocks));
    assert!(hits(&object) * 2 > blocks, "{object}");
    assert_eq!(number(&object, "wrong_blocks"), 0);
    let object = last_object(&run(replay(&trace, &scratch).args(["--limit", "17"])));
    assert_eq!(number(&object, "requests"), 17);
}

#[test]
fn a_trace_can_be_replayed_at_its_own_times() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, _) = write_mooncake(&folder, 300);
    let object = last_object(&run(replay(&trace, &scratch).args(["--speed", "2x"])));
    let seconds = object["seconds"].as_f64().unwrap();
    assert!((1.49..30.0).contains(&seconds), "299 requests 10 ms apart took {seconds} s at twice the speed");
    let (trace, requests, _) = write_sessions(&folder, 3);
    let object = last_object(&run(replay(&trace, &scratch).args(["--speed", "5000x"])));
    assert_eq!(number(&object, "requests"), requests);
}

#[test]
fn a_running_daemon_keeps_the_blocks_of_one_generation_for_the_next_replay() {
    let folder = TempDir::new().unwrap();
    let (trace, _) = write_mooncake(&folder, 60);
    let daemon = Daemon::start();
    let again = |generation: &str| {
        let mut command = daemon.client("replay");
        command.arg(&trace).args(["--block-bytes", "8KiB", "--json", "--generation", generation]);
        last_object(&run(&mut command))
    };
    assert!(number(&again("1"), "miss_blocks") > 0);
    let second = again("1");
    assert_eq!((number(&second, "miss_blocks"), number(&second, "wrong_blocks")), (0, 0));
    let other = again("2");
    assert!(number(&other, "miss_blocks") > 0);
    assert_eq!(number(&other, "wrong_blocks"), 0);
}

#[test]
fn a_broken_line_ends_the_replay_before_it_starts_or_is_left_out() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (text, _) = mooncake(20);
    let trace = folder.path().join("trace.jsonl");
    fs::write(&trace, text.replacen("\"timestamp\":30,", "\"timestamp\":\"soon\",", 1)).unwrap();
    let output = run(&mut replay(&trace, &scratch));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("trace.jsonl, line 4: field `timestamp` is `\"soon\"`"), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    let object = last_object(&run(replay(&trace, &scratch).arg("--skip-broken")));
    assert_eq!((number(&object, "requests"), number(&object, "skipped")), (19, 1));
}

#[test]
fn nobody_at_the_socket_is_said_with_the_cure() {
    let folder = TempDir::new().unwrap();
    let (trace, _) = write_mooncake(&folder, 5);
    let output = run(tender().arg("replay").arg(&trace).arg("--socket").arg(folder.path().join("nobody.sock")));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("tender serve"), "{}", stderr(&output));
    let output = run(replay(&trace, &folder).arg("--socket").arg(folder.path().join("nobody.sock")));
    assert_eq!(output.status.code(), Some(2), "--host says nothing to a running daemon");
}

#[test]
fn a_folder_that_cannot_be_had_is_named_with_the_cure() {
    let folder = TempDir::new().unwrap();
    let (trace, _) = write_mooncake(&folder, 5);
    let missing = folder.path().join("missing");
    let said_of = |dir: &Path, disk: &str| {
        let output = run(tender().arg("replay").arg(&trace).arg("--dir").arg(dir).args(["--disk", disk]));
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let said = stderr(&output).to_owned();
        assert!(said.contains(&format!("`{}`", dir.display())) && said.contains("--dir"), "{said}");
        said
    };
    let said = said_of(&missing, "256MiB");
    assert!(said.contains("No such file") && said.contains("make it"), "{said}");
    assert!(!said.contains("free some"), "room is not what is missing: {said}");
    assert!(!missing.exists(), "it was made after all");
    let said = said_of(&trace, "256MiB");
    assert!(said.contains("Not a directory"), "{said}");
    let said = said_of(folder.path(), "9999TiB");
    assert!(said.contains("free some") && said.contains("smaller --disk"), "{said}");
}

#[test]
fn both_doors_find_the_same() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, chains) = write_mooncake(&folder, 200);
    let (hits_expected, _) = hits_without_limits(&chains);
    for door in ["ring", "grpc"] {
        // One after the other, as in the trace: none asks for a block that another one is still putting.
        let mut command = replay(&trace, &scratch);
        command.args(["--door", door, "--speed", "1x", "--clients", "1", "--concurrency", "1"]);
        let object = last_object(&run(&mut command));
        assert_eq!(object["door"], door, "{object}");
        assert_eq!((number(&object, "requests"), number(&object, "wrong_blocks")), (200, 0), "{door}");
        assert_eq!(hits(&object), hits_expected, "{door}: {object}");
    }
}

#[test]
fn a_replay_goes_on_through_the_deaths_of_workers_and_clients() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, _) = write_mooncake(&folder, 800);
    let mut command = replay(&trace, &scratch);
    command.args(["--speed", "1x", "--kill-worker-every", "2", "--kill-client-every", "1"]);
    let object = last_object(&run(&mut command));
    assert_eq!((number(&object, "requests"), number(&object, "wrong_blocks")), (800, 0), "{object}");
    assert!(number(&object, "killed_workers") > 0 && number(&object, "killed_clients") > 0, "{object}");
    assert!(number(&object, "hit_blocks_host") > 0, "{object}");
    assert!(is_empty(&scratch), "something was left behind");
}

#[test]
fn sessions_of_a_killed_client_are_ended_by_another() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (trace, requests, blocks) = write_sessions(&folder, 6);
    let mut command = replay(&trace, &scratch);
    command.args(["--speed", "60x", "--concurrency", "6", "--kill-client-every", "0.5"]);
    let object = last_object(&run(&mut command));
    assert_eq!((number(&object, "requests"), number(&object, "blocks")), (requests, blocks), "{object}");
    assert!(number(&object, "killed_clients") > 0 && number(&object, "wrong_blocks") == 0, "{object}");
}

#[test]
fn a_replay_goes_on_while_the_daemon_replaces_its_worker() {
    let folder = TempDir::new().unwrap();
    let (trace, _) = write_mooncake(&folder, 600);
    let daemon = Daemon::start();
    let process = || last_object(&run(daemon.client("status").arg("--json")))["process_id"].as_u64().unwrap();
    let before = process();
    let mut command = daemon.client("replay");
    command.arg(&trace).args(["--block-bytes", "8KiB", "--speed", "1x", "--json"]);
    let replay = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let replaced = run(daemon.client("serve").arg("--replace"));
    assert!(replaced.status.success(), "{}", stderr(&replaced));
    let after = process();
    assert!(after != before && stderr(&replaced).contains(&format!("process {after} ")), "{}", stderr(&replaced));
    let object = last_object(&wait(replay));
    assert_eq!((number(&object, "requests"), number(&object, "wrong_blocks")), (600, 0), "{object}");
    assert!(number(&object, "hit_blocks_host") > 0, "{object}");
    assert!(
        !run(tender().args(["serve", "--replace", "--socket"]).arg(folder.path().join("nobody.sock"))).status.success()
    );
}

#[test]
fn only_a_daemon_of_its_own_is_killed() {
    let folder = TempDir::new().unwrap();
    let (trace, _) = write_mooncake(&folder, 5);
    for flag in ["--kill-worker-every", "--kill-client-every"] {
        let output = run(tender().arg("replay").arg(&trace).args([flag, "5", "--socket", "/nowhere/tender.sock"]));
        assert_eq!(output.status.code(), Some(2), "{flag}: {}", stderr(&output));
    }
}

/// Starts a replay that lasts, and waits until its daemon and both clients are there; tells its children.
fn long_replay(folder: &TempDir, scratch: &TempDir) -> (std::process::Child, Vec<u32>) {
    let (trace, _) = write_mooncake(folder, 20_000);
    let mut command = replay(&trace, scratch);
    command.args(["--speed", "1x"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    wait_until("a daemon and two clients", || children_of(child.id()).len() >= 3);
    // Until requests are answered, the end of a client may look like a failed start.
    std::thread::sleep(Duration::from_millis(500));
    let children = children_of(child.id());
    (child, children)
}

fn name_of(process: u32) -> String {
    fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default().replace('\0', " ")
}

#[test]
fn an_interrupted_replay_leaves_nothing_behind() {
    for name in ["INT", "TERM"] {
        let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let (child, children) = long_replay(&folder, &scratch);
        signal(child.id(), name);
        let asked = Instant::now();
        let output = wait(child);
        assert_eq!(output.status.code(), Some(130), "SIG{name}: {}", stderr(&output));
        assert!(asked.elapsed() < Duration::from_secs(20));
        wait_until("the end of all children", || !children.iter().any(|child| runs(*child)));
        assert!(processes_naming(scratch.path()).is_empty());
        assert!(is_empty(&scratch), "SIG{name}: something was left behind");
    }
}

#[test]
fn a_killed_replay_leaves_no_children_and_a_folder_that_doctor_removes() {
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let doctor = |flags: &[&str]| {
        let mut command = tender();
        command.arg("doctor").args(flags).arg("--json").arg("--dir").arg(scratch.path());
        let output = command.arg("--socket").arg(folder.path().join("none.sock")).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let left = scratch.path().display().to_string();
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .any(|line| line.contains("tender-replay-") && line.contains(&left))
    };
    let (mut child, children) = long_replay(&folder, &scratch);
    assert!(!doctor(&["--clean"]), "its folder is in use");
    assert!(!is_empty(&scratch) && children.iter().all(|child| runs(*child)));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the end of all children", || !children.iter().any(|child| runs(*child)));
    wait_until("the end of the daemon", || processes_naming(scratch.path()).is_empty());
    assert!(doctor(&[]), "it says what was left behind");
    assert!(doctor(&["--clean"]), "and what it removed");
    assert!(is_empty(&scratch));
    assert!(!doctor(&["--clean"]), "nothing is left");
}

#[test]
fn the_death_of_a_client_or_of_the_daemon_is_a_failure() {
    for victim in ["replay-client", "serve"] {
        let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let (child, children) = long_replay(&folder, &scratch);
        signal(*children.iter().find(|child| name_of(**child).contains(victim)).unwrap(), "KILL");
        let output = wait(child);
        assert_eq!(output.status.code(), Some(1), "{victim}: {}", stderr(&output));
        assert!(stderr(&output).contains("died"), "{victim}: {}", stderr(&output));
        wait_until("the end of all children", || !children.iter().any(|child| runs(*child)));
        assert!(is_empty(&scratch), "{victim}: something was left behind");
    }
}

/// The recorded traces, where they are at hand.
#[test]
fn recorded_requests_come_back_right() {
    let Some(traces) = std::env::var_os("TENDER_TRACES").map(PathBuf::from) else {
        return eprintln!("SKIPPED: TENDER_TRACES names no folder of recorded traces");
    };
    let (folder, scratch) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let trace = folder.path().join("conversation.jsonl");
    let mut unpack = Command::new("xz");
    unpack.arg("-dc").arg(traces.join("conversation.jsonl.xz")).stdout(fs::File::create(&trace).unwrap());
    let Ok(status) = unpack.status() else {
        return eprintln!("SKIPPED: there is no program `xz` to unpack the recorded traces");
    };
    assert!(status.success(), "conversation.jsonl.xz did not unpack");
    let object = last_object(&run(replay(&trace, &scratch).args(["--limit", "400"])));
    assert_eq!((number(&object, "requests"), number(&object, "wrong_blocks")), (400, 0));
    assert!(hits(&object) > 0);
}
