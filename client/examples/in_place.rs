//! Puts a block without copying it: its slot in the store's memory is filled where it lies.
//! `TENDER_SOCKET=… cargo run -p tender-client --example in_place`.

use std::error::Error;

use tender_client::proto::{BlockLayout, Namespace, Shard};
use tender_client::{Attach, BlockStore, Remote, Reserved, Target};

const LAYERS: usize = 4;
const LAYER_BYTES: usize = 256 << 10;

/// Exits with an error where no daemon answers.
#[tokio::main]
pub async fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::var("TENDER_SOCKET")?;
    let namespace = Namespace::text("in-place", "bf16", 16);
    let layout = BlockLayout::opaque((LAYERS * LAYER_BYTES) as u64);
    let attach = Attach { group: "in-place".into(), member: String::new(), namespace, layout };
    let store = Remote::attach(Target::Unix(socket.into()), None, attach).await?;

    let keys = store.terms().chain(&[7; 16]);
    let mut slots = Vec::new();
    for reserved in store.reserve(store.terms().root, &keys, Shard::WHOLE).await? {
        match reserved {
            Reserved::Granted(mut slot) => {
                println!("{:?}: {} bytes at {:?}", slot.key(), slot.bytes(), slot.start());
                // An engine hands that address to its copy engine, and waits until all of it has arrived. Layers come as they are ready.
                for layer in (0..LAYERS).rev() {
                    slot.write_at(layer * LAYER_BYTES, &[layer as u8; LAYER_BYTES]);
                }
                slots.push(slot);
            }
            Reserved::Not(why) => println!("nothing to fill: {why:?}"),
        }
    }
    println!("committed: {:?}", store.commit(slots).await);
    store.close().await;
    Ok(())
}
