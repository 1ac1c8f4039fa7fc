//! Configurations that cannot be meant: the daemon does not start, and says which field, which value, and what it must be. And those
//! that do not fit the blocks of a client: the log says so.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::fs;
use std::process::Command;

use support::blocks::{Run, attach_to};
use support::site::{Site, TOKEN, refusal};
use support::tender;
use tender_client::proto::BlockLayout;
use tender_client::{BlockStore, PutOutcome};

/// `tender serve` with this configuration alone.
fn configured(site: &Site, config: &str) -> Command {
    let file = site.path("tender.toml");
    fs::write(&file, config).unwrap();
    let mut command = tender();
    command.arg("serve").arg("--config").arg(file);
    command
}

/// Refused in words that say all of `says`.
fn refused(command: &mut Command, says: &[&str]) {
    let said = refusal(command);
    for words in says {
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}

#[test]
fn fields_and_values_that_do_not_exist_are_named() {
    let site = Site::small();
    let data = site.path("data");
    let paths = format!("socket = \"{}\"\n", site.socket().display());
    let dir = format!("dir = \"{}\"\n", data.display());
    let long = format!("/tmp/{}", "s".repeat(120));
    let cases: [(&str, &[&str]); 22] = [
        ("hots = \"1GiB\"", &["tender.toml", "hots", "host"]),
        ("host = \"lots\"", &["tender.toml", "host", "`lots` is no size", "512MiB"]),
        ("host = -5", &["tender.toml", "host"]),
        ("host = true", &["tender.toml", "host", "a size such as"]),
        ("host = \"9999TiB\"", &["host is `9999 TiB`", "this machine has"]),
        ("host = \"1MiB\"", &["host is `1 MiB`", "at least one segment", "16 MiB"]),
        ("host_segment = \"3MiB\"", &["host_segment is `3 MiB`", "power of two", "16 MiB"]),
        ("disk = \"1MiB\"", &["disk is `1 MiB`", "at least one segment", "16 MiB"]),
        ("disk_segment = \"24MiB\"", &["disk_segment is `24 MiB`", "power of two"]),
        ("listen = \"0.0.0.0:7777\"", &["listen is `0.0.0.0:7777`", "loopback"]),
        ("listen = \"10.0.0.1:7777\"", &["listen is `10.0.0.1:7777`", "loopback"]),
        ("listen = \"localhost\"", &["tender.toml", "listen"]),
        ("listen = \"127.0.0.1:7777\"", &["listen is", "everybody needs a token", "--token-file"]),
        ("metrics = \"[::]:9\"", &["metrics is `[::]:9`", "loopback"]),
        ("socket_mode = \"0888\"", &["socket_mode is `0888`", "octal"]),
        ("socket_mode = \"17777\"", &["socket_mode is `17777`", "octal"]),
        ("dirs = [\"/tmp/a\"]", &["dir is", "either `dir` or `dirs`"]),
        ("log = \"tender=loud\"", &["log is `tender=loud`", "info"]),
        ("log_format = \"xml\"", &["tender.toml", "log_format", "json"]),
        ("write_budget_per_day = \"x\"", &["tender.toml", "write_budget_per_day", "`x` is no size"]),
        ("salt_secret_file = \"/nowhere/secret\"", &["salt_secret_file", "/nowhere/secret"]),
        ("host = [", &["tender.toml", "line"]),
    ];
    for (line, says) in cases {
        refused(&mut configured(&site, &format!("{paths}{dir}{line}\n")), says);
    }
    refused(&mut configured(&site, &format!("{paths}dirs = []\n")), &["dirs is `0`", "1 to 16"]);
    refused(&mut configured(&site, &format!("{dir}socket = \"{long}\"\n")), &["socket is", "107 bytes"]);
    refused(tender().arg("serve").arg("--config").arg("/nowhere.toml"), &["/nowhere.toml", "--config"]);
    assert!(!data.exists(), "a configuration is checked before anything is made");
}

#[test]
fn flags_and_environment_are_checked_like_the_file() {
    let cases: [(&[&str], &[&str]); 6] = [
        (&["--host", "lots"], &["--host", "lots"]),
        (&["--host", "9999TiB"], &["host is `9999 TiB`"]),
        (&["--disk", "5"], &["disk is `5 B`"]),
        (&["--listen", "0.0.0.0:1"], &["listen is `0.0.0.0:1`"]),
        (&["--metrics", "8.8.8.8:1"], &["metrics is `8.8.8.8:1`"]),
        (&["--colour", "red"], &["--colour"]),
    ];
    for (flags, says) in cases {
        refused(&mut Site::new(flags).command(), says);
    }
    let site = Site::new(&[]);
    for (name, value, says) in [
        ("TENDER_HOST", "lots", "TENDER_HOST is `lots`"),
        ("TENDER_LISTEN", "here", "TENDER_LISTEN is `here`"),
        ("TENDER_LISTEN", "0.0.0.0:1", "listen is `0.0.0.0:1`"),
    ] {
        refused(site.command().env(name, value), &[says]);
    }
}

#[test]
fn tenants_that_cannot_be_told_apart_are_refused() {
    let site = Site::small();
    let token = site.secret("token", TOKEN, 0o600);
    let named = |name: &str, token: &str| format!("[[tenants]]\nname = \"{name}\"\n{token}\n");
    let with_token = format!("token_file = \"{}\"", token.display());
    let paths = format!("socket = \"{}\"\ndir = \"{}\"\n", site.socket().display(), site.path("data").display());
    let many: String = (0..65).map(|i| named(&format!("t{i}"), &with_token)).collect();
    let cases: Vec<(String, &[&str])> = vec![
        (named("", ""), &["tenants[0].name is ``", "1 to 64"]),
        (named("Ada", ""), &["tenants[0].name is `Ada`", "a-z"]),
        (named("a/b", ""), &["tenants[0].name is `a/b`"]),
        (named(&"a".repeat(65), ""), &["tenants[0].name is `aaaa", "1 to 64"]),
        (named("a", "") + &named("a", &with_token), &["tenants[1].name is `a`", "taken"]),
        (named("a", "") + &named("b", ""), &["tenants is `2`", "only one tenant", "token_file"]),
        (named("a", "colour = 1"), &["tender.toml", "colour", "host_quota"]),
        (named("a", "host_quota = \"much\""), &["tender.toml", "host_quota", "`much` is no size"]),
        (named("a", &with_token) + &named("b", &with_token), &["tenant `b`", "another tenant's"]),
        (format!("{with_token}\n") + &named("a", ""), &["token_file is", "each tenant names its own"]),
        (many, &["tenants is `65`", "at most 64"]),
    ];
    for (tenants, says) in cases {
        refused(&mut configured(&site, &format!("{paths}{tenants}")), says);
    }
}

#[test]
fn token_files_that_keep_no_secret_are_refused() {
    let site = Site::small();
    let cases = [
        (site.path("missing"), "cannot read token file"),
        (site.secret("readable", TOKEN, 0o644), "mode 0644: others can read it; chmod 600"),
        (site.secret("group", TOKEN, 0o640), "mode 0640: others can read it"),
        (site.secret("short", "0123456789abcde", 0o600), "at least 16 visible ASCII characters"),
        (site.secret("blank", " \n", 0o600), "at least 16 visible ASCII characters"),
        (site.secret("two-words", "0123456789 0123456789", 0o600), "visible ASCII"),
        (site.path(""), "cannot read token file"),
    ];
    for (file, says) in cases {
        let path = file.display().to_string();
        refused(site.command().arg("--token-file").arg(&file), &[&path, "tenant `default`", says]);
        assert!(!site.socket().exists(), "nothing was made");
    }
}

/// Nothing is refused, so a client learns of it late or never.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_the_configuration_keeps_from_disk_or_memory_are_warned_of_once() {
    let tenant = |quota: &str| format!("[[tenants]]\nname = \"default\"\n{quota} = \"8MiB\"\n");
    let cases: [(String, u64, PutOutcome, bool, &[&str]); 4] = [
        (
            String::new(),
            16 << 20,
            PutOutcome::Stored,
            false,
            &["16777216 bytes", "segment of disk has 16777216", "larger --disk", "disk_segment"],
        ),
        (
            tenant("disk_quota"),
            10_000_000,
            PutOutcome::Stored,
            false,
            &["10000000 bytes", "disk_quota is 8388608", "raise"],
        ),
        (
            "write_budget_per_day = \"24MiB\"\n".to_owned(),
            10_000_000,
            PutOutcome::Stored,
            true,
            &["10000000 bytes", "write_budget_per_day", "1048576", "durable"],
        ),
        (
            tenant("host_quota"),
            10_000_000,
            PutOutcome::OverQuota,
            false,
            &["10000000 bytes", "host_quota is 8388608", "raise"],
        ),
    ];
    for (config, block_bytes, outcome, durable, says) in cases {
        let mut site = Site::small();
        site.configure(&config);
        let daemon = site.start_ready().await;
        let small = site.attach(attach_to("small", BlockLayout::opaque(4096))).await;
        assert!(!daemon.said().contains("blocks of model"), "{}", daemon.said());
        let large = || site.attach(attach_to("large", BlockLayout::opaque(block_bytes)));
        let store = large().await;
        let again = large().await;
        let said = daemon.said();
        let warnings: Vec<&str> = said.lines().filter(|line| line.contains("blocks of model")).collect();
        assert_eq!(warnings.len(), 1, "once: {said}");
        for words in [&["WARN", "model \"large\"", "tenant `default`"], says].concat() {
            assert!(warnings[0].contains(words), "`{words}` is not in: {said}");
        }
        // What it says is so.
        let run = Run::new(&store, 1, 1);
        assert_eq!(run.put_in(&store, 1).await, [outcome], "{config}");
        assert_eq!(store.durable(&run.keys).await, [durable], "{config}");
        Run::new(&small, 1, 4).put_durably(&small).await;
        drop((store, again));
        daemon.stop();
    }
}
