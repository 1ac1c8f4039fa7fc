//! A daemon that cannot have what it needs says so and ends; whoever has it goes on.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use support::blocks::{Run, attach_to};
use support::site::{Site, TOKEN, refusal};
use support::{run, tender, wait_until};
use tender_client::Tier;
use tender_client::proto::BlockLayout;

fn says(said: &str, words: &[&str]) {
    for words in words {
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Asked for more than is free: path and sizes are named, and what was free stays free.
#[test]
fn a_disk_without_room_is_refused_and_not_filled() {
    let mut site = Site::new(&["--host", "64MiB"]);
    let free = rustix::fs::statvfs(site.path("").as_path()).map(|found| found.f_bavail * found.f_frsize).unwrap();
    let wanted = (free + (8 << 30)) >> 30;
    site.flag("--disk", format!("{wanted}GiB"));
    let said = refusal(&mut site.command());
    says(&said, &[&shown(&site.tier_file()), "bytes", "free", "smaller disk tier"]);
    let left = fs::metadata(site.tier_file()).map_or(0, |found| found.blocks() * 512 + found.len());
    assert!(left < 1 << 20, "{left} bytes are left behind");
    // And with a size that fits, the same folder serves.
    site.change_flag("--disk", "128MiB");
    site.start().stop();
}

/// As one that was killed does while the kernel takes back its memory.
#[test]
fn a_daemon_that_answers_on_the_socket_for_the_last_time_does_not_keep_the_next_from_starting() {
    let site = Site::small();
    let last = UnixListener::bind(site.socket()).unwrap();
    let mut next = site.command().stderr(Stdio::null()).spawn().unwrap();
    last.accept().unwrap();
    drop(last);
    let mut ended = None;
    wait_until("the next daemon", || {
        ended = next.try_wait().unwrap();
        ended.is_some() || run(tender().arg("status").arg("--socket").arg(site.socket())).status.success()
    });
    let _ended_already = next.kill();
    next.wait().unwrap();
    assert_eq!(ended, None, "it refused to start");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_daemon_is_refused_and_the_first_serves_on() {
    let site = Site::small();
    let daemon = site.start_ready().await;
    let store = site.attach(attach_to("first", BlockLayout::opaque(10_000))).await;
    let run = Run::new(&store, 1, 20);
    run.put_durably(&store).await;

    let elsewhere = site.path("elsewhere");
    let mut same_socket = tender();
    same_socket.arg("serve").arg("--socket").arg(site.socket()).arg("--dir").arg(&elsewhere);
    same_socket.args(["--host", "64MiB", "--disk", "64MiB"]);
    says(&refusal(&mut same_socket), &["already answers on socket", &shown(&site.socket()), "--socket"]);
    assert!(!elsewhere.exists(), "it took a folder before it had a socket");

    let other_socket = site.path("other.sock");
    let mut same_folder = tender();
    same_folder.arg("serve").arg("--socket").arg(&other_socket).arg("--dir").arg(site.path("data"));
    same_folder.args(["--host", "64MiB", "--disk", "128MiB"]);
    says(&refusal(&mut same_folder), &[&shown(&site.tier_file()), "in use", "--dir"]);

    run.expect(&store, Some(Tier::Host)).await;
    Run::new(&store, 2, 20).put_durably(&store).await;
    daemon.stop();
    let daemon = site.start_ready().await;
    run.expect(&site.attach(attach_to("first", BlockLayout::opaque(10_000))).await, Some(Tier::Disk)).await;
    daemon.stop();
}

#[test]
fn folders_and_sockets_that_cannot_be_had_are_named() {
    let site = Site::small();
    let file = site.secret("file", "not a folder", 0o600);
    let serve = |socket: &Path, dir: &Path| {
        let mut command = tender();
        command
            .arg("serve")
            .arg("--socket")
            .arg(socket)
            .arg("--dir")
            .arg(dir)
            .args(["--host", "64MiB", "--disk", "64MiB"]);
        refusal(&mut command)
    };
    let under_file = file.join("data");
    says(&serve(&site.socket(), &under_file), &["cannot make folder", &shown(&under_file), "--dir"]);
    says(&serve(&file, &site.path("data")), &["cannot listen on socket", &shown(&file), "--socket"]);
    assert_eq!(fs::read(&file).unwrap(), b"not a folder", "what is no socket is not removed");
    says(&serve(&file.join("sock"), &site.path("data")), &["cannot listen on socket", "--socket"]);
    if !rustix::process::geteuid().is_root() {
        let locked = site.path("locked");
        fs::create_dir(&locked).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o500)).unwrap();
        says(&serve(&site.socket(), &locked), &[&shown(&locked), "cannot be opened"]);
    }
    // A folder where the tier file should be.
    fs::create_dir_all(site.tier_file()).unwrap();
    says(&serve(&site.socket(), &site.path("data")), &[&shown(&site.tier_file()), "not a regular file"]);
}

#[test]
fn addresses_that_are_taken_are_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let site = Site::new(&["--host", "64MiB", "--disk", "0"]);
    let token = site.secret("token", TOKEN, 0o600);
    let said = refusal(site.command().args(["--listen", &address]).arg("--token-file").arg(token));
    says(&said, &["cannot listen on", &address, "--listen"]);
    let said = refusal(site.command().args(["--metrics", &address]));
    says(&said, &["cannot serve metrics on", &address, "--metrics"]);
    assert!(!site.socket().exists(), "a daemon that did not start leaves no socket");
}

/// A tier file of another size, or one that is none, is left as it is: what it holds is somebody's.
#[test]
fn a_tier_file_that_is_not_ours_is_refused_and_left_alone() {
    let bytes = (128 << 20) + (1 << 20);
    let site = Site::small();
    fs::create_dir(site.path("data")).unwrap();
    let garbage = File::create(site.tier_file()).unwrap();
    let words: Vec<u8> = (0..64 << 10).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    garbage.write_all_at(&words, 0).unwrap();
    for (length, expected) in
        [(bytes - 4096, "where 135266304 are asked for"), (bytes, "does not begin as a tier file")]
    {
        garbage.set_len(length).unwrap();
        says(&refusal(&mut site.command()), &[&shown(&site.tier_file()), expected]);
        let mut found = vec![0; words.len()];
        File::open(site.tier_file()).unwrap().read_exact_at(&mut found, 0).unwrap();
        assert!(found == words && garbage.metadata().unwrap().len() == length, "it was written to");
    }
}

/// A file that the size is right of, but its segments are not: what it holds is not read under another geometry.
#[test]
fn another_geometry_is_refused() {
    let mut site = Site::new(&["--host", "64MiB", "--disk", "128MiB"]);
    site.start().stop();
    site.configure("disk_segment = \"32MiB\"\n");
    says(&refusal(&mut site.command()), &[&shown(&site.tier_file()), "8 segments of 16 MiB", "4 segments of 32 MiB"]);
}

/// The socket of a daemon that was killed is no obstacle.
#[test]
fn a_socket_that_nobody_answers_on_is_taken_over() {
    let site = Site::small();
    drop(UnixListener::bind(site.socket()).unwrap());
    assert!(site.socket().exists());
    let daemon = site.start();
    let mode = fs::metadata(site.socket()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "only its own user may connect");
    daemon.stop();
    assert!(!site.socket().exists(), "a daemon that was stopped takes its socket along");
}
