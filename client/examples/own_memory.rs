//! Has the store keep blocks in memory that this process made.
//! `TENDER_SOCKET=… cargo run -p tender-client --example own_memory`.

use std::error::Error;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use tender_client::proto::{BlockLayout, Namespace, Shard};
use tender_client::{Attach, BlockStore, OwnMemory, Put, Remote, Target};

/// Exits with an error where no daemon answers.
#[tokio::main]
pub async fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::var("TENDER_SOCKET")?;
    let namespace = Namespace::text("own-memory", "bf16", 16);
    let layout = BlockLayout::opaque(1 << 20);
    let attach = Attach { group: "own-memory".into(), member: String::new(), namespace, layout };
    let store = Remote::attach(Target::Unix(socket.into()), None, attach).await?;

    // An engine has this already, on its NUMA node, and registers it with its GPU.
    let bytes =
        store.segment_bytes().ok_or("this daemon takes no memory of clients: look at `ingest` of its configuration")?;
    let file = memfd_create(c"engine", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes)?;
    let memory = OwnMemory::new(file)?;
    store.bring(&memory)?;

    let (parent, keys) = (store.terms().root, store.terms().chain(&[7; 16]));
    let payloads = [Bytes::from(vec![7; 1 << 20])];
    let stored = store.put(Put { parent, keys: &keys, shard: Shard::WHOLE, payloads: &payloads, tokens: &[] }).await;
    println!("{bytes} bytes at {:?} are {:?}; the block is {:?}", memory.start(), memory.state(), stored[0]);
    store.close().await;
    Ok(())
}
