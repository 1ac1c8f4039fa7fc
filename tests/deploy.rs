//! What stands in `deploy/` and `README.md` is true: a wrong option or flag there, or an example that no longer is the one that is run,
//! fails here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use tender_kvstore::{Config, ConfigError, Overrides};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn load(config: &str) -> Result<Config, ConfigError> {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("tender.toml");
    fs::write(&file, config).unwrap();
    Config::load(Some(&file), &Overrides::default())
}

/// `name` of a line `#name = value`: an option that is off.
fn option_that_is_off(line: &str) -> Option<&str> {
    let (name, _) = line.strip_prefix('#')?.split_once(" = ")?;
    name.chars().all(|c| c.is_ascii_lowercase() || c == '_').then_some(name)
}

/// Every field that the daemon knows where it does not know `nonsense`.
fn known_fields(config: &str) -> BTreeSet<String> {
    let refused = load(config).expect_err("nonsense is no field").to_string();
    let (_, list) = refused.split_once("expected one of ").unwrap_or_else(|| panic!("{refused}"));
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_example_configuration_is_understood() {
    let config = Config::load(Some(&path("deploy/tender.toml")), &Overrides::default()).unwrap();
    let tenants: Vec<_> =
        config.tenants.iter().map(|tenant| (tenant.name.as_str(), tenant.token_file.is_some())).collect();
    assert_eq!(tenants, [("engines", false), ("batch", true)]);
    assert_eq!(config.socket_mode, 0o660);
    assert!(config.disk.is_some());
}

#[test]
fn every_option_of_the_example_can_be_switched_on() {
    let example = text("deploy/tender.toml");
    let off: Vec<&str> = example.lines().filter(|line| option_that_is_off(line).is_some()).collect();
    assert!(off.len() > 3, "options that are off are lines `#name = value`: {off:?}");
    for option in off {
        let with_it = example.replace(option, &option[1..]);
        load(&with_it).unwrap_or_else(|error| panic!("{option}: {error}"));
    }
}

#[test]
fn every_field_stands_in_the_example_and_in_the_readme() {
    let (example, readme) = (text("deploy/tender.toml"), text("README.md"));
    let fields = known_fields("nonsense = 1");
    assert!(fields.len() > 10, "{fields:?}");
    // Short forms, which cannot stand beside what they are short for.
    let in_example = |field: &&String| !["dir", "token_file"].contains(&field.as_str());
    for field in fields.iter().filter(in_example).filter(|field| *field != "tenants") {
        let stands = |line: &str| {
            line.trim_start_matches('#').strip_prefix(field.as_str()).is_some_and(|rest| rest.starts_with(" = "))
        };
        assert!(example.lines().any(stands), "deploy/tender.toml does not show `{field}`");
    }
    let of_tenants = known_fields("[[tenants]]\nname = \"a\"\nnonsense = 1");
    for field in fields.iter().chain(&of_tenants) {
        assert!(readme.contains(&format!("`{field}`")), "the README does not name the field `{field}`");
    }
}

#[test]
fn the_unit_starts_the_daemon_with_flags_that_it_knows() {
    let unit = text("deploy/tender.service");
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a unit starts something");
    let (binary, arguments) = start.split_once(' ').expect("a binary and its arguments");
    assert!(binary.ends_with("/tender"));
    let (command, flags) = arguments.split_once(' ').expect("a command and its flags");
    let help = Command::new(env!("CARGO_BIN_EXE_tender")).args([command, "--help"]).output().unwrap();
    assert!(help.status.success(), "`tender {command}` is no command");
    let help = String::from_utf8(help.stdout).unwrap();
    let known: BTreeSet<&str> = help.split_whitespace().filter(|word| word.starts_with("--")).collect();
    let flags: Vec<&str> = flags.split_whitespace().filter(|word| word.starts_with("--")).collect();
    assert!(flags.contains(&"--config"), "{flags:?}");
    for flag in flags {
        assert!(known.contains(flag), "`tender {command}` knows no {flag}: {known:?}");
    }
}

#[test]
fn the_unit_and_the_example_agree_on_folders() {
    let (unit, config) =
        (text("deploy/tender.service"), Config::load(Some(&path("deploy/tender.toml")), &Overrides::default()));
    let config = config.unwrap();
    let named = |field: &str| unit.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default().to_owned();
    let under = |root: &str, name: String| Path::new(root).join(name);
    assert_eq!(config.dirs, [under("/var/lib", named("StateDirectory="))]);
    assert_eq!(config.socket.parent(), Some(&*under("/run", named("RuntimeDirectory="))));
}

#[test]
fn the_readme_shows_the_examples_that_are_run() {
    let readme = text("README.md");
    for example in ["client/examples/quickstart.rs", "tests/python/quickstart.py"] {
        assert!(readme.contains(text(example).trim_end()), "the README does not show {example} as it is");
    }
}

#[test]
fn commands_of_the_readme_exist() {
    let readme = text("README.md");
    let help = Command::new(env!("CARGO_BIN_EXE_tender")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let known: BTreeSet<&str> =
        help.lines().filter(|line| line.starts_with("  ")).filter_map(|line| line.split_whitespace().next()).collect();
    let mut shown = BTreeSet::new();
    for line in readme.lines().filter_map(|line| line.strip_prefix("tender ")) {
        let mut words = line.split_whitespace();
        let command = words.next().expect("a command");
        assert!(known.contains(command), "the README shows `tender {command}`, which is no command: {known:?}");
        let help = Command::new(env!("CARGO_BIN_EXE_tender")).args([command, "--help"]).output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        for flag in words.filter(|word| word.starts_with("--")) {
            let is_known = help.split_whitespace().any(|word| word.trim_end_matches(',') == flag);
            assert!(is_known, "the README shows `tender {command} {flag}`, which is no flag of it");
        }
        shown.insert(command);
    }
    assert!(shown.len() > 6, "commands are shown in lines that begin with `tender `: {shown:?}");
}
