//! Gets one block again and again through the ring: what a warm get costs. To be counted by `strace -c -f`, with and without gets.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use tender_client::proto::{BlockLayout, Namespace, Shard};
use tender_client::{Attach, BlockStore, Put, Remote, Target};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: warm_get SOCKET GETS";
    let socket = PathBuf::from(arguments.next().ok_or(usage)?);
    let gets: u32 = arguments.next().ok_or(usage)?.parse()?;
    let attach = Attach {
        group: "warm-get".to_owned(),
        member: "example".to_owned(),
        namespace: Namespace::text("warm-get", "bf16", 16),
        layout: BlockLayout::opaque(64 << 10),
    };
    let store = Remote::attach(Target::Unix(socket), None, attach).await?;
    let terms = store.terms();
    let (parent, keys) = (terms.root, terms.chain(&[7; 16]));
    let payloads = [Bytes::from(vec![7; 64 << 10])];
    store.put(Put { parent, keys: &keys, shard: Shard::WHOLE, payloads: &payloads, tokens: &[] }).await;
    let start = Instant::now();
    let mut leased = 0;
    for _ in 0..gets {
        leased += store.get(&keys, Shard::WHOLE).await.blocks.iter().filter(|block| block.is_leased()).count();
    }
    let each_us = start.elapsed().as_secs_f64() * 1e6 / f64::from(gets.max(1));
    println!("{gets} gets by {:?}, {leased} blocks leased, {each_us:.1} us each", store.door());
    store.close().await;
    Ok(())
}
