//! Who is let in at the local door, and who is not.

use std::os::fd::AsFd;

use rustix::process::{PidfdFlags, pidfd_open};
use tender_client::proto::descriptors::{EventFd, Process};
use tender_client::proto::greeting::{MESSAGE_BYTES, ToClient, ToDaemon};
use tender_client::{Doors, Remote};

use crate::actor::Actor;
use crate::raw::{Raw, Socket, attach};
use crate::support::blocks::Run;
use crate::support::site::TOKEN;
use crate::{LARGE, attach_as, client, site};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_show_that_an_attachment_is_its_own_is_refused() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let socket = site.socket();
    let whoever = attach_as("whoever", "model", LARGE);
    let own = Process::open_self().unwrap();
    let open = |attachment| ToDaemon::Open { attachment, former: 0 };

    let (attachment, _) = attach(&socket, None, &whoever).await;
    let knock = || Socket::connect(&socket);
    let wrong = knock();
    wrong.say(open(attachment ^ 1), &[own.as_fd()]);
    wrong.expect_refusal("");

    let stranger = Actor::start(site.path("stranger"));
    let pidfd = pidfd_open(stranger.pid(), PidfdFlags::empty()).unwrap();
    let other = knock();
    other.say(open(attachment), &[pidfd.as_fd()]);
    other.expect_refusal("another process's");
    stranger.kill();

    let none = knock();
    none.say(open(attachment), &[]);
    none.expect_refusal("pidfd");
    let no_process = knock();
    no_process.say(open(attachment), &[EventFd::new().unwrap().as_fd()]);
    no_process.expect_refusal("pidfd");
    let garbage = knock();
    garbage.send(&[0x5a; MESSAGE_BYTES], &[]);
    garbage.expect_refusal("");
    for too_early in [ToDaemon::Fetch(0), ToDaemon::Fetch(7), ToDaemon::Mapped(7), ToDaemon::Unmappable(7)] {
        let early = knock();
        early.say(too_early, &[]);
        early.say(open(0), &[]);
        early.expect_end();
    }

    // None of that has cost the attachment its only turn.
    let twice = knock();
    twice.say(open(attachment), &[own.as_fd()]);
    assert!(matches!(twice.hear(), Some((ToClient::Opened { .. }, _))));
    let second = knock();
    second.say(open(attachment), &[own.as_fd()]);
    second.expect_refusal("");
    twice.say(open(attachment), &[own.as_fd()]);
    twice.expect_refusal("before");

    for is_other in [false, true] {
        let store = client(&site, is_other, whoever.clone()).await;
        let run = Run::new(&store, 1, 8);
        run.put(&store).await;
        run.expect(&store, None).await;
    }
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_who_say_nothing_are_sent_away_and_keep_nobody_out() {
    let site = site("0");
    let daemon = site.start_ready().await;
    let before = client(&site, false, attach_as("before", "model", LARGE)).await;
    let silent: Vec<Socket> = (0..200).map(|_| Socket::connect(&site.socket())).collect();
    // Whoever comes meanwhile is served, by one door or the other.
    let attach = attach_as("meanwhile", "model", LARGE);
    let meanwhile = Remote::attach(site.target(), Some(TOKEN.to_owned()), attach).await.unwrap();
    for (seed, store) in (1..).zip([&before, &meanwhile]) {
        let run = Run::new(store, seed, 8);
        run.put(store).await;
        run.expect(store, None).await;
    }
    silent.iter().for_each(Socket::expect_end);
    let after = client(&site, false, attach_as("after", "model", LARGE)).await;
    assert_eq!(after.door(), Doors::Ring);
    Run::new(&after, 1, 8).expect(&after, None).await;
    Raw::open(&site.socket(), None, &attach_as("last", "model", LARGE)).await.leave();
    daemon.stop();
}
