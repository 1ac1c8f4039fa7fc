//! The Prometheus page of a daemon.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use support::blocks::{Run, attach_to};
use support::site::{Site, free_address};
use support::wait_until;
use tender_client::proto::BlockLayout;

fn page(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    Some(text)
}

/// The value of a series, by its name with labels.
fn value(page: &str, series: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// Everything that `status` counts is on the page, explained, and moves with a put and a get.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_every_counter_and_numbers_move() {
    let mut site = Site::small();
    let address = free_address();
    site.flag("--metrics", address);
    let daemon = site.start();
    wait_until("the metrics page", || {
        page(address).is_some_and(|page| value(&page, "tender_put_blocks_total").is_some())
    });
    let before = page(address).unwrap();
    for counter in daemon.status().await.counters {
        let name = &counter.name;
        assert!(value(&before, name).is_some(), "{name} is not on the page");
        assert!(
            before.contains(&format!("# HELP {name} ")) && before.contains(&format!("# TYPE {name} counter")),
            "{name}"
        );
    }
    assert_eq!(value(&before, "tender_tier_capacity_bytes{tier=\"host\"}"), Some(f64::from(64 << 20)));
    assert_eq!(value(&before, "tender_tier_capacity_bytes{tier=\"disk\"}"), Some(f64::from(128 << 20)));

    let store = site.attach(attach_to("counted", BlockLayout::opaque(4096))).await;
    let run = Run::new(&store, 1, 8);
    run.put_durably(&store).await;
    run.expect(&store, None).await;
    wait_until("the numbers of a put and a get", || {
        let page = page(address).unwrap();
        let rose = |series, by: f64| value(&page, series) == value(&before, series).map(|before| before + by);
        rose("tender_put_blocks_total", 8.0)
            && rose("tender_hit_blocks_host_total", 8.0)
            && value(&page, "tender_tier_blocks{tier=\"host\"}") == Some(8.0)
            && value(&page, "tender_tier_blocks{tier=\"disk\"}") == Some(8.0)
            && value(&page, "tender_tenant_used_bytes{tenant=\"default\",tier=\"host\"}") == Some(f64::from(8 * 4096))
    });
    let page = page(address).unwrap();
    // Through the ring a put is these, and a get is that.
    for verb in ["reserve", "commit", "acquire"] {
        let count = value(&page, &format!("tender_request_seconds_count{{verb=\"{verb}\"}}"));
        assert!(count >= Some(1.0), "{verb}: {count:?}");
    }
    daemon.stop();
}
