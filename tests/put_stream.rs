//! Puts at the wire that go wrong at every step: nothing wrong is stored, and no slot is held for what will never come.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use std::time::{Duration, Instant};

use support::blocks::{BLOCK_TOKENS, payload};
use support::site::{Running, Site};
use support::wire::{self as rude, Blocks, OpenPut, attach_request, chunk, header, put, refused};
use tender_client::proto::BlockKey;
use tender_client::proto::wire::{self, PutOutcome, PutRequest};
use tonic::Code;

const BLOCK_BYTES: usize = 4096;

/// One client with its own connection, in a group of its own, and a run of two blocks.
struct Writer {
    blocks: Blocks,
    attachment: u64,
    root: BlockKey,
    tokens: Vec<u32>,
    keys: Vec<BlockKey>,
}

impl Writer {
    async fn new(site: &Site, group: &str, block_bytes: u64) -> Self {
        let mut blocks = rude::over_unix(&site.socket()).await;
        let request = wire::AttachRequest { group: group.to_owned(), ..attach_request("put-stream", block_bytes) };
        let reply = blocks.attach(request).await.unwrap().into_inner();
        let root = BlockKey::from_bytes(reply.root[..].try_into().unwrap());
        let tokens: Vec<u32> = (0..2 * BLOCK_TOKENS).collect();
        let keys = root.chain(&tokens, BLOCK_TOKENS);
        Self { blocks, attachment: reply.attachment, root, tokens, keys }
    }

    fn header(&self) -> wire::PutHeader {
        wire::PutHeader {
            attachment: self.attachment,
            parent: self.root.as_bytes().to_vec().into(),
            keys: BlockKey::join(&self.keys).into(),
            tokens: self.tokens.clone(),
            ..Default::default()
        }
    }

    /// A whole put, sent at once.
    async fn put_after(&mut self, change: impl FnOnce(&mut wire::PutHeader), mut rest: Vec<PutRequest>) -> Told {
        let mut first = self.header();
        change(&mut first);
        rest.insert(0, header(first));
        put(&mut self.blocks, rest).await
    }

    fn chunks(&self) -> Vec<PutRequest> {
        (0u32..).zip(&self.keys).map(|(block, key)| chunk(block, 0, payload(key, BLOCK_BYTES).to_vec())).collect()
    }

    async fn blocks_there(&mut self) -> u32 {
        let keys = BlockKey::join(&self.keys).into();
        let request = wire::LookupRequest { attachment: self.attachment, keys, deadline_ms: 0 };
        self.blocks.lookup(request).await.unwrap().into_inner().prefix_blocks
    }

    /// Nothing stands in the way of a put: it is accepted, within the moment that a daemon needs to hear of a client's end.
    async fn puts_at_once(&mut self) {
        let began = Instant::now();
        loop {
            let chunks = self.chunks();
            let told = self.put_after(|_| {}, chunks).await;
            if let Ok(told) = &told
                && told[0] == [PutOutcome::PutAccepted; 2]
            {
                assert_eq!(told[1], [PutOutcome::PutStored; 2]);
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(5), "somebody still holds these blocks: {told:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn purge(&mut self) {
        let keys = BlockKey::join(&self.keys).into();
        let what = Some(wire::purge_request::What::Keys(keys));
        let request = wire::PurgeRequest { attachment: self.attachment, what, deadline_ms: 0 };
        self.blocks.purge(request).await.unwrap();
    }
}

type Told = Result<Vec<Vec<PutOutcome>>, tonic::Status>;

async fn start() -> (Site, Running, Writer) {
    let site = Site::small();
    let daemon = site.start();
    let writer = Writer::new(&site, "one", BLOCK_BYTES as u64).await;
    (site, daemon, writer)
}

async fn ends_well(daemon: Running, mut writer: Writer) {
    assert_eq!(writer.blocks_there().await, 0, "something that was refused is there");
    writer.puts_at_once().await;
    assert_eq!(writer.blocks_there().await, 2);
    daemon.at_rest().await;
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_cannot_be_meant_are_refused() {
    let (_site, daemon, mut writer) = start().await;
    type Change = fn(&mut wire::PutHeader);
    let cases: [(Change, &[&str]); 12] = [
        (|header| header.parent = vec![1; 31].into(), &["parent has 31 bytes"]),
        (|header| header.parent = Default::default(), &["parent has 0 bytes"]),
        (|header| header.keys = vec![1; 65].into(), &["keys", "65"]),
        (|header| header.keys = vec![1; 32 * 16_385].into(), &["keys is 16385", "16384"]),
        (|header| header.shard = Some(wire::Shard { index: 2, count: 2 }), &["shard.index is 2"]),
        (|header| header.shard = Some(wire::Shard { index: 0, count: 3 }), &["shard.count is 3"]),
        (|header| header.roots = vec![7], &["roots has 1 sums", "(2)"]),
        (|header| header.roots = vec![7; 3], &["roots has 3 sums", "(2)"]),
        (|header| header.tokens.truncate(7), &["tokens has 7", "4 for each of 2 keys"]),
        (|header| header.tokens[5] ^= 1, &["keys[1] is ", "derive"]),
        (|header| header.parent = vec![9; 32].into(), &["keys[0] is "]),
        (|header| header.deadline_ms = 600_001, &["deadline_ms is 600001"]),
    ];
    for (change, says) in cases {
        let chunks = writer.chunks();
        refused(writer.put_after(change, chunks).await, Code::InvalidArgument, says);
    }
    ends_well(daemon, writer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_out_of_order_are_refused() {
    let (site, daemon, mut writer) = start().await;
    let first: &[&str] = &["first message", "header"];
    let chunks = writer.chunks();
    refused(put(&mut writer.blocks, chunks).await, Code::InvalidArgument, first);
    refused(put(&mut writer.blocks, Vec::new()).await, Code::InvalidArgument, first);
    refused(put(&mut writer.blocks, vec![PutRequest { part: None }]).await, Code::InvalidArgument, first);
    let cases: [(Vec<PutRequest>, &[&str]); 8] = [
        (vec![chunk(2, 0, vec![1; 10])], &["chunk.block is 2"]),
        (vec![chunk(u32::MAX, 0, vec![1; 10])], &["chunk.block is 4294967295"]),
        (vec![chunk(0, 0, Vec::new())], &["chunk.data has 0 bytes"]),
        (
            vec![chunk(0, 0, vec![1; 10]), chunk(0, 11, vec![1; 10])],
            &["chunk.offset_bytes is 11", "10 bytes of block 0"],
        ),
        (vec![chunk(0, 0, vec![1; 10]), chunk(0, 0, vec![1; 10])], &["chunk.offset_bytes is 0", "10 bytes of block 0"]),
        (vec![chunk(1, 0, vec![1; BLOCK_BYTES + 1])], &["block 1 gets 4097 bytes", "4096"]),
        (vec![chunk(1, 0, vec![1; BLOCK_BYTES]), chunk(1, BLOCK_BYTES as u64, vec![1])], &["block 1 gets 4097 bytes"]),
        (vec![header(writer.header())], &["after its header", "chunks only"]),
    ];
    for (rest, says) in cases {
        refused(writer.put_after(|_| {}, rest).await, Code::InvalidArgument, says);
    }
    // A chunk over the limit, of a block that is large enough for it.
    let mut blocks = rude::over_unix(&site.socket()).await;
    let attached = blocks.attach(attach_request("large-chunks", 4 << 20)).await.unwrap().into_inner();
    let (attachment, keys) = (attached.attachment, vec![3; 32].into());
    let large = wire::PutHeader { attachment, parent: attached.root, keys, ..Default::default() };
    let rest = vec![header(large), chunk(0, 0, vec![1; attached.chunk_bytes_max as usize + 1])];
    refused(put(&mut blocks, rest).await, Code::InvalidArgument, &["chunk.data has 1048577 bytes", "1 to 1048576"]);
    ends_well(daemon, writer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_wrong_or_missing_are_not_stored() {
    let (_site, daemon, mut writer) = start().await;
    let chunks = writer.chunks();
    let told = writer.put_after(|header| header.roots = vec![1, 2], chunks).await.unwrap();
    assert_eq!(told, [vec![PutOutcome::PutAccepted; 2], vec![PutOutcome::PutSumMismatch; 2]]);
    assert_eq!(writer.blocks_there().await, 0);
    let halves = vec![chunk(0, 0, vec![1; BLOCK_BYTES / 2]), chunk(1, 0, vec![1; BLOCK_BYTES - 1])];
    let told = writer.put_after(|_| {}, halves).await.unwrap();
    assert_eq!(told, [vec![PutOutcome::PutAccepted; 2], vec![PutOutcome::PutIncomplete; 2]]);
    ends_well(daemon, writer).await;
}

/// Whatever a client does in the middle of a put, another one can put the same blocks at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_dropped_midway_gives_back_its_reservation() {
    let (site, daemon, mut writer) = start().await;
    let mut other = Writer::new(&site, "other", BLOCK_BYTES as u64).await;
    for round in 0..4 {
        let first = writer.header();
        let mut open = OpenPut::begin(&mut writer.blocks, first).await;
        assert_eq!(open.reserved, [PutOutcome::PutAccepted; 2]);
        open.parts.send(chunk(0, 0, vec![1; 1000])).await.unwrap();
        match round {
            // Its stream is reset.
            0 => drop(open),
            // It sends what is refused.
            1 => {
                open.parts.send(chunk(7, 0, vec![1])).await.unwrap();
                refused(open.replies.message().await, Code::InvalidArgument, &["chunk.block is 7"]);
            }
            // Its connection is gone.
            2 => {
                drop(open);
                writer = Writer::new(&site, "one", BLOCK_BYTES as u64).await;
            }
            // It says nothing more, until its deadline.
            _ => {
                drop(open);
                let first = wire::PutHeader { deadline_ms: 200, ..writer.header() };
                let mut open = OpenPut::begin(&mut writer.blocks, first).await;
                refused(open.replies.message().await, Code::DeadlineExceeded, &["did not come in time"]);
            }
        }
        other.puts_at_once().await;
        other.purge().await;
    }
    ends_well(daemon, writer).await;
}

/// The second writer of a block is told so while the first is at it, and afterwards that it is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_writers_the_second_hears_of_the_first() {
    let (site, daemon, mut writer) = start().await;
    let mut other = Writer::new(&site, "other", BLOCK_BYTES as u64).await;
    let mut same = Writer::new(&site, "one", BLOCK_BYTES as u64).await;
    let first = writer.header();
    let open = OpenPut::begin(&mut writer.blocks, first).await;
    for second in [&mut other, &mut same] {
        let told = second.put_after(|_| {}, Vec::new()).await.unwrap();
        assert_eq!(told, [vec![PutOutcome::PutBeingWritten; 2], vec![PutOutcome::PutBeingWritten; 2]]);
        // What was not accepted is not taken.
        let chunks = second.chunks();
        refused(second.put_after(|_| {}, chunks).await, Code::InvalidArgument, &["chunk.block is 0", "accepted"]);
    }
    assert_eq!(other.blocks_there().await, 0, "half a block is not there");
    for part in writer.chunks() {
        open.parts.send(part).await.unwrap();
    }
    assert_eq!(open.commit().await, [PutOutcome::PutStored; 2]);
    let told = other.put_after(|_| {}, Vec::new()).await.unwrap();
    assert_eq!(told[1], [PutOutcome::PutAlreadyPresent; 2]);
    other.purge().await;
    ends_well(daemon, writer).await;
}
