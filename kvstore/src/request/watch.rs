//! The watch stream. It holds no queue: a watcher fetches events when the last ones were sent, and one that falls further behind than
//! the daemon remembers gets a snapshot.

use std::sync::Arc;

use tender_proto::wire;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::server::{BlocksServer, ReplyStream, send};
use super::session::Session;
use crate::limits;
use crate::names::{Place, TenantId};
use crate::verb::{Reply, Residency, Verb};

use wire::watch_reply::Part;

type Replies = mpsc::Sender<Result<wire::WatchReply, Status>>;

impl BlocksServer {
    pub(super) fn watch_stream(
        &self,
        tenant: TenantId,
        request: wire::WatchRequest,
    ) -> Result<ReplyStream<wire::WatchReply>, Status> {
        let session = self.session(request.attachment, tenant)?;
        let after = (request.epoch == self.epoch).then_some(request.after_sequence);
        let (sender, receiver) = mpsc::channel(4);
        let server = self.clone();
        tokio::spawn(async move {
            if let Err(status) = server.watch_run(&session, after, &sender).await {
                // A client that is gone needs no answer; for one that is stuck nothing is held any more.
                let _ = sender.send_timeout(Err(status), limits::CLIENT_STALL).await;
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    async fn watch_run(&self, session: &Arc<Session>, after: Option<u64>, replies: &Replies) -> Result<(), Status> {
        let mut changed = self.core.residency(session.tenant);
        let mut seen = match after {
            Some(after) => after,
            None => self.send_snapshot(session, replies).await?,
        };
        loop {
            let verb = Verb::Events { attachment: session.attachment, after: seen };
            let events = match self.ask(session, limits::DEADLINE_DEFAULT, verb).await? {
                Reply::Events(events) => events,
                other => return Err(Status::internal(format!("the core did not answer the watch: {other:?}"))),
            };
            match events {
                None => seen = self.send_snapshot(session, replies).await?,
                Some(events) if events.is_empty() => self.wait(&mut changed, seen, replies).await?,
                Some(events) => {
                    let first_sequence = seen + 1;
                    seen += events.len() as u64;
                    let changes = events.iter().map(residency).collect();
                    self.tell(replies, Part::Events(wire::WatchEvents { first_sequence, changes })).await?;
                }
            }
        }
    }

    /// Waits for an event after `seen`. Wakes up now and then to use the attachment, which would expire otherwise.
    async fn wait(
        &self,
        changed: &mut tokio::sync::watch::Receiver<u64>,
        seen: u64,
        replies: &Replies,
    ) -> Result<(), Status> {
        let news = changed.wait_for(|sequence| *sequence > seen);
        tokio::select! {
            () = replies.closed() => Err(Status::cancelled("the client is gone")),
            news = tokio::time::timeout(limits::ATTACHMENT_IDLE / 4, news) => match news {
                Ok(Err(_)) => Err(Status::unavailable("the daemon is stopping; watch again when it is back")),
                _ => Ok(()),
            },
        }
    }

    /// Sends all that is present; returns the number of the event from which on changes follow.
    async fn send_snapshot(&self, session: &Arc<Session>, replies: &Replies) -> Result<u64, Status> {
        let mut from = Some(0);
        let mut after = None;
        while let Some(place) = from {
            let verb = Verb::Snapshot { attachment: session.attachment, from: place };
            let (sequence, present, next) = match self.ask(session, limits::DEADLINE_DEFAULT, verb).await? {
                Reply::Snapshot { sequence, present, next } => (sequence, present, next),
                other => return Err(Status::internal(format!("the core did not answer the watch: {other:?}"))),
            };
            // What changes while pieces are taken follows as events: they count from before the first piece.
            let first = after.is_none();
            let sequence = *after.get_or_insert(sequence);
            let last = next.is_none();
            let present = present.iter().map(residency).collect();
            self.tell(replies, Part::Snapshot(wire::WatchSnapshot { sequence, first, last, present })).await?;
            from = next;
        }
        Ok(after.unwrap_or(0))
    }

    async fn tell(&self, replies: &Replies, part: Part) -> Result<(), Status> {
        send(replies, wire::WatchReply { epoch: self.epoch, part: Some(part) }).await
    }
}

fn residency(residency: &Residency) -> wire::Residency {
    wire::Residency {
        key: residency.key.as_bytes().to_vec().into(),
        parent: residency.parent.as_bytes().to_vec().into(),
        tier: match residency.place {
            Place::Host => wire::Tier::Host.into(),
            Place::Disk => wire::Tier::Disk.into(),
        },
        present: residency.present,
        namespace_root: residency.namespace.to_vec().into(),
        block_bytes: residency.block_bytes,
    }
}
