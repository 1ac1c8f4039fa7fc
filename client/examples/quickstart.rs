//! Puts the KV of a prompt into a daemon and gets it back: `TENDER_SOCKET=… cargo run -p tender-client --example quickstart`.

use tender_client::proto::{BlockLayout, Namespace, Shard};
use tender_client::{Attach, BlockStore, Put, Remote, Target};

/// Exits with an error where no daemon answers.
#[tokio::main]
pub async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let socket = std::env::var("TENDER_SOCKET")?;
    let namespace = Namespace::text("my-model", "bf16", 16); // 16 tokens per block
    let layout = BlockLayout::opaque(1 << 20); // 1 MiB per block
    let attach = Attach { group: "quickstart".into(), member: String::new(), namespace, layout };
    let store = Remote::attach(Target::Unix(socket.into()), None, attach).await?;

    let prompt: Vec<u32> = (0..64).collect();
    let keys = store.terms().chain(&prompt);
    let had = store.lookup(&keys).await.prefix_blocks;

    let payloads: Vec<_> = (1..=4).map(|block| vec![block; 1 << 20].into()).collect();
    let parent = store.terms().root;
    store.put(Put { parent, keys: &keys, shard: Shard::WHOLE, payloads: &payloads, tokens: &prompt }).await;

    let got = store.get(&keys, Shard::WHOLE).await;
    let right = got.blocks.iter().zip(&payloads).filter(|(block, payload)| block.equals(payload)).count();
    println!("{} blocks: {had} were there before, {right} came back right", keys.len());
    store.close().await;
    Ok(())
}
