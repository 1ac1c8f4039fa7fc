//! Traces are read as they are meant, and a broken one is refused with file, line, field and value.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use tender::trace::generate::Workload;
use tender::trace::session::{Agent, Scope, Session, Stop};
use tender::trace::{Trace, mooncake, session_json};

fn write(folder: &TempDir, name: &str, content: &str) -> PathBuf {
    let file = folder.path().join(name);
    fs::write(&file, content).unwrap();
    file
}

fn requests(file: &Path) -> Vec<Result<mooncake::Request, String>> {
    mooncake::Requests::open(file).unwrap().map(|read| read.map_err(|error| error.to_string())).collect()
}

#[test]
fn mooncake_lines_are_requests_whatever_their_order_of_fields() {
    let folder = TempDir::new().unwrap();
    let lines = "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 1]}\n\n\
                 {\"hash_ids\":[0,7],\"timestamp\":2500.5,\"input_length\":1024,\"extra\":{\"a\":[1]}}";
    let file = write(&folder, "any.name", lines);
    assert_eq!(Trace::open(&file).unwrap(), Trace::Mooncake(file.clone()));
    let requests: Vec<_> = requests(&file).into_iter().map(Result::unwrap).collect();
    assert_eq!(requests.len(), 2);
    assert_eq!((requests[0].input_length, requests[0].output_length, &requests[0].hash_ids[..]), (600, 5, &[0, 1][..]));
    assert_eq!((requests[1].timestamp, &requests[1].hash_ids[..]), (2500.5, &[0, 7][..]));
}

#[test]
fn a_broken_mooncake_line_names_file_line_field_and_value_and_the_next_line_is_read() {
    let folder = TempDir::new().unwrap();
    let good = "{\"timestamp\":1,\"input_length\":1,\"hash_ids\":[1]}";
    let cases = [
        ("{\"timestamp\":-4,\"input_length\":1,\"hash_ids\":[1]}", "field `timestamp` is `-4`"),
        ("{\"timestamp\":1e300,\"input_length\":1,\"hash_ids\":[1]}", "field `timestamp` is `1e+300`"),
        ("{\"timestamp\":1,\"input_length\":\"many\",\"hash_ids\":[1]}", "field `input_length` is `\"many\"`"),
        ("{\"timestamp\":1,\"input_length\":1,\"hash_ids\":[1,-2]}", "field `hash_ids[1]` is `-2`"),
        ("{\"timestamp\":1,\"input_length\":1,\"hash_ids\":7}", "field `hash_ids` is `7`"),
        ("{\"timestamp\":1,\"input_length\":1}", "field `hash_ids` is missing"),
        ("[1,2]", "no JSON object"),
        ("{\"timestamp\":1,\"input_length\":1,\"hash_", "EOF"),
    ];
    for (broken, says) in cases {
        let file = write(&folder, "broken.jsonl", &format!("{good}\n{broken}\n{good}\n"));
        let requests = requests(&file);
        let error = requests[1].as_ref().unwrap_err();
        assert!(error.contains("broken.jsonl, line 2: ") && error.contains(says), "{broken}: {error}");
        assert!(error.contains("--skip-broken"), "{error}");
        assert!(requests.len() == 3 && requests[2].is_ok());
    }
}

#[test]
fn what_is_no_trace_is_refused_with_the_cure() {
    let folder = TempDir::new().unwrap();
    let refused = |file: &Path| Trace::open(file).unwrap_err().to_string();
    let xz = folder.path().join("trace.jsonl.xz");
    fs::write(&xz, b"\xfd7zXZ\0\0\x04rest").unwrap();
    assert!(refused(&xz).contains("xz -dk"), "{}", refused(&xz));
    let gzip = folder.path().join("trace.gz");
    fs::write(&gzip, b"\x1f\x8b\x08rest").unwrap();
    assert!(refused(&gzip).contains("gunzip"));
    assert!(refused(&write(&folder, "other.txt", "{\"a\": 1}")).contains("neither a Mooncake trace"));
    assert!(refused(&write(&folder, "text.txt", "hello")).contains("neither a Mooncake trace"));
    assert!(refused(&write(&folder, "empty.txt", "")).contains("neither a Mooncake trace"));
    assert!(refused(&folder.path().join("nothing")).contains("cannot be read"));
    let empty = TempDir::new().unwrap();
    assert!(refused(empty.path()).contains("no *.json files"));
}

const NESTED: &str = r#"{"requests":[
  {"t":0.0,"type":"n","in":128,"out":3,"hash_ids":[1,2],"stop":"tool_use","input_types":["text"]},
  {"t":10.0,"type":"subagent","agent_id":"a","requests":[
    {"t":0.0,"type":"n","in":64,"out":1,"hash_ids":[9],"stop":""},
    {"t":1.5,"type":"subagent","requests":[{"t":0.25,"type":"s","in":64,"out":1,"hash_ids":[20],"stop":"end_turn"}]},
    {"t":30.0,"type":"n","in":128,"out":1,"hash_ids":[9,10],"stop":"end_turn"}]},
  {"t":20.0,"type":"n","in":192,"out":4,"hash_ids":[1,2,3],"stop":"tool_use"},
  {"t":50.0,"type":"n","in":192,"out":4,"hash_ids":[1,7,8],"stop":"end_turn"}],
 "id":"nested","block_size":64,"hash_id_scope":"local","tool_tokens":12,"system_tokens":34,"models":["m"]}"#;

#[test]
fn subagents_run_beside_their_parents_at_times_from_their_own_start() {
    let folder = TempDir::new().unwrap();
    let file = write(&folder, "nested.json", NESTED);
    assert_eq!(Trace::open(folder.path()).unwrap(), Trace::Sessions(vec![file.clone()]));
    let session = session_json::read(&file).unwrap();
    let Session { id, block_tokens, scope, tool_tokens, system_tokens, agents, requests } = &session;
    assert_eq!(
        (id.as_str(), *block_tokens, *scope, *tool_tokens, *system_tokens),
        ("nested", 64, Scope::Local, 12, 34)
    );
    let agent = |parent, start_ms| Agent { parent, start_ms };
    assert_eq!(*agents, [agent(None, 0), agent(Some(0), 10_000), agent(Some(1), 11_500)]);
    let shape: Vec<_> =
        requests.iter().map(|r| (r.agent, r.start_ms, r.kept_blocks, r.added_ids.clone(), r.stop)).collect();
    assert_eq!(
        shape,
        [
            (0, 0, 0, vec![1, 2], Stop::ToolUse),
            (1, 10_000, 0, vec![9], Stop::Unknown),
            (2, 11_750, 0, vec![20], Stop::EndTurn),
            (0, 20_000, 2, vec![3], Stop::ToolUse),
            (1, 40_000, 1, vec![10], Stop::EndTurn),
            (0, 50_000, 1, vec![7, 8], Stop::EndTurn),
        ]
    );
    assert_eq!(session.scope_name(), "nested");
}

#[test]
fn pauses_are_cut_and_what_follows_moves_up() {
    let folder = TempDir::new().unwrap();
    let mut session = session_json::read(&write(&folder, "nested.json", NESTED)).unwrap();
    session.cap_gaps(5_000);
    let times: Vec<_> = session.requests.iter().map(|request| request.start_ms).collect();
    assert_eq!(times, [0, 5_000, 6_750, 11_750, 16_750, 21_750]);
}

#[test]
fn a_broken_session_names_file_field_and_value() {
    let folder = TempDir::new().unwrap();
    let cases = [
        (
            "\"hash_ids\":[20]",
            "\"hash_ids\":[20,\"x\"]",
            "requests[1].requests[1].requests[0]: field `hash_ids[1]` is `\"x\"`",
        ),
        ("\"t\":20.0", "\"t\":-1", "requests[2]: field `t` is `-1`"),
        ("\"t\":20.0,", "", "requests[2]: field `t` is missing"),
        (
            "\"in\":64,\"out\":1,\"hash_ids\":[9]",
            "\"in\":0.5,\"hash_ids\":[9]",
            "requests[1].requests[0]: field `in` is `0.5`",
        ),
        ("\"block_size\":64", "\"block_size\":0", "field `block_size` is `0`"),
        ("\"block_size\":64,", "", "field `block_size` is missing"),
        ("\"id\":\"nested\",", "", "field `id` is missing"),
        ("\"local\"", "\"sideways\"", "field `hash_id_scope` is `\"sideways\"`"),
        ("\"models\":[\"m\"]}", "", "no session"),
    ];
    for (from, to, says) in cases {
        let broken = NESTED.replacen(from, to, 1);
        assert_ne!(broken, NESTED);
        let error = session_json::read(&write(&folder, "broken.json", &broken)).unwrap_err();
        assert!(error.skippable);
        let error = error.to_string();
        assert!(error.contains("broken.json") && error.contains(says), "{to}: {error}");
    }
}

#[test]
fn the_generator_shares_prompts_within_a_kind_and_nothing_else() {
    let workload = Workload { sessions: 6, agent_kinds: 2, ..Workload::default() };
    let sessions: Vec<_> = workload.all().collect();
    assert_eq!(sessions, workload.all().collect::<Vec<_>>());
    let first = |session: &Session| session.requests[0].added_ids.clone();
    let common = |a: &Session, b: &Session| first(a).iter().zip(&first(b)).take_while(|(a, b)| a == b).count();
    assert!(common(&sessions[0], &sessions[2]) * 16 >= 3_900);
    assert_eq!(common(&sessions[0], &sessions[1]), 0);
    for session in &sessions {
        assert!(session.requests.windows(2).all(|pair| pair[0].start_ms < pair[1].start_ms));
        for (request, blocks) in session.requests.iter().zip(session.chain_blocks()) {
            assert_eq!(blocks as u64, request.input_tokens / 16);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_session_that_was_written_reads_back_equal(
        seed: u64,
        index in 0usize..50,
        subagents_permille in 0u64..600,
        compactions_permille in 0u64..600,
        block_tokens in 1u32..600,
        turns in 1u64..5,
    ) {
        let workload = Workload {
            seed,
            block_tokens,
            turns: (1, turns),
            prompt_tokens: (100, 2_000),
            subagents_permille,
            compactions_permille,
            ..Workload::default()
        };
        let session = workload.session(index);
        let folder = TempDir::new().unwrap();
        let mut text = Vec::new();
        session_json::write(&session, &mut text).unwrap();
        let file = folder.path().join("session.json");
        fs::write(&file, text).unwrap();
        prop_assert_eq!(session_json::read(&file).unwrap(), session);
    }
}

/// The recorded traces, where they are at hand.
#[test]
fn recorded_traces_have_the_sizes_that_their_description_says() {
    let Some(traces) = std::env::var_os("TENDER_TRACES").map(PathBuf::from) else {
        return eprintln!("SKIPPED: TENDER_TRACES names no folder of recorded traces");
    };
    let unpacked = TempDir::new().unwrap();
    let file = unpacked.path().join("conversation.jsonl");
    let Ok(status) = std::process::Command::new("xz")
        .arg("-dc")
        .arg(traces.join("conversation.jsonl.xz"))
        .stdout(fs::File::create(&file).unwrap())
        .status()
    else {
        return eprintln!("SKIPPED: there is no program `xz` to unpack the recorded traces");
    };
    assert!(status.success(), "conversation.jsonl.xz did not unpack");
    let requests: Vec<_> = requests(&file).into_iter().map(Result::unwrap).collect();
    assert_eq!(requests.len(), 12_031);
    assert_eq!(requests.iter().map(|request| request.hash_ids.len()).sum::<usize>(), 288_500);
}
