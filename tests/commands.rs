//! The other commands, from the command line: what was asked is done or refused with the cure, and never anything in between.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::site::{Site, free_address};
use support::{Daemon, last_object, processes_naming, run, signal, stderr, stdout, tender, wait, wait_until};
use tempfile::TempDir;

const MODEL: [&str; 6] = ["--model", "m", "--block-tokens", "4", "--block-bytes", "4KiB"];
const TOKENS: [&str; 2] = ["--tokens", "1 2 3 4 5 6 7 8 9 10 11 12 13"];

#[test]
fn without_a_daemon_every_client_command_says_how_to_get_one() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("nobody.sock");
    let cases: [(&str, Vec<&str>); 6] = [
        ("status", vec![]),
        ("watch", vec![]),
        ("lookup", [&MODEL[..], &TOKENS].concat()),
        ("get", [&MODEL[..], &TOKENS].concat()),
        ("put", [&MODEL[..], &TOKENS, &["--generate"]].concat()),
        ("purge", [&MODEL[..], &TOKENS].concat()),
    ];
    for (subcommand, arguments) in cases {
        let output = run(tender().arg(subcommand).arg("--socket").arg(&socket).args(arguments));
        assert_eq!(output.status.code(), Some(1), "{subcommand}");
        let said = stderr(&output);
        assert!(said.contains("nobody.sock") && said.contains("tender serve"), "{subcommand}: {said}");
        assert!(!said.contains("panicked") && stdout(&output).is_empty(), "{subcommand}: {said}");
    }
}

#[test]
fn whom_the_daemon_does_not_know_is_told_to_give_a_token_file() {
    let address = free_address();
    let mut site = Site::of_two_tenants(&["--host", "64MiB", "--disk", "0"]);
    site.flag("--listen", address);
    let _daemon = site.start();
    let (right, wrong) = (site.path("other.token"), site.secret("wrong.token", "fedcba9876543210", 0o600));
    let trace = site.path("trace.jsonl");
    fs::write(&trace, r#"{"timestamp":0,"input_length":512,"output_length":1,"hash_ids":[1]}"#).unwrap();
    let cases: [(&str, Vec<&str>); 7] = [
        ("put", [&MODEL[..], &TOKENS, &["--generate"]].concat()),
        ("get", [&MODEL[..], &TOKENS].concat()),
        ("lookup", [&MODEL[..], &TOKENS].concat()),
        ("watch", vec!["--count", "1"]),
        ("status", vec![]),
        ("replay", vec![trace.to_str().unwrap()]),
        ("purge", [&MODEL[..], &TOKENS].concat()),
    ];
    for (subcommand, arguments) in cases {
        let ask = |token_file: Option<&Path>| {
            let mut command = tender();
            command.arg(subcommand).args(&arguments).arg("--address").arg(address.to_string());
            run(command.args(token_file.iter().flat_map(|file| ["--token-file".as_ref(), file.as_os_str()])))
        };
        for (token_file, says) in [(None, "none was given"), (Some(&*wrong), "no tenant by the token")] {
            let output = ask(token_file);
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{subcommand}: {said}");
            assert!(said.contains(says) && said.contains("--token-file FILE"), "{subcommand}: {said}");
            assert!(!said.contains("authorization"), "nobody sends that from a command line: {said}");
        }
        assert!(ask(Some(&right)).status.success(), "{subcommand}");
    }
}

#[test]
fn what_was_put_is_got_looked_up_and_purged() {
    let folder = TempDir::new().unwrap();
    let daemon = Daemon::start();
    let asked = |subcommand: &str, more: &[&str]| run(daemon.client(subcommand).args(MODEL).args(more).arg("--json"));
    let payload: Vec<u8> = (0..3 * 4096u32).map(|i| (i / 7 + i) as u8).collect();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    fs::write(&source, &payload).unwrap();
    let (source, target_shown) = (source.to_str().unwrap(), target.to_str().unwrap());

    let put = last_object(&asked("put", &[&TOKENS[..], &["--payload", source]].concat()));
    assert_eq!((put["blocks"].as_u64(), put["stored_blocks"].as_u64()), (Some(3), Some(3)));
    let put = last_object(&asked("put", &[&TOKENS[..], &["--payload", source]].concat()));
    assert_eq!(put["already_present_blocks"].as_u64(), Some(3));

    let got = last_object(&asked("get", &[&TOKENS[..], &["-o", target_shown]].concat()));
    assert_eq!((got["got_blocks"].as_u64(), got["end"].as_str()), (Some(3), Some("complete")));
    assert_eq!(fs::read(&target).unwrap(), payload);
    let printed = run(daemon.client("get").args(MODEL).args(TOKENS).args(["-o", "-"]));
    assert!(printed.status.success() && printed.stdout == payload);

    let longer = ["--tokens", "[1, 2, 3, 4, 5, 6, 7, 8, 99, 99, 99, 99]"];
    let found = last_object(&asked("lookup", &longer));
    assert_eq!((found["blocks"].as_u64(), found["prefix_blocks"].as_u64()), (Some(3), Some(2)));
    assert_eq!(found["prefix_tokens"].as_u64(), Some(8));
    let part = asked("get", &longer);
    assert_eq!(part.status.code(), Some(1), "not all blocks are there");
    assert!(stdout(&part).contains("\"got_blocks\":2"));

    let purged = last_object(&asked("purge", &TOKENS));
    assert_eq!((purged["purged_blocks"].as_u64(), purged["complete"].as_bool()), (Some(3), Some(true)));
    assert_eq!(last_object(&asked("lookup", &TOKENS))["prefix_blocks"].as_u64(), Some(0));
}

#[test]
fn what_was_put_durably_survives_a_kill_and_what_no_disk_takes_is_a_failure() {
    let asked = |site: &Site, subcommand: &str, more: &[&str]| {
        let mut command = tender();
        run(command.arg(subcommand).arg("--socket").arg(site.socket()).args(MODEL).args(TOKENS).args(more))
    };
    let site = Site::small();
    let daemon = site.start();
    let put = last_object(&asked(&site, "put", &["--generate", "--durable", "--json"]));
    assert_eq!((put["stored_blocks"].as_u64(), put["durable_blocks"].as_u64()), (Some(3), Some(3)));
    let again = asked(&site, "put", &["--generate", "--durable"]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(stdout(&again).contains("3 of 3 blocks would survive a power cut"), "{}", stdout(&again));
    let unasked = last_object(&asked(&site, "put", &["--generate", "--json"]));
    assert!(unasked["durable_blocks"].is_null(), "{unasked}");
    daemon.kill();
    let daemon = site.start();
    assert_eq!(last_object(&asked(&site, "lookup", &["--json"]))["disk_blocks"].as_u64(), Some(3));
    daemon.stop();

    let site = Site::new(&["--host", "64MiB", "--disk", "0"]);
    let daemon = site.start();
    let put = asked(&site, "put", &["--generate", "--durable", "--json"]);
    assert_eq!(put.status.code(), Some(1), "{}", stdout(&put));
    let object: serde_json::Value = serde_json::from_str(stdout(&put)).unwrap();
    assert_eq!((object["stored_blocks"].as_u64(), object["durable_blocks"].as_u64()), (Some(3), Some(0)));
    let said = stderr(&put);
    assert!(said.contains("3 of 3 blocks would not survive") && said.contains("tender status"), "{said}");
    daemon.stop();
}

#[test]
fn a_whole_namespace_is_purged_only_with_a_yes() {
    let daemon = Daemon::start();
    let asked = |subcommand: &str, more: &[&str]| run(daemon.client(subcommand).args(MODEL).args(more).arg("--json"));
    let text = ["--text", "a prompt of several blocks"];
    assert_eq!(last_object(&asked("put", &[&text[..], &["--generate"]].concat()))["stored_blocks"].as_u64(), Some(6));
    assert_eq!(asked("purge", &["--namespace"]).status.code(), Some(2));
    assert_eq!(last_object(&asked("lookup", &text))["prefix_blocks"].as_u64(), Some(6));
    assert_eq!(last_object(&asked("purge", &["--namespace", "--yes"]))["purged_blocks"].as_u64(), Some(6));
    let nothing = asked("purge", &[]);
    assert!(nothing.status.code() == Some(1) && stderr(&nothing).contains("--tokens"));
}

#[test]
fn bytes_and_tokens_that_do_not_belong_together_are_refused() {
    let folder = TempDir::new().unwrap();
    let daemon = Daemon::start();
    let source = folder.path().join("source");
    fs::write(&source, [0; 4096 * 2]).unwrap();
    let source = source.to_str().unwrap();
    let cases: [(&[&str], &str); 4] = [
        (
            &["--tokens", "1 2 3 4 5 6 7 8 9 10 11 12", "--payload", source],
            "8192 bytes, but the whole blocks of these tokens need 12288",
        ),
        (&["--tokens", "1 2 3", "--generate"], "3 tokens came, but a block has 4"),
        (&["--tokens", "1 2 x 4", "--generate"], "token 2 is `x`"),
        (&["--tokens-file", "/nowhere/tokens", "--generate"], "/nowhere/tokens"),
    ];
    for (arguments, says) in cases {
        let output = run(daemon.client("put").args(MODEL).args(arguments));
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).contains(says), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn a_put_of_too_few_or_too_many_bytes_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let daemon = Daemon::start();
    let source = folder.path().join("source");
    let put = |bytes: usize| {
        fs::write(&source, vec![7; bytes]).unwrap();
        let mut command = daemon.client("put");
        command.args(MODEL).args(TOKENS).args(["--payload", "-", "--json"]);
        run(command.stdin(fs::File::open(&source).unwrap()))
    };
    let found = || last_object(&run(daemon.client("lookup").args(MODEL).args(TOKENS).arg("--json")));
    for (bytes, has) in [(0, "only 0"), (4096 * 2 + 1, "only 8193"), (4096 * 3 + 1, "more")] {
        let output = put(bytes);
        assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
        let said = stderr(&output);
        let why = format!("standard input has {has} bytes, but the whole blocks of these tokens need 12288");
        assert!(said.contains(&why) && said.contains("nothing was stored"), "{said}");
        assert_eq!(found()["host_blocks"].as_u64(), Some(0), "{bytes}");
    }
    assert_eq!(last_object(&put(4096 * 3))["stored_blocks"].as_u64(), Some(3));
    assert_eq!(found()["prefix_blocks"].as_u64(), Some(3));
}

#[test]
fn a_put_that_runs_out_of_bytes_late_forgets_what_it_stored_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let daemon = Daemon::start();
    wait_until("memory", || last_object(&run(daemon.client("status").arg("--json")))["tiers"][0]["state"] == "ready");
    let source = folder.path().join("source");
    // Blocks of 8 MiB: the command holds four of them at once.
    let large = |subcommand: &str, tokens: &str, more: &[&str]| {
        let mut command = daemon.client(subcommand);
        command.args(["--model", "m", "--block-tokens", "1", "--block-bytes", "8MiB", "--tokens", tokens]).args(more);
        command
    };
    let there = last_object(&run(&mut large("put", "1", &["--generate", "--json"])));
    assert_eq!(there["stored_blocks"].as_u64(), Some(1), "{there}");
    fs::write(&source, vec![7; (8 << 20) * 4 + 5]).unwrap();
    let mut command = large("put", "1 2 3 4 5", &["--payload", "-"]);
    let output = run(command.stdin(fs::File::open(&source).unwrap()));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("only 33554437 bytes") && said.contains("need 41943040"), "{said}");
    assert!(said.contains("the 3 blocks that this command had stored were purged"), "{said}");
    let found = last_object(&run(&mut large("lookup", "1 2 3 4 5", &["--json"])));
    assert_eq!((found["prefix_blocks"].as_u64(), found["host_blocks"].as_u64()), (Some(1), Some(1)), "{found}");
}

#[test]
fn a_command_that_ended_is_not_attached_any_more() {
    let daemon = Daemon::start();
    let attached = || last_object(&run(daemon.client("status").arg("--json")))["attachments"].as_u64();
    for _ in 0..20 {
        assert!(run(daemon.client("lookup").args(MODEL).args(TOKENS)).status.success());
    }
    assert_eq!(attached(), Some(0), "after lookups");
    for (subcommand, more) in [("put", &["--generate"][..]), ("get", &[]), ("purge", &[])] {
        let output = run(daemon.client(subcommand).args(MODEL).args(TOKENS).args(more));
        assert!(output.status.success(), "{subcommand}: {}", stderr(&output));
        assert_eq!(attached(), Some(0), "after {subcommand}");
    }
    assert_eq!(run(daemon.client("get").args(MODEL).args(TOKENS)).status.code(), Some(1));
    assert_eq!(attached(), Some(0), "after a miss");
    assert!(run(daemon.client("watch").args(["--count", "1"])).status.success());
    assert_eq!(attached(), Some(0), "after watch");
}

#[test]
fn a_get_that_does_not_get_all_says_why_and_leaves_the_file_as_it_was() {
    let folder = TempDir::new().unwrap();
    let daemon = Daemon::start();
    let asked = |subcommand: &str, more: &[&str]| run(daemon.client(subcommand).args(MODEL).args(more));
    let put = asked("put", &[&TOKENS[..], &["--generate"]].concat());
    assert!(put.status.success(), "{}", stderr(&put));
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    fs::write(&file, "of before").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let longer = ["--tokens", "1 2 3 4 5 6 7 8 9 10 11 12 99 99 99 99"];
    let part = asked("get", &[&longer[..], &["-o", file.to_str().unwrap()]].concat());
    assert_eq!(part.status.code(), Some(1));
    let said = stderr(&part);
    assert!(said.contains("3 of 4 blocks came") && said.contains("`tender put` stores it"), "{said}");
    assert!(said.contains("was not written"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), b"of before");

    let whole = asked("get", &[&TOKENS[..], &["-o", link.to_str().unwrap()]].concat());
    assert!(whole.status.success(), "{}", stderr(&whole));
    assert!(link.is_symlink() && fs::read(&file).unwrap().len() == 3 * 4096);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "something was left behind");
    let device = asked("get", &[&TOKENS[..], &["-o", "/dev/null"]].concat());
    assert!(device.status.success() && !Path::new("/dev/null").is_file(), "{}", stderr(&device));

    let both = asked("get", &[&TOKENS[..], &["-o", "-", "--json"]].concat());
    assert_eq!(both.status.code(), Some(1));
    assert!(stderr(&both).contains("-o FILE") && stdout(&both).is_empty(), "{}", stderr(&both));
}

#[test]
fn a_put_that_is_turned_away_says_why_and_the_cure() {
    let mut site = Site::new(&["--host", "64MiB", "--disk", "0"]);
    site.configure("[[tenants]]\nname = \"default\"\nhost_quota = \"2KiB\"\n");
    let daemon = site.start();
    let mut command = tender();
    command.args(["put", "--generate", "--socket"]).arg(site.socket()).args(MODEL).args(TOKENS);
    let output = run(&mut command);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    assert!(said.contains("of 3 blocks are not stored") && said.contains("host_quota"), "{said}");
    assert!(stdout(&output).contains("over quota"), "{}", stdout(&output));
    daemon.stop();
}

#[test]
fn status_shows_a_table_or_an_object() {
    let daemon = Daemon::start();
    let object = last_object(&run(daemon.client("status").arg("--json")));
    let tiers: Vec<_> = object["tiers"].as_array().unwrap().iter().map(|tier| tier["tier"].as_str().unwrap()).collect();
    assert!(tiers.contains(&"host"), "{object}");
    assert!(object["process_id"].as_u64().is_some() && object["uptime_ms"].as_u64().is_some());
    let table = run(&mut daemon.client("status"));
    assert!(table.status.success() && stdout(&table).contains("host"), "{}", stdout(&table));
}

#[test]
fn doctor_works_with_a_daemon_and_without() {
    let folder = TempDir::new().unwrap();
    let daemon = Daemon::start();
    for socket in [daemon.socket.clone(), folder.path().join("nobody.sock")] {
        let mut command = tender();
        let output =
            run(command.arg("doctor").arg("--socket").arg(&socket).arg("--dir").arg(folder.path()).arg("--json"));
        assert!(matches!(output.status.code(), Some(0 | 1)), "{}", stderr(&output));
        let findings: Vec<serde_json::Value> =
            stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(!findings.is_empty(), "{}", stderr(&output));
        let is_bad = findings.iter().any(|finding| finding["verdict"] == "BAD");
        assert_eq!(output.status.code(), Some(i32::from(is_bad)));
        assert!(findings.iter().all(|finding| finding["verdict"] == "good" || finding["cure"] != ""), "{findings:?}");
    }
}

#[test]
fn doctor_removes_sockets_at_which_nobody_listens_and_asks_no_daemon_before() {
    let folder = TempDir::new().unwrap();
    let (socket, door) = (folder.path().join("tender.sock"), folder.path().join("tender.sock.door"));
    let doctor = |flags: &[&str]| {
        let mut command = tender();
        command.arg("doctor").args(flags).arg("--json").arg("--dir").arg(folder.path()).arg("--socket").arg(&socket);
        let output = run(&mut command);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let lines = stdout(&output).lines().filter(|line| line.contains(socket.to_str().unwrap())).map(str::to_owned);
        lines.collect::<Vec<_>>().join("\n")
    };
    let names = |said: &str, path: &Path| said.contains(&format!("{}\"", path.display()));
    for path in [&socket, &door] {
        drop(UnixListener::bind(path).unwrap());
    }
    let found = doctor(&[]);
    assert!(found.contains("left behind") && names(&found, &door), "{found}");
    let removed = doctor(&["--clean"]);
    assert!(names(&removed, &socket) && names(&removed, &door), "{removed}");
    assert!(!socket.exists() && !door.exists());
    // One that hangs, and says nothing to whoever asks.
    let hangs = UnixListener::bind(&socket).unwrap();
    drop(UnixListener::bind(&door).unwrap());
    let removed = doctor(&["--clean"]);
    assert!(!names(&removed, &socket) && names(&removed, &door), "{removed}");
    assert!(socket.exists() && !door.exists());
    hangs.set_nonblocking(true).unwrap();
    for mut asked in hangs.incoming().map_while(Result::ok) {
        let mut question = Vec::new();
        asked.read_to_end(&mut question).unwrap();
        assert!(question.is_empty(), "the daemon was asked");
    }
}

#[test]
fn watch_tells_of_blocks_that_come() {
    let daemon = Daemon::start();
    let mut watch = daemon.client("watch").arg("--json").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines().map(Result::unwrap);
    let synced = lines.find(|line| line.contains("\"synced\"")).unwrap();
    assert!(synced.contains("\"sequence\":"), "{synced}");
    let put = run(daemon.client("put").args(MODEL).args(TOKENS).arg("--generate"));
    assert!(put.status.success());
    let added: Vec<_> = lines.filter(|line| line.contains("\"added\"") && line.contains("\"host\"")).take(3).collect();
    assert!(added.iter().all(|line| line.contains("\"block_bytes\":4096")), "{added:?}");
    watch.kill().unwrap();
    watch.wait().unwrap();
    let counted = run(daemon.client("watch").args(["--count", "4"]));
    assert_eq!(stdout(&counted).lines().count(), 4);
}

#[test]
fn a_reader_that_has_had_enough_ends_a_command_quietly() {
    let daemon = Daemon::start();
    let mut command = daemon.client("status");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = wait(child);
    assert_eq!(stderr(&output), "");
    assert!(matches!(output.status.code(), Some(0 | 141)), "{}", output.status);
}

#[test]
fn the_demo_proves_its_bytes_and_cleans_up() {
    let scratch = TempDir::new().unwrap();
    let began = Instant::now();
    let object = last_object(&run(tender().arg("demo").arg("--json").arg("--dir").arg(scratch.path())));
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert_eq!(object["wrong_bytes"].as_u64(), Some(0));
    assert!(object["tokens_saved"].as_u64().unwrap() > 0);
    for part in ["before_kill", "after_kill"] {
        assert!(object[part]["requests"].as_u64().unwrap() > 0, "{object}");
        assert!(object[part]["hit_blocks_host"].as_u64().unwrap() > 0, "{object}");
    }
    let kept = |name: &str| object[name].as_u64().unwrap();
    assert!(kept("host_blocks_after_kill") > kept("host_blocks_before_kill") / 2, "{object}");
    assert!(fs::read_dir(scratch.path()).unwrap().next().is_none(), "something was left behind");
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let scratch = TempDir::new().unwrap();
    let mut command = tender();
    command.arg("demo").arg("--dir").arg(scratch.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    wait_until("the demo's daemon", || !processes_naming(scratch.path()).iter().all(|process| *process == child.id()));
    signal(child.id(), "INT");
    let output = wait(child);
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    wait_until("the end of its daemon", || processes_naming(scratch.path()).is_empty());
    assert!(fs::read_dir(scratch.path()).unwrap().next().is_none(), "something was left behind");
}
