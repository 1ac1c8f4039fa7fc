//! Every implementation of `BlockStore` keeps its promises.

mod conformance;

use tender_client::proto::{BlockLayout, Namespace};
use tender_client::{Attach, InMemory, Null};

fn any() -> Attach {
    Attach {
        group: "clients".to_owned(),
        member: String::new(),
        namespace: Namespace::text("any", "bf16", 4),
        layout: BlockLayout::opaque(1),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_memory_keeps_its_promises() {
    let store = InMemory::new(any());
    conformance::suite(async |attach| store.attach(attach), true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn null_keeps_its_promises() {
    conformance::suite(async |attach| Null::new(attach), false).await;
}
