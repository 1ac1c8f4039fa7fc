//! Questions that cannot be meant, at the wire: each gets the right code and a message that names field and value, and costs nothing.

#[expect(dead_code, reason = "each test file uses what it needs")]
mod support;

use support::blocks::{Run, attach_to};
use support::site::{Running, Site, TOKEN, free_address};
use support::wire::{self as rude, Blocks, all, attach_request, authorized, refused};
use tender_client::BlockStore;
use tender_client::proto::BlockLayout;
use tender_client::proto::wire::{self, layout::Form, purge_request::What};
use tonic::Code;

type Change = Box<dyn Fn(&mut wire::AttachRequest)>;

/// After all that was refused the daemon serves, and holds nothing for anybody.
async fn serves_on(site: &Site, daemon: Running) {
    let store = site.attach(attach_to("serves-on", BlockLayout::opaque(4096))).await;
    let run = Run::new(&store, 1, 20);
    run.put_durably(&store).await;
    run.expect(&store, None).await;
    daemon.at_rest().await;
    daemon.stop();
}

fn namespace(change: fn(&mut wire::Namespace)) -> Change {
    Box::new(move |attach| change(attach.namespace.as_mut().unwrap()))
}

fn layout(change: fn(&mut wire::Layout)) -> Change {
    Box::new(move |attach| change(attach.layout.as_mut().unwrap()))
}

fn opaque(block_bytes: u64) -> Change {
    Box::new(move |attach| attach.layout.as_mut().unwrap().form = Some(Form::Opaque(wire::OpaqueForm { block_bytes })))
}

fn heads(layers: u32, heads: u32, key_dimensions: u32, value_dimensions: u32) -> Change {
    let form = wire::HeadsForm { layers, heads, key_dimensions, value_dimensions };
    Box::new(move |attach| attach.layout.as_mut().unwrap().form = Some(Form::Heads(form)))
}

fn attach(change: fn(&mut wire::AttachRequest)) -> Change {
    Box::new(change)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attaches_outside_their_limits_are_refused() {
    let site = Site::small();
    let daemon = site.start();
    let mut blocks = rude::over_unix(&site.socket()).await;
    let cases: Vec<(Change, &[&str])> = vec![
        (attach(|attach| attach.group.clear()), &["group has 0 bytes", "1 to 128"]),
        (attach(|attach| attach.group = "g".repeat(129)), &["group has 129 bytes", "1 to 128"]),
        (attach(|attach| attach.member = "m".repeat(129)), &["member has 129 bytes", "0 to 128"]),
        (attach(|attach| attach.namespace = None), &["namespace is missing"]),
        (attach(|attach| attach.layout = None), &["layout is missing"]),
        (attach(|attach| attach.expected_root = vec![1; 31].into()), &["expected_root has 31 bytes"]),
        (namespace(|namespace| namespace.model.clear()), &["namespace.model has 0 bytes", "1 to 256"]),
        (namespace(|namespace| namespace.model = "m".repeat(257)), &["namespace.model has 257 bytes"]),
        (namespace(|namespace| namespace.revision = "r".repeat(129)), &["namespace.revision has 129 bytes"]),
        (namespace(|namespace| namespace.adapter = "a".repeat(257)), &["namespace.adapter has 257 bytes"]),
        (namespace(|namespace| namespace.kv_dtype = "bf17".to_owned()), &["kv_dtype is `bf17`", "bf16"]),
        (namespace(|namespace| namespace.kv_dtype.clear()), &["kv_dtype is ``"]),
        (namespace(|namespace| namespace.block_tokens = 0), &["namespace.block_tokens is 0", "1 to 4096"]),
        (namespace(|namespace| namespace.block_tokens = 4097), &["namespace.block_tokens is 4097"]),
        (namespace(|namespace| namespace.cache_group = 64), &["namespace.cache_group is 64", "0 to 63"]),
        (namespace(|namespace| namespace.modality = 9), &["namespace.modality is 9"]),
        (namespace(|namespace| namespace.modality = -1), &["namespace.modality is -1"]),
        (layout(|layout| layout.kind = 7), &["layout.kind is 7"]),
        (layout(|layout| layout.reuse_rule = 9), &["layout.reuse_rule is 9"]),
        (layout(|layout| layout.reuse_rule = 1), &["layout.window_tokens is 0"]),
        (
            layout(|layout| (layout.reuse_rule, layout.window_tokens) = (1, 64)),
            &["layout.reuse_rule is Trailing", "64"],
        ),
        (layout(|layout| layout.reuse_rule = 2), &["layout.reuse_rule is Point", "prefix"]),
        (layout(|layout| layout.reuse_rule = 3), &["layout.reuse_rule is Content", "prefix"]),
        (layout(|layout| layout.form = None), &["layout.form is missing"]),
        (opaque(0), &["layout.opaque.block_bytes is 0", "1 to 67108864"]),
        (opaque((64 << 20) + 1), &["layout.opaque.block_bytes is 67108865"]),
        (opaque(u64::MAX), &["layout.opaque.block_bytes is 18446744073709551615"]),
        (heads(0, 8, 64, 64), &["layout.heads.layers is 0", "1 to 4096"]),
        (heads(4097, 8, 64, 64), &["layout.heads.layers is 4097"]),
        (heads(2, 0, 64, 64), &["layout.heads.heads is 0"]),
        (heads(2, 4097, 64, 64), &["layout.heads.heads is 4097"]),
        (heads(2, 8, 0, 64), &["layout.heads.key_dimensions is 0"]),
        (heads(2, 8, 65_537, 64), &["layout.heads.key_dimensions is 65537"]),
        (heads(2, 8, 64, u32::MAX), &["layout.heads.value_dimensions is 4294967295"]),
        (heads(4096, 4096, 65_536, 65_536), &["the layout's block bytes is 17592186044416"]),
    ];
    for (change, says) in cases {
        let mut request = attach_request("limits", 4096);
        change(&mut request);
        refused(blocks.attach(request).await, Code::InvalidArgument, says);
    }
    serves_on(&site, daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attaches_that_contradict_are_refused() {
    let site = Site::small();
    let daemon = site.start();
    let mut blocks = rude::over_unix(&site.socket()).await;
    let first = blocks.attach(attach_request("agreed", 4096)).await.unwrap().into_inner();
    let cases: Vec<(Change, Code, &[&str])> = vec![
        (
            attach(|attach| attach.protocol_version = 2),
            Code::FailedPrecondition,
            &["protocol_version is 2", "speaks 1"],
        ),
        (attach(|attach| attach.protocol_version = 0), Code::FailedPrecondition, &["protocol_version is 0"]),
        (
            attach(|attach| attach.expected_root = vec![1; 32].into()),
            Code::FailedPrecondition,
            &["expected_root is 0101", "salt"],
        ),
        (
            namespace(|namespace| namespace.revision = "other".to_owned()),
            Code::FailedPrecondition,
            &["namespace.revision disagrees within group `agreed`", "`other`"],
        ),
        (
            namespace(|namespace| namespace.block_tokens = 8),
            Code::FailedPrecondition,
            &["namespace.block_tokens disagrees within group `agreed`", "`8`", "`4`"],
        ),
        (opaque(8192), Code::FailedPrecondition, &["layout disagrees", "`agreed`", "4096 bytes", "8192 bytes"]),
        (
            Box::new(|attach| {
                opaque(64 << 20)(attach);
                attach.namespace.as_mut().unwrap().model = "large".to_owned();
                attach.group = "large".to_owned();
            }),
            Code::FailedPrecondition,
            &["67108864 bytes", "16777216", "--host"],
        ),
        (
            namespace(|namespace| namespace.public = true),
            Code::PermissionDenied,
            &["namespace.public is true", "allow_public"],
        ),
    ];
    for (change, code, says) in cases {
        let mut request = attach_request("agreed", 4096);
        change(&mut request);
        refused(blocks.attach(request).await, code, says);
    }
    // What agrees is welcome, and the root that was expected is the right one.
    let request = wire::AttachRequest { expected_root: first.root.clone(), ..attach_request("agreed", 4096) };
    assert_eq!(blocks.attach(request).await.unwrap().into_inner().root, first.root);
    serves_on(&site, daemon).await;
}

async fn attached(blocks: &mut Blocks, model: &str) -> wire::AttachReply {
    blocks.attach(attach_request(model, 4096)).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_outside_their_limits_are_refused() {
    let site = Site::small();
    let daemon = site.start();
    let mut blocks = rude::over_unix(&site.socket()).await;
    let reply = attached(&mut blocks, "requests").await;
    let attachment = reply.attachment;
    let too_many = (reply.keys_max + 1).to_string();
    let wrong: [(usize, u32, &[&str]); 4] = [
        (33, 0, &["keys", "33"]),
        (31, 0, &["keys", "31"]),
        (32 * (reply.keys_max as usize + 1), 0, &["keys is", &too_many, "16384"]),
        (32, 600_001, &["deadline_ms is 600001", "600000"]),
    ];
    for (bytes, deadline_ms, says) in wrong {
        let keys: tonic::codegen::Bytes = vec![5u8; bytes].into();
        let invalid = Code::InvalidArgument;
        let what = Some(What::Keys(keys.clone()));
        let lookup = wire::LookupRequest { attachment, keys: keys.clone(), deadline_ms };
        refused(blocks.lookup(lookup).await, invalid, says);
        let get = wire::GetRequest { attachment, keys: keys.clone(), shard: None, deadline_ms };
        refused(all(blocks.get(get).await).await, invalid, says);
        let prefetch = wire::PrefetchRequest { attachment, keys: keys.clone(), deadline_ms };
        refused(all(blocks.prefetch(prefetch).await).await, invalid, says);
        refused(blocks.durable(wire::DurableRequest { attachment, keys, deadline_ms }).await, invalid, says);
        refused(blocks.purge(wire::PurgeRequest { attachment, what, deadline_ms }).await, invalid, says);
    }
    for what in [None, Some(What::Namespace(false))] {
        let purge = wire::PurgeRequest { attachment, what, deadline_ms: 0 };
        refused(blocks.purge(purge).await, Code::InvalidArgument, &["purge wants keys, or namespace = true"]);
    }
    let shards: [(u32, u32, &[&str]); 5] = [
        (2, 2, &["shard.index is 2", "shard.count (2)"]),
        (u32::MAX, 1, &["shard.index is 4294967295"]),
        (0, 3, &["shard.count is 3", "block_bytes", "4096"]),
        (0, 65, &["shard.count is 65", "1 to 64"]),
        (0, u32::MAX, &["shard.count is 4294967295"]),
    ];
    for (index, count, says) in shards {
        let shard = Some(wire::Shard { index, count });
        let get = wire::GetRequest { attachment, keys: vec![5u8; 32].into(), shard, deadline_ms: 0 };
        refused(all(blocks.get(get).await).await, Code::InvalidArgument, says);
    }
    // A message over the limit is refused by the transport, before anything looks into it.
    let keys = vec![5u8; reply.request_bytes_max as usize + 1].into();
    let lookup = blocks.lookup(wire::LookupRequest { attachment, keys, deadline_ms: 0 }).await;
    refused(lookup, Code::OutOfRange, &["too large", &reply.request_bytes_max.to_string()]);
    serves_on(&site, daemon).await;
}

/// Whose attachment it is does not matter to whoever it does not belong to: it is not known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attachments_that_are_gone_or_of_another_tenant_are_not_known() {
    let site = Site::of_two_tenants(&["--host", "64MiB", "--disk", "128MiB"]);
    let daemon = site.start();
    let mut blocks = rude::over_unix(&site.socket()).await;
    let bearer = format!("Bearer {TOKEN}");
    let request = authorized(attach_request("theirs", 4096), &bearer);
    let theirs = blocks.attach(request).await.unwrap().into_inner();
    assert_eq!(theirs.tenant, "other");
    let gone = attached(&mut blocks, "gone").await;
    assert_ne!(gone.salt, theirs.salt, "each tenant has a salt of its own");
    blocks.detach(wire::DetachRequest { attachment: gone.attachment }).await.unwrap();
    for attachment in [0x1234, theirs.attachment, gone.attachment] {
        let keys: tonic::codegen::Bytes = vec![5u8; 32].into();
        let says: &[&str] = &[&format!("attachment {attachment:#x} is not known"), "attach again"];
        let lookup = wire::LookupRequest { attachment, keys: keys.clone(), deadline_ms: 0 };
        refused(blocks.lookup(lookup).await, Code::NotFound, says);
        let get = wire::GetRequest { attachment, keys: keys.clone(), ..Default::default() };
        refused(all(blocks.get(get).await).await, Code::NotFound, says);
        let prefetch = wire::PrefetchRequest { attachment, keys: keys.clone(), deadline_ms: 0 };
        refused(all(blocks.prefetch(prefetch).await).await, Code::NotFound, says);
        let durable = wire::DurableRequest { attachment, keys: keys.clone(), deadline_ms: 0 };
        refused(blocks.durable(durable).await, Code::NotFound, says);
        let purge = wire::PurgeRequest { attachment, what: Some(What::Namespace(true)), deadline_ms: 0 };
        refused(blocks.purge(purge).await, Code::NotFound, says);
        let watch = wire::WatchRequest { attachment, epoch: 0, after_sequence: 0 };
        refused(all(blocks.watch(watch).await).await, Code::NotFound, says);
        refused(blocks.detach(wire::DetachRequest { attachment }).await, Code::NotFound, says);
        let header = wire::PutHeader { attachment, parent: keys.clone(), keys, ..Default::default() };
        refused(rude::put(&mut blocks, vec![rude::header(header)]).await, Code::NotFound, says);
    }
    // Its owner still has it.
    let lookup = wire::LookupRequest { attachment: theirs.attachment, keys: vec![5u8; 32].into(), deadline_ms: 0 };
    blocks.lookup(authorized(lookup, &bearer)).await.unwrap();
    // And same tokens are other blocks: what one tenant stores, the other does not have.
    let (ours, others) = (attach_to("both", BlockLayout::opaque(4096)), attach_to("both", BlockLayout::opaque(4096)));
    let (ours, others) = (site.attach(ours).await, site.attach_other(others).await);
    assert_ne!(ours.terms().root, others.terms().root);
    Run::new(&ours, 1, 4).put(&ours).await;
    Run::new(&others, 1, 4).expect_nothing(&others).await;
    Run::new(&ours, 1, 4).expect_nothing(&others).await;
    serves_on(&site, daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_token_nothing_is_told() {
    let address = free_address();
    let mut site = Site::of_two_tenants(&["--host", "64MiB", "--disk", "0"]);
    site.flag("--listen", address);
    let daemon = site.start();
    let request = || attach_request("locked", 4096);
    let says: &[&str] = &["no tenant's", "token file"];
    for mut blocks in [rude::over_unix(&site.socket()).await, rude::over_tcp(address).await] {
        for wrong in ["Bearer wrong", "Bearer ", "Basic dXNlcg==", TOKEN, "Bearer 0123456789abcdef0123456789abcdeF"] {
            let answer = blocks.attach(authorized(request(), wrong)).await;
            refused(answer, Code::Unauthenticated, says);
        }
        let answer = blocks.attach(authorized(request(), &format!("Bearer {TOKEN}"))).await;
        assert_eq!(answer.unwrap().into_inner().tenant, "other");
    }
    let mut tcp = rude::over_tcp(address).await;
    refused(tcp.attach(request()).await, Code::Unauthenticated, &["over TCP a token is needed", "Bearer"]);
    // A tenant's token opens its own rows of the status page, and nothing else.
    let target = tender_client::Target::Loopback(address);
    let operator = tender_client::Operator::connect(target, Some(TOKEN.to_owned())).await.unwrap();
    let status = operator.status().await.unwrap();
    assert_eq!(status.tenants.iter().map(|tenant| &tenant.tenant[..]).collect::<Vec<_>>(), ["other"]);
    assert!(status.tiers.is_empty() && status.counters.is_empty() && status.findings.is_empty());
    let error = operator.config().await.unwrap_err().to_string();
    assert!(error.contains("for the operator"), "{error}");
    let mut local = rude::over_unix(&site.socket()).await;
    assert_eq!(local.attach(request()).await.unwrap().into_inner().tenant, "default");
    daemon.at_rest().await;
    daemon.stop();
}
