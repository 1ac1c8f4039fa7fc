//! `tender watch`: blocks that come and go.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tender_client::proto::{BlockLayout, Namespace};
use tender_client::{BlockStore as _, Remote, Residency, WatchItem};

use crate::connect::{Connection, Door};
use crate::failure::Failure;
use crate::lifeline::interrupted;
use crate::output::Output;
use crate::replay::request::tier_name;

/// How long to wait for a daemon that went away.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Prints a line for every block of this tenant that is there, then for every one that comes or goes. Waits for a daemon that goes away.
#[derive(Args, Debug)]
pub struct Watch {
    /// Stop after so many lines
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

impl Watch {
    /// Follows until told to stop.
    pub async fn run(self) -> Result<(), Failure> {
        // All of the tenant's blocks are told of, whatever the namespace under which one attaches.
        let (namespace, layout) = (Namespace::text("tender-watch", "u8", 16), BlockLayout::opaque(64 << 10));
        // A watch is a stream over gRPC: it needs no ring.
        let store = self.connection.attach(namespace, layout, Door::Grpc).await?;
        let done = tokio::select! {
            biased;
            failure = interrupted() => Err(failure),
            done = self.follow(&store) => done,
        };
        store.close().await;
        done
    }

    async fn follow(&self, store: &Remote) -> Result<(), Failure> {
        let mut left = self.count.unwrap_or(u64::MAX);
        let mut position = None;
        let mut gone_said = false;
        while left > 0 {
            let mut watch = store.watch(position).await;
            while left > 0
                && let Some(item) = watch.next().await
            {
                gone_said = false;
                self.show(&item)?;
                left -= 1;
            }
            position = watch.position();
            if left > 0 {
                if !gone_said {
                    eprintln!("tender: the daemon at {} is gone; waiting for it", self.connection.target());
                    gone_said = true;
                }
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
        Ok(())
    }

    fn show(&self, item: &WatchItem) -> Result<(), Failure> {
        if self.output.json {
            return self.output.object(&object(item));
        }
        match item {
            WatchItem::Reset => self.output.line("what is there:"),
            WatchItem::Present(block) => self.output.line(line("=", block)),
            WatchItem::Synced(position) => self.output.line(format_args!("that is all, as of {}", position.sequence)),
            WatchItem::Change(_, block) => self.output.line(line(if block.present { "+" } else { "-" }, block)),
        }
    }
}

fn line(sign: &str, block: &Residency) -> String {
    format!("{sign} {:6} {} {} bytes", tier_name(block.tier), block.key, block.block_bytes)
}

fn object(item: &WatchItem) -> Value {
    let block = |event: &str, block: &Residency| {
        let namespace: String = block.namespace.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({
            "event": event, "tier": tier_name(block.tier), "key": block.key.to_string(), "parent": block.parent.to_string(),
            "namespace": namespace, "block_bytes": block.block_bytes,
        })
    };
    let (mut object, position) = match item {
        WatchItem::Reset => (json!({ "event": "reset" }), None),
        WatchItem::Present(residency) => (block("present", residency), None),
        WatchItem::Synced(position) => (json!({ "event": "synced" }), Some(position)),
        WatchItem::Change(position, residency) => {
            (block(if residency.present { "added" } else { "removed" }, residency), Some(position))
        }
    };
    if let Some(position) = position {
        object["epoch"] = format!("{:016x}", position.epoch).into();
        object["sequence"] = position.sequence.into();
    }
    object
}
