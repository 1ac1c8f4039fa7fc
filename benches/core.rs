//! How fast the core is, alone on its thread: keys looked up, blocks put and blocks leased per second, in batches of 512, over chains
//! of 512 blocks. Prints medians of seven rounds, interleaved, with the spread.

use std::time::Instant;

use tender_kvstore::names::{AttachmentId, By, Door, Hold, RequestId, TenantId};
use tender_kvstore::pipeline::{Action, Core, CoreConfig, Event, TenantConfig};
use tender_kvstore::verb::{AttachVerb, Filled, Reply, Request, ReserveOutcome, Verb};
use tender_proto::{BlockKey, BlockLayout, Namespace, Shard, TenantSalt};

const BATCH: usize = 512;
const CHAINS: usize = 128;
const ROUNDS: usize = 7;
const BLOCK_BYTES: u64 = 4096;

struct Bench {
    core: Core,
    attachment: AttachmentId,
    root: BlockKey,
    requests: u64,
}

impl Bench {
    fn new() -> Self {
        let tenant = TenantConfig {
            name: "bench".to_owned(),
            salt: TenantSalt::of_tenant(b"", "bench"),
            host_quota_bytes: None,
            disk_quota_bytes: None,
        };
        let segment_bytes = 1 << 24;
        let segments = (CHAINS * BATCH * BLOCK_BYTES as usize).div_ceil(segment_bytes) as u32 + 1;
        let config = CoreConfig {
            tenants: vec![tenant],
            host_segment_bytes: segment_bytes as u64,
            host_segment_count: segments,
            ingest_segment_count: 0,
            disk: None,
            write_bytes_per_day: None,
            allow_public: false,
            seed: 1,
        };
        let namespace = Namespace::text("bench", "bf16", 16);
        let root = namespace.root(&TenantSalt::of_tenant(b"", "bench"));
        let attachment = AttachmentId(1);
        let mut bench = Self { core: Core::new(config), attachment, root, requests: 0 };
        // The core counts slots and moves no byte, so its segments need no memory behind them here.
        bench.core.step(Event::Tick, 0, &mut Vec::new());
        for segment in 0..segments {
            bench.core.step(Event::SegmentReady(segment), 0, &mut Vec::new());
        }
        let attach = AttachVerb {
            attachment,
            group: "bench".to_owned(),
            member: String::new(),
            namespace,
            layout: BlockLayout::opaque(BLOCK_BYTES),
            expected_root: None,
        };
        assert!(matches!(bench.ask(Verb::Attach(Box::new(attach))), Reply::Attached(_)), "the bench attaches");
        bench
    }

    fn ask(&mut self, verb: Verb) -> Reply {
        self.requests += 1;
        let request = Request { id: RequestId(self.requests), tenant: TenantId(0), deadline_ms: 1, verb };
        let mut actions = Vec::new();
        self.core.step(Event::Request(request), 0, &mut actions);
        let reply = actions.into_iter().find_map(|action| match action {
            Action::Reply(_, reply) => Some(reply),
            _ => None,
        });
        reply.expect("without a disk every answer comes at once")
    }

    fn put(&mut self, keys: &[BlockKey]) {
        let (attachment, parent) = (self.attachment, self.root);
        let (shard, bytes_max, door) = (Shard::WHOLE, u64::MAX, Door::Stream);
        let verb = Verb::Reserve { attachment, parent, keys: keys.to_vec(), shard, bytes_max, door };
        let Reply::Reserved(outcomes) = self.ask(verb) else { panic!("a reservation is answered") };
        let filled = outcomes.iter().map(|outcome| match outcome {
            ReserveOutcome::Granted { hold, .. } => Filled { hold: *hold, sums: vec![0] },
            other => panic!("there is room for all, not {other:?}"),
        });
        let verb = Verb::Commit { attachment, filled: filled.collect(), door };
        assert!(matches!(self.ask(verb), Reply::Committed(_)), "a commit is answered");
    }

    fn get(&mut self, keys: &[BlockKey]) {
        let (attachment, bytes_max, door) = (self.attachment, u64::MAX, Door::Stream);
        let verb = Verb::Acquire { attachment, keys: keys.to_vec(), bytes_max, door };
        let Reply::Acquired(acquired) = self.ask(verb) else { panic!("an acquire is answered") };
        assert_eq!(acquired.blocks.len(), keys.len(), "all are there");
        let holds: Vec<Hold> = acquired.blocks.iter().flat_map(|block| &block.parts).map(|part| part.hold).collect();
        self.ask(Verb::Release(By::Daemon, holds));
    }

    fn lookup(&mut self, keys: &[BlockKey]) {
        let Reply::Lookup(reply) = self.ask(Verb::Lookup(self.attachment, keys.to_vec())) else { panic!("answered") };
        assert_eq!(reply.prefix_blocks as usize, keys.len(), "all are there");
    }
}

/// Million blocks per second of one pass over all chains.
fn rate(chains: &[Vec<BlockKey>], mut work: impl FnMut(&[BlockKey])) -> f64 {
    let start = Instant::now();
    chains.iter().for_each(|chain| work(chain));
    (chains.len() * BATCH) as f64 / start.elapsed().as_secs_f64() / 1e6
}

fn main() {
    let tokens: Vec<u32> = (0..(16 * BATCH) as u32).collect();
    let mut rows =
        [("put (reserve, commit)", Vec::new()), ("get (acquire, release)", Vec::new()), ("lookup", Vec::new())];
    for _ in 0..ROUNDS {
        let mut bench = Bench::new();
        let chain = |i: usize| bench.root.child(&[i as u32; 16], &[]).chain(&tokens, 16);
        let chains: Vec<Vec<BlockKey>> = (0..CHAINS).map(chain).collect();
        rows[0].1.push(rate(&chains, |keys| bench.put(keys)));
        rows[1].1.push(rate(&chains, |keys| bench.get(keys)));
        rows[2].1.push(rate(&chains, |keys| bench.lookup(keys)));
    }
    println!("core, one thread, batches of {BATCH}, {} blocks: million blocks/s", CHAINS * BATCH);
    for (name, mut rates) in rows {
        rates.sort_by(f64::total_cmp);
        println!("  {name:24} median {:6.2}   min {:6.2}   max {:6.2}", rates[ROUNDS / 2], rates[0], rates[ROUNDS - 1]);
    }
}
