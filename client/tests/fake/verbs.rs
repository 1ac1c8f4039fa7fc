//! The verbs of the fake daemon.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use tender_client::proto::sum::{payload_root, seed};
use tender_client::proto::wire::blocks_server::Blocks;
use tender_client::proto::wire::operator_server::Operator;
use tender_client::proto::wire::{self, PutOutcome as Wire, get_reply, put_reply, put_request, watch_reply};
use tender_client::proto::{BlockKey, BlockLayout, Namespace, Shard, convert};
use tender_client::{Attach, BlockStore, InMemory, Position, Purge, Put, PutOutcome, Residency, Tier, WatchItem};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{Node, Trouble};

#[derive(Clone)]
pub struct Door(pub Arc<Node>);

type Replies<T> = ReceiverStream<Result<T, Status>>;

fn wrong(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

impl Door {
    async fn enter<T>(&self, request: &Request<T>) -> Result<(), Status> {
        match self.0.trouble() {
            Trouble::Hang => std::future::pending().await,
            // The only thread of the runtime, and with it everything.
            Trouble::Freeze => std::thread::sleep(std::time::Duration::from_secs(20)),
            Trouble::Overloaded => return Err(Status::resource_exhausted("too much to do")),
            Trouble::Refusing(code) => return Err(Status::new(code, "the question is wrong")),
            _ => {}
        }
        let shown = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let expected = self.0.token.as_ref().map(|token| format!("Bearer {token}"));
        if shown == expected.as_deref() { Ok(()) } else { Err(Status::unauthenticated("no such token")) }
    }

    fn store(&self, attachment: u64) -> Result<InMemory, Status> {
        let attached = self.0.attached.lock().unwrap();
        attached.get(&attachment).cloned().ok_or_else(|| Status::not_found("no such attachment: attach again"))
    }

    fn keys(&self, bytes: &[u8]) -> Result<Vec<BlockKey>, Status> {
        convert::keys("keys", bytes, 0, self.0.keys_max as usize).map_err(wrong)
    }

    async fn receive(
        &self,
        mut stream: Streaming<wire::PutRequest>,
        replies: &mpsc::Sender<Result<wire::PutReply, Status>>,
    ) -> Result<(), Status> {
        let Some(put_request::Part::Header(header)) = stream.message().await?.and_then(|first| first.part) else {
            return Err(wrong("the header goes first"));
        };
        self.0.puts.fetch_add(1, Ordering::Relaxed);
        let store = self.store(header.attachment)?;
        let (keys, terms) = (self.keys(&header.keys)?, store.terms());
        let layout = &terms.attach.layout;
        let shard = convert::shard(layout, header.shard).map_err(wrong)?;
        let parent = convert::key("parent", &header.parent).map_err(wrong)?;
        if !header.tokens.is_empty() && parent.chain(&header.tokens, terms.attach.namespace.block_tokens) != keys {
            return Err(wrong("tokens do not derive the keys"));
        }
        let mut outcomes = Vec::new();
        let mut writing = Writing { node: Arc::clone(&self.0), places: Vec::new() };
        let turn = self.0.turn.lock().await;
        let present = store.lookup(&keys).await.host;
        for (key, present) in keys.iter().zip(present) {
            let is_last = outcomes.len() + 1 == keys.len();
            outcomes.push(match (present, self.0.trouble()) {
                (true, _) => Wire::PutAlreadyPresent,
                (false, Trouble::TurnsAway(outcome)) if is_last => outcome,
                (false, _) if writing.begin(*key, shard) => Wire::PutAccepted,
                (false, _) => Wire::PutBeingWritten,
            });
        }
        drop(turn);
        let outcomes_message = |outcomes: &[Wire]| {
            let few = usize::from(self.0.trouble() == Trouble::FewOutcomes);
            wire::PutOutcomes { outcomes: outcomes.iter().skip(few).map(|outcome| (*outcome).into()).collect() }
        };
        let part = Some(put_reply::Part::Reserved(outcomes_message(&outcomes)));
        replies.send(Ok(wire::PutReply { part })).await.map_err(|_| Status::cancelled("gone"))?;
        let mut payloads = vec![BytesMut::new(); keys.len()];
        while let Some(request) = stream.message().await? {
            let Some(put_request::Part::Chunk(chunk)) = request.part else { return Err(wrong("a second header")) };
            assert!(chunk.data.len() as u64 <= self.0.chunk_bytes_max && !chunk.data.is_empty());
            assert_eq!(outcomes[chunk.block as usize], Wire::PutAccepted, "only accepted blocks are sent");
            let payload = &mut payloads[chunk.block as usize];
            assert_eq!(chunk.offset_bytes as usize, payload.len(), "in order and without gaps");
            payload.extend_from_slice(&chunk.data);
            if self.0.trouble() == Trouble::BreakOff {
                return Err(Status::unavailable("stopping"));
            }
        }
        let turn = self.0.turn.lock().await;
        for (index, outcome) in outcomes.iter_mut().enumerate().filter(|(_, outcome)| **outcome == Wire::PutAccepted) {
            let (key, payload) = (keys[index], payloads[index].split().freeze());
            if let Some(root) = header.roots.get(index) {
                assert_eq!(*root, payload_root(seed(&key, shard, layout.fingerprint()), &payload));
            }
            let parent = index.checked_sub(1).map_or(parent, |before| keys[before]);
            let put = Put { parent, keys: &[key], shard, payloads: &[payload], tokens: &[] };
            *outcome = match store.put(put).await[0] {
                PutOutcome::Stored => {
                    self.0.written.lock().unwrap().insert(key, shard.count);
                    Wire::PutStored
                }
                PutOutcome::ShardStored => Wire::PutShardStored,
                PutOutcome::AlreadyPresent => Wire::PutAlreadyPresent,
                other => panic!("{other:?}"),
            };
        }
        drop(writing);
        drop(turn);
        let part = Some(put_reply::Part::Committed(outcomes_message(&outcomes)));
        replies.send(Ok(wire::PutReply { part })).await.map_err(|_| Status::cancelled("gone"))
    }

    async fn send(&self, store: &InMemory, request: wire::GetRequest) -> Result<Vec<get_reply::Part>, Status> {
        let (keys, layout) = (self.keys(&request.keys)?, store.terms().attach.layout);
        let shard = convert::shard(&layout, request.shard).map_err(wrong)?;
        let trouble = self.0.trouble();
        let got = store.get(&keys, shard).await;
        let mut parts = Vec::new();
        for (index, (key, block)) in keys.iter().zip(&got.blocks).enumerate() {
            let mut bytes = block.to_vec();
            let mut stored = self.parts(&layout, key, shard, &bytes);
            match trouble {
                Trouble::FlipBit if index == 1 => bytes[7] ^= 64,
                Trouble::OtherBlock if index == 1 => {
                    bytes = got.blocks[0].to_vec();
                    stored = self.parts(&layout, &keys[0], shard, &bytes);
                }
                Trouble::MisplacedParts if index == 1 => {
                    stored.iter_mut().for_each(|part| part.shard = Some(wire::Shard { index: 1, count: 2 }));
                }
                _ => {}
            }
            let announced = bytes.len() as u64 - u64::from(trouble == Trouble::TooShort && index == 1);
            let tier = wire::Tier::Host.into();
            let head = wire::GetBlock { index: index as u32, tier, bytes: announced, parts: stored };
            parts.push(get_reply::Part::Block(head));
            let data = Bytes::from(bytes);
            parts.extend(
                (0..data.len())
                    .step_by(1 << 20)
                    .map(|start| get_reply::Part::Data(data.slice(start..data.len().min(start + (1 << 20))))),
            );
            if trouble == Trouble::TooLong && index == 1 {
                parts.push(get_reply::Part::Data(Bytes::from_static(b"x")));
            }
        }
        let blocks = got.blocks.len() as u32 + u32::from(trouble == Trouble::FalseEnd);
        let whole = got.blocks.len() == keys.len();
        let reason = if whole { wire::GetEndReason::GetEndComplete } else { wire::GetEndReason::GetEndMiss };
        parts.push(get_reply::Part::End(wire::GetEnd { blocks, reason: reason.into() }));
        Ok(parts)
    }

    /// The stored shards that these bytes are made of, if they are.
    fn parts(&self, layout: &BlockLayout, key: &BlockKey, shard: Shard, bytes: &[u8]) -> Vec<wire::Part> {
        let written = self.0.written.lock().unwrap().get(key).copied().unwrap_or(1);
        if !written.is_multiple_of(shard.count) {
            return Vec::new();
        }
        let of_one = written / shard.count;
        let stored_bytes = layout.shard_bytes(written) as usize;
        let stored = bytes.chunks(stored_bytes).zip(shard.index * of_one..);
        let part = |(bytes, index): (&[u8], u16)| {
            let shard = Shard { index, count: written };
            let root = payload_root(seed(key, shard, layout.fingerprint()), bytes);
            wire::Part { shard: Some(shard.into()), bytes: stored_bytes as u64, root }
        };
        stored.map(part).collect()
    }
}

/// What one stream writes; nobody else may until it ends.
struct Writing {
    node: Arc<Node>,
    places: Vec<(BlockKey, Shard)>,
}

impl Writing {
    fn begin(&mut self, key: BlockKey, shard: Shard) -> bool {
        let begun = self.node.writing.lock().unwrap().insert((key, shard));
        self.places.extend(begun.then_some((key, shard)));
        begun
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let mut writing = self.node.writing.lock().unwrap();
        self.places.iter().for_each(|place| assert!(writing.remove(place)));
    }
}

#[async_trait]
impl Blocks for Door {
    type PutStream = Replies<wire::PutReply>;
    type GetStream = Replies<wire::GetReply>;
    type PrefetchStream = Replies<wire::PrefetchProgress>;
    type WatchStream = Replies<wire::WatchReply>;

    async fn attach(&self, request: Request<wire::AttachRequest>) -> Result<Response<wire::AttachReply>, Status> {
        self.enter(&request).await?;
        let request = request.into_inner();
        let namespace = Namespace::try_from(request.namespace.unwrap_or_default()).map_err(wrong)?;
        let layout = convert::layout(request.layout, &namespace).map_err(wrong)?;
        let attachment = 1000 + self.0.attaches.fetch_add(1, Ordering::Relaxed);
        let salt = *self.0.salt.lock().unwrap();
        let mut root = *namespace.root(&salt).as_bytes();
        root[0] ^= u8::from(self.0.trouble() == Trouble::OtherRoot);
        let (group, member) = (request.group, request.member);
        let store = self.0.store.attach(Attach { group, member, namespace, layout });
        self.0.attached.lock().unwrap().insert(attachment, store);
        Ok(Response::new(wire::AttachReply {
            attachment,
            salt: salt.as_bytes().to_vec().into(),
            root: root.to_vec().into(),
            epoch: 1,
            tenant: "fake".into(),
            block_bytes: layout.block_bytes(),
            keys_max: self.0.keys_max,
            chunk_bytes_max: self.0.chunk_bytes_max,
            request_bytes_max: self.0.request_bytes_max,
            put_bytes_max: self.0.put_bytes_max,
        }))
    }

    async fn detach(&self, request: Request<wire::DetachRequest>) -> Result<Response<wire::DetachReply>, Status> {
        self.enter(&request).await?;
        self.0.attached.lock().unwrap().remove(&request.into_inner().attachment);
        self.0.detaches.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(wire::DetachReply {}))
    }

    async fn lookup(&self, request: Request<wire::LookupRequest>) -> Result<Response<wire::LookupReply>, Status> {
        self.enter(&request).await?;
        let request = request.into_inner();
        let store = self.store(request.attachment)?;
        let found = store.lookup(&self.keys(&request.keys)?).await;
        let prefix_blocks = found.prefix_blocks as u32;
        Ok(Response::new(wire::LookupReply { prefix_blocks, host: bitmap(&found.host), disk: bitmap(&found.disk) }))
    }

    async fn put(&self, request: Request<Streaming<wire::PutRequest>>) -> Result<Response<Self::PutStream>, Status> {
        self.enter(&request).await?;
        let (replies, receiver) = mpsc::channel(1);
        let door = self.clone();
        tokio::spawn(async move {
            if let Err(status) = door.receive(request.into_inner(), &replies).await {
                let _gone = replies.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        self.enter(&request).await?;
        let request = request.into_inner();
        let store = self.store(request.attachment)?;
        let parts = self.send(&store, request).await?;
        let (replies, receiver) = mpsc::channel(1);
        let breaks_off = self.0.trouble() == Trouble::BreakOff;
        tokio::spawn(async move {
            // The second block's head, and nothing after it.
            let sent = if breaks_off { parts.len().min(3) } else { parts.len() };
            for part in parts.into_iter().take(sent) {
                if replies.send(Ok(wire::GetReply { part: Some(part) })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn prefetch(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> Result<Response<Self::PrefetchStream>, Status> {
        self.enter(&request).await?;
        self.0.prefetches.fetch_add(1, Ordering::Relaxed);
        if self.0.trouble() == Trouble::EndsAtPrefetch {
            return Err(Status::unavailable("stopping"));
        }
        let request = request.into_inner();
        let store = self.store(request.attachment)?;
        let (replies, receiver) = mpsc::channel(2);
        let prefetched = store.prefetch(&self.keys(&request.keys)?, |_| {}).await;
        let last = wire::PrefetchProgress {
            resident_blocks: prefetched.resident_blocks as u32,
            missing_blocks: prefetched.missing_blocks as u32,
            done: true,
            ..Default::default()
        };
        let first = wire::PrefetchProgress { done: false, missing_blocks: 0, ..last };
        for progress in [first, last] {
            replies.send(Ok(progress)).await.unwrap();
            if self.0.trouble() == Trouble::BreakOff {
                break;
            }
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn durable(&self, request: Request<wire::DurableRequest>) -> Result<Response<wire::DurableReply>, Status> {
        self.enter(&request).await?;
        let request = request.into_inner();
        let store = self.store(request.attachment)?;
        // Says so of whatever it has, so that the bitmap is not always empty.
        let durable = store.lookup(&self.keys(&request.keys)?).await.host;
        let durable_blocks = durable.iter().filter(|durable| **durable).count() as u32;
        Ok(Response::new(wire::DurableReply { durable: bitmap(&durable), durable_blocks }))
    }

    async fn purge(&self, request: Request<wire::PurgeRequest>) -> Result<Response<wire::PurgeReply>, Status> {
        self.enter(&request).await?;
        let request = request.into_inner();
        let store = self.store(request.attachment)?;
        let purged = match request.what.ok_or_else(|| wrong("what is missing"))? {
            wire::purge_request::What::Keys(keys) => store.purge(Purge::Keys(&self.keys(&keys)?)).await,
            wire::purge_request::What::Namespace(_) => store.purge(Purge::Namespace).await,
        };
        Ok(Response::new(wire::PurgeReply { purged_blocks: purged.purged_blocks, busy_blocks: purged.busy_blocks }))
    }

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.enter(&request).await?;
        let wire::WatchRequest { attachment, epoch, after_sequence: sequence } = request.into_inner();
        let from = (epoch != 0).then_some(Position { epoch, sequence });
        let mut watch = self.store(attachment)?.watch(from).await;
        let (replies, receiver) = mpsc::channel(4);
        let node = Arc::clone(&self.0);
        tokio::spawn(async move {
            while let Some(item) = watch.next().await {
                let mut reply = watch_reply(item, from.map_or(0, |from| from.epoch));
                if let Some(watch_reply::Part::Events(events)) = &mut reply.part {
                    events.first_sequence += u64::from(node.trouble() == Trouble::LostEvent);
                }
                if replies.send(Ok(reply)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

#[async_trait]
impl Operator for Door {
    async fn status(&self, request: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        self.enter(&request).await?;
        let attachments = self.0.attached.lock().unwrap().len() as u32;
        Ok(Response::new(wire::StatusReply { version: "fake".into(), attachments, ..Default::default() }))
    }

    async fn config(&self, request: Request<wire::ConfigRequest>) -> Result<Response<wire::ConfigReply>, Status> {
        self.enter(&request).await?;
        Ok(Response::new(wire::ConfigReply { toml: "[host]\n".into() }))
    }

    async fn replace(&self, request: Request<wire::ReplaceRequest>) -> Result<Response<wire::ReplaceReply>, Status> {
        self.enter(&request).await?;
        Err(Status::failed_precondition("the fake has no worker"))
    }
}

fn watch_reply(item: WatchItem, epoch: u64) -> wire::WatchReply {
    let snapshot = |first, last, sequence, present| {
        Some(watch_reply::Part::Snapshot(wire::WatchSnapshot { sequence, first, last, present }))
    };
    let (epoch, part) = match item {
        WatchItem::Reset => (epoch, snapshot(true, false, 0, Vec::new())),
        WatchItem::Present(block) => (epoch, snapshot(false, false, 0, vec![residency(&block)])),
        WatchItem::Synced(position) => (position.epoch, snapshot(false, true, position.sequence, Vec::new())),
        WatchItem::Change(position, block) => {
            let events = wire::WatchEvents { first_sequence: position.sequence, changes: vec![residency(&block)] };
            (position.epoch, Some(watch_reply::Part::Events(events)))
        }
    };
    wire::WatchReply { epoch, part }
}

fn residency(block: &Residency) -> wire::Residency {
    assert_eq!(block.tier, Tier::Host);
    wire::Residency {
        key: block.key.as_bytes().to_vec().into(),
        parent: block.parent.as_bytes().to_vec().into(),
        tier: wire::Tier::Host.into(),
        present: block.present,
        namespace_root: block.namespace.to_vec().into(),
        block_bytes: block.block_bytes,
    }
}

fn bitmap(bits: &[bool]) -> Bytes {
    let byte = |bits: &[bool]| bits.iter().rev().fold(0u8, |byte, bit| byte << 1 | u8::from(*bit));
    bits.chunks(8).map(byte).collect::<Vec<u8>>().into()
}
