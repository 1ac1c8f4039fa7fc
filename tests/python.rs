//! The examples that people begin with, run against a daemon: one in Python, over nothing but the proto file, and those in Rust.

#[path = "../client/examples/in_place.rs"]
mod in_place;
#[path = "../client/examples/own_memory.rs"]
mod own_memory;
#[path = "../client/examples/quickstart.rs"]
mod quickstart;
#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::error::Error;
use std::process::{Command, Stdio};

use support::site::Site;
use support::{run, stderr, stdout};

/// A Python that has what the example needs.
fn python() -> Option<String> {
    let named = std::env::var("TENDER_TEST_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".to_owned());
    let mut command = Command::new(&python);
    command
        .args(["-c", "import grpc, grpc_tools, blake3"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let has_modules = command.status().is_ok_and(|status| status.success());
    assert!(has_modules || named.is_none(), "TENDER_TEST_PYTHON ({python}) cannot import grpc, grpc_tools and blake3");
    has_modules.then_some(python)
}

/// Skipped, and says so, where the modules are not installed; with TENDER_REQUIRE_PYTHON=1 that is a failure.
#[test]
fn the_python_example_puts_and_gets() {
    let Some(python) = python() else {
        let required = std::env::var("TENDER_REQUIRE_PYTHON").is_ok_and(|required| required == "1");
        assert!(!required, "no Python with grpcio, grpcio-tools and blake3: name one with TENDER_TEST_PYTHON");
        println!("SKIPPED: no Python with grpcio, grpcio-tools and blake3; name one with TENDER_TEST_PYTHON");
        return;
    };
    let site = Site::small();
    let daemon = site.start();
    for before in [0, 4] {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/quickstart.py");
        let output = run(Command::new(&python).arg(script).arg(site.socket()).stdin(Stdio::null()));
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
        assert_eq!(stdout(&output).trim(), format!("4 blocks: {before} were there before, all came back right"));
    }
    daemon.stop();
}

/// Names the example that this process is.
const EXAMPLE: &str = "EXAMPLE";

type Main = fn() -> Result<(), Box<dyn Error>>;

/// With the end of what each says, the first time and the second.
const EXAMPLES: [(&str, Main, [&str; 2]); 3] = [
    (
        "quickstart",
        quickstart::main,
        ["4 blocks: 0 were there before, 4 came back right", "4 blocks: 4 were there before, 4 came back right"],
    ),
    ("in_place", in_place::main, ["committed: [Stored]", "committed: []"]),
    ("own_memory", own_memory::main, [" are Used; the block is Stored", "; the block is AlreadyPresent"]),
];

/// The Rust examples are part of this test: in processes of their own, each of which is this one again, since they read the environment.
#[test]
fn the_rust_examples_do_what_they_say() {
    if let Ok(this) = std::env::var(EXAMPLE) {
        let (_, main, _) = EXAMPLES.into_iter().find(|(name, ..)| *name == this).unwrap();
        return main().unwrap();
    }
    let site = Site::small();
    let daemon = site.start();
    for (name, _, says) in EXAMPLES {
        for says in says {
            let mut again = Command::new(std::env::current_exe().unwrap());
            again.args(["--exact", "the_rust_examples_do_what_they_say", "--nocapture"]);
            again.env(EXAMPLE, name).env("TENDER_SOCKET", site.socket());
            let output = run(again.stdin(Stdio::null()));
            assert!(output.status.success(), "{name}: {}{}", stdout(&output), stderr(&output));
            assert!(stdout(&output).lines().any(|line| line.ends_with(says)), "{name}: {}", stdout(&output));
        }
    }
    daemon.stop();
}
