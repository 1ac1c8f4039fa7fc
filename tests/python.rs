//! The examples that people begin with, run against a daemon: one in Python, over nothing but the proto file, and one in Rust.

#[path = "../client/examples/quickstart.rs"]
mod quickstart;
#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

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

/// The Rust example is part of this test: in a process of its own, which is this one again, since it reads the environment.
#[test]
fn the_rust_example_puts_and_gets() {
    if std::env::var_os("TENDER_SOCKET").is_some() {
        return quickstart::main().unwrap();
    }
    let site = Site::small();
    let daemon = site.start();
    for before in [0, 4] {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "the_rust_example_puts_and_gets", "--nocapture"]).env("TENDER_SOCKET", site.socket());
        let output = run(again.stdin(Stdio::null()));
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
        let says = format!("4 blocks: {before} were there before, 4 came back right");
        assert!(stdout(&output).contains(&says), "{}", stdout(&output));
    }
    daemon.stop();
}
