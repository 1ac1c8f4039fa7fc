//! Watching: a task that forwards the daemon's stream and ends it where a number is missing.

use std::sync::Arc;

use tender_proto::convert;
use tender_proto::wire::watch_reply::Part;
use tender_proto::wire::{self, WatchReply};
use tokio::sync::mpsc;
use tonic::Streaming;

use super::Remote;
use super::link::Link;
use crate::{Position, Residency, Tier, Watch, WatchItem};

/// Items that wait for their reader; when it is full the daemon's own queue fills, and the daemon cuts the stream.
const ITEMS_WAITING_MAX: usize = 1024;

/// The daemon's stream, and what number comes next.
struct Following {
    stream: Streaming<WatchReply>,
    items: mpsc::Sender<WatchItem>,
    /// The last event seen, or the end of the snapshot; none before either.
    position: Option<Position>,
}

/// The stream cannot go on: something was lost, or nobody listens.
struct Over;

impl Remote {
    pub(super) async fn watch_from(&self, from: Option<Position>) -> Watch {
        let call = |link: Arc<Link>| async move {
            let (epoch, after_sequence) = from.map_or((0, 0), |from| (from.epoch, from.sequence));
            let request = wire::WatchRequest { attachment: link.attachment, epoch, after_sequence };
            Ok(link.client().watch(link.request(request)).await?.into_inner())
        };
        let Ok(stream) = self.ask(self.deadline, call).await else { return Watch::ended() };
        let (items, receiver) = mpsc::channel(ITEMS_WAITING_MAX);
        let following = Following { stream, items, position: from };
        tokio::spawn(following.run());
        Watch::new(receiver, from)
    }
}

impl Following {
    async fn run(mut self) {
        loop {
            let reply = tokio::select! {
                reply = self.stream.message() => reply,
                () = self.items.closed() => return,
            };
            let Ok(Some(reply)) = reply else { return };
            if self.forward(reply).await.is_err() {
                return;
            }
        }
    }

    async fn forward(&mut self, reply: WatchReply) -> Result<(), Over> {
        match reply.part {
            Some(Part::Snapshot(snapshot)) => self.snapshot(reply.epoch, snapshot).await,
            Some(Part::Events(events)) => self.events(reply.epoch, events).await,
            None => Err(Over),
        }
    }

    async fn snapshot(&mut self, epoch: u64, snapshot: wire::WatchSnapshot) -> Result<(), Over> {
        if snapshot.first {
            self.position = None;
            self.say(WatchItem::Reset).await?;
        }
        for present in &snapshot.present {
            if let Some(residency) = residency(present)? {
                self.say(WatchItem::Present(residency)).await?;
            }
        }
        if snapshot.last {
            let position = Position { epoch, sequence: snapshot.sequence };
            self.position = Some(position);
            self.say(WatchItem::Synced(position)).await?;
        }
        Ok(())
    }

    async fn events(&mut self, epoch: u64, events: wire::WatchEvents) -> Result<(), Over> {
        for (sequence, change) in (events.first_sequence..).zip(&events.changes) {
            let Some(last) = self.position.filter(|last| last.epoch == epoch) else { return Err(Over) };
            if sequence <= last.sequence {
                continue;
            }
            if sequence != last.sequence + 1 {
                tracing::warn!(after = last.sequence, found = sequence, "events were lost; watch anew");
                return Err(Over);
            }
            let position = Position { epoch, sequence };
            self.position = Some(position);
            if let Some(residency) = residency(change)? {
                self.say(WatchItem::Change(position, residency)).await?;
            }
        }
        Ok(())
    }

    async fn say(&self, item: WatchItem) -> Result<(), Over> {
        self.items.send(item).await.map_err(|_| Over)
    }
}

/// None for a tier that only concerns the engine itself.
fn residency(wire: &wire::Residency) -> Result<Option<Residency>, Over> {
    let tier = match wire.tier() {
        wire::Tier::Host => Tier::Host,
        wire::Tier::Disk => Tier::Disk,
        wire::Tier::Peer => Tier::Peer,
        wire::Tier::Object => Tier::Object,
        wire::Tier::Device | wire::Tier::Unspecified => return Ok(None),
    };
    let key = |field, bytes| convert::key(field, bytes).map_err(|_| Over);
    Ok(Some(Residency {
        key: key("residency.key", &wire.key)?,
        parent: key("residency.parent", &wire.parent)?,
        tier,
        present: wire.present,
        namespace: <[u8; 16]>::try_from(&wire.namespace_root[..]).map_err(|_| Over)?,
        block_bytes: wire.block_bytes,
    }))
}
