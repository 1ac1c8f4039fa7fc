use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn key(byte: u8) -> BlockKey {
    BlockKey::from_bytes([byte; KEY_BYTES])
}

fn encoded(request: &Request) -> Vec<u8> {
    // What was in the buffer does not matter.
    let mut bytes = vec![0xee; 3];
    request.encode(&mut bytes);
    bytes
}

fn answered(reply: &Reply) -> Vec<u8> {
    let mut bytes = vec![0xee; 3];
    assert_eq!(reply.encode(&mut bytes), []);
    bytes
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

fn part(hold: u64, shard: Shard) -> LeasedPart {
    LeasedPart {
        hold: HoldId(hold),
        segment: 0x1122_3344,
        payload_bytes: 0x0055_6677,
        offset_bytes: 0x8899,
        shard,
        root: 0xaabb,
    }
}

/// Every verb and every status, byte for byte as drawn. Written by hand, for clients in other languages.
#[test]
fn messages_meet_the_published_vectors() {
    let (k1, k2) = ("01".repeat(32), "02".repeat(32));
    let keys = [key(1), key(2)];
    let holds = [HoldId(0x0102_0304_0506_0708), HoldId(9)];
    let shard = Shard { index: 3, count: 8 };
    let requests: [(Request, u16, String); 11] = [
        (
            Request::Reserve { parent: key(2), shard, bytes_max: 0x10, keys: (&keys[..1]).into() },
            1,
            format!("{k2} 0300 0800 1000000000000000 01000000 {k1}"),
        ),
        (
            Request::Commit(
                vec![Filled { hold: holds[0], sums: vec![0xa, 0xb] }, Filled { hold: holds[1], sums: vec![0xc] }]
                    .into(),
            ),
            2,
            "02000000 0807060504030201 02000000 0a00000000000000 0b00000000000000
             0900000000000000 01000000 0c00000000000000"
                .to_owned(),
        ),
        (Request::Abort((&holds).into()), 3, "02000000 0807060504030201 0900000000000000".to_owned()),
        (
            Request::Acquire { bytes_max: 1 << 32, keys: (&keys).into() },
            4,
            format!("0000000001000000 02000000 {k1} {k2}"),
        ),
        (Request::Release((&holds[1..]).into()), 5, "01000000 0900000000000000".to_owned()),
        (Request::Lookup((&keys).into()), 6, format!("02000000 {k1} {k2}")),
        (Request::Prefetch((&keys[1..]).into()), 7, format!("01000000 {k2}")),
        (Request::Durable((&keys[..0]).into()), 8, "00000000".to_owned()),
        (Request::Purge((&keys[..1]).into()), 9, format!("00 01000000 {k1}")),
        (Request::PurgeNamespace, 9, "01".to_owned()),
        (
            Request::Confirm(
                vec![
                    Held { hold: holds[0], segment: 5, offset_bytes: 6, kind: HoldKind::Lease },
                    Held { hold: holds[1], segment: 7, offset_bytes: 1 << 40, kind: HoldKind::Reservation },
                ]
                .into(),
            ),
            10,
            "02000000 0807060504030201 05000000 0600000000000000 01
             0900000000000000 07000000 0000000000010000 02"
                .to_owned(),
        ),
    ];
    for (request, verb, hex) in &requests {
        assert_eq!(request.verb().number(), *verb);
        assert_eq!(encoded(request), from_hex(hex), "{request:?}");
        assert_eq!(Request::decode(*verb, &from_hex(hex)).as_ref(), Ok(request));
    }

    let extent = Extent { segment: 1, offset_bytes: 0x2000, bytes: 0x3000 };
    let bits: Bitmap = [true, false, false, true, true, false, false, false, true].into_iter().collect();
    let block = LeasedBlock { tier: Tier::Disk, verify: true, parts: vec![part(4, Shard { index: 1, count: 2 })] };
    let replies: [(Verb, usize, Reply, u16, &str); 15] = [
        (
            Verb::Reserve,
            5,
            Reply::Reserved(vec![
                ReserveOutcome::Granted { hold: holds[0], extent },
                ReserveOutcome::AlreadyPresent,
                ReserveOutcome::BeingWritten,
                ReserveOutcome::NoRoom,
                ReserveOutcome::OverQuota,
            ]),
            1,
            "05000000 01 0807060504030201 01000000 0020000000000000 00300000 02 03 04 05",
        ),
        (
            Verb::Commit,
            3,
            Reply::Committed(vec![CommitOutcome::Stored, CommitOutcome::ShardStored, CommitOutcome::Gone]),
            1,
            "03000000 01 02 03",
        ),
        (Verb::Abort, 2, Reply::Done, 1, ""),
        (Verb::Release, 2, Reply::Done, 1, ""),
        (
            Verb::Acquire,
            2,
            Reply::Acquired(Acquired { end: AcquireEnd::Miss, blocks: vec![block] }),
            1,
            "02 01000000 02 01 0100 0400000000000000 44332211 77665500 9988000000000000 0100 0200 bbaa000000000000",
        ),
        (
            Verb::Lookup,
            9,
            Reply::Lookup(Residency { prefix_blocks: 4, host: bits.clone(), disk: Bitmap::from_bytes(vec![0xff], 9) }),
            1,
            "09000000 04000000 1901 ff00",
        ),
        (
            Verb::Prefetch,
            9,
            Reply::Prefetched(Prefetched { resident: 4, loaded: 3, missing: 2, shed: 1 }),
            1,
            "04000000 03000000 02000000 01000000",
        ),
        (Verb::Durable, 9, Reply::Durable(bits.clone()), 1, "09000000 1901"),
        (
            Verb::Purge,
            0,
            Reply::Purged { purged_blocks: 5, busy_blocks: 1 << 33 },
            1,
            "0500000000000000 0000000002000000",
        ),
        (Verb::Confirm, 9, Reply::Confirmed(bits), 1, "09000000 1901"),
        (Verb::Lookup, 9, Reply::Refused { kind: RefusalKind::Forbidden, message: "nö".to_owned() }, 2, "0300 6e c3b6"),
        (Verb::Lookup, 9, Reply::Unattached, 3, ""),
        (Verb::Lookup, 9, Reply::Busy, 4, ""),
        (Verb::Lookup, 9, Reply::Stopping, 5, ""),
        (Verb::Lookup, 9, Reply::Malformed("keys".to_owned()), 6, "6b657973"),
    ];
    for (verb, items, reply, status, hex) in replies {
        assert_eq!(reply.status().number(), status);
        assert_eq!(answered(&reply), from_hex(hex), "{reply:?}");
        assert_eq!(Reply::decode(Asked { verb, items }, status, &from_hex(hex)), Ok(reply));
    }
}

#[test]
fn what_breaks_a_limit_is_refused_by_the_name_of_its_field() {
    let wrong = |verb: Verb, hex: &str, said: &str| {
        let error = Request::decode(verb.number(), &from_hex(hex)).unwrap_err().to_string();
        assert!(error.contains(said), "`{error}` says nothing of `{said}`");
    };
    let (k, h) = ("01".repeat(32), "0900000000000000");
    wrong(Verb::Lookup, "", "keys has 0 bytes, but must have 4 to 4");
    wrong(Verb::Lookup, "c1030000", "keys is 961, but must be 0 to 960");
    wrong(Verb::Lookup, "ffffffff", "keys is 4294967295, but must be 0 to 960");
    wrong(Verb::Lookup, &format!("02000000 {k}"), "keys has 32 bytes, but must have 64 to 64");
    wrong(Verb::Lookup, &format!("01000000 {k} 00"), "what follows the message has 1 bytes");
    wrong(Verb::Reserve, "01", "parent has 1 bytes");
    wrong(Verb::Reserve, &format!("{k} 0000 0000"), "shard.count is 0, but must be 1 to 64");
    wrong(Verb::Reserve, &format!("{k} 0000 4100"), "shard.count is 65, but must be 1 to 64");
    wrong(Verb::Reserve, &format!("{k} 0200 0200"), "shard.index is 2, but must be 0 to 1");
    wrong(Verb::Reserve, &format!("{k} 0100 0200 00"), "bytes_max has 1 bytes");
    wrong(Verb::Commit, "b90b0000", "filled is 3001, but must be 0 to 3000");
    wrong(Verb::Commit, &format!("01000000 {h} 00000000"), "sums is 0, but must be 1 to 1024");
    wrong(Verb::Commit, &format!("01000000 {h} 01040000"), "sums is 1025, but must be 1 to 1024");
    wrong(Verb::Commit, &format!("01000000 {h} 02000000 {h}"), "sums has 0 bytes, but must have 8 to 8");
    wrong(Verb::Abort, "411f0000", "holds is 8001, but must be 0 to 8000");
    wrong(Verb::Release, "411f0000", "holds is 8001, but must be 0 to 8000");
    wrong(Verb::Release, &format!("02000000 {h}"), "hold has 0 bytes, but must have 8 to 8");
    wrong(Verb::Purge, "02", "what is 2, which this version does not know");
    wrong(Verb::Confirm, "b90b0000", "held is 3001, but must be 0 to 3000");
    wrong(Verb::Confirm, &format!("01000000 {h} 00000000 {h} 03"), "kind is 3, which this version does not know");
    for verb in [0, 11, u16::MAX] {
        let error = Request::decode(verb, &[]).unwrap_err().to_string();
        assert_eq!(error, format!("verb is {verb}, which this version does not know"));
    }

    let wrong = |verb: Verb, items: usize, status: u16, hex: &str, said: &str| {
        let error = Reply::decode(Asked { verb, items }, status, &from_hex(hex)).unwrap_err().to_string();
        assert!(error.contains(said), "`{error}` says nothing of `{said}`");
    };
    for status in [0, 7, u16::MAX] {
        wrong(Verb::Lookup, 1, status, "", "status is");
    }
    wrong(Verb::Reserve, 2, 1, "01000000 02", "outcomes is 1, but must be 2 to 2");
    wrong(Verb::Reserve, 1, 1, "01000000 06", "outcome is 6, which this version does not know");
    wrong(Verb::Commit, 1, 1, "01000000 04", "outcome is 4");
    wrong(Verb::Commit, 1, 1, "02000000 01 01", "outcomes is 2, but must be 1 to 1");
    wrong(Verb::Abort, 1, 1, "00", "what follows the message");
    wrong(Verb::Acquire, 1, 1, "06 00000000", "end is 6");
    wrong(Verb::Acquire, 1, 1, "01 02000000", "blocks is 2, but must be 0 to 1");
    for tier in ["00", "05", "06", "ff"] {
        wrong(Verb::Acquire, 1, 1, &format!("01 01000000 {tier} 00 0100"), "tier is");
    }
    wrong(Verb::Acquire, 1, 1, "01 01000000 01 02 0100", "flags is 2");
    wrong(Verb::Acquire, 1, 1, "01 01000000 01 00 0000", "parts is 0, but must be 1 to 64");
    wrong(Verb::Acquire, 1, 1, "01 01000000 01 00 4100", "parts is 65, but must be 1 to 64");
    let place = format!("01 01000000 01 00 0100 {h} 00000000 00000000 {h}");
    wrong(Verb::Acquire, 1, 1, &format!("{place} 0100 0100 {h}"), "shard.index is 1, but must be 0 to 0");
    wrong(Verb::Lookup, 9, 1, "08000000 00000000 00 00", "keys is 8, but must be 9 to 9");
    wrong(Verb::Lookup, 9, 1, "09000000 0a000000 0000 0000", "prefix_blocks is 10, but must be 0 to 9");
    wrong(Verb::Lookup, 9, 1, "09000000 00000000 0000 0002", "disk is 2, but must be 0 to 0");
    wrong(Verb::Lookup, 9, 1, "09000000 00000000 0003 0000", "host is 3, but must be 0 to 1");
    wrong(Verb::Durable, 9, 1, "09000000 00", "durable has 1 bytes, but must have 2 to 2");
    wrong(Verb::Confirm, 1, 1, "01000000 ff", "confirmed is 255, but must be 0 to 1");
    wrong(Verb::Lookup, 1, 2, "0400", "kind is 4");
    wrong(Verb::Lookup, 1, 6, "6162ff", "message is no UTF-8 text: its byte 2 is wrong");
    wrong(Verb::Lookup, 1, 6, &"61".repeat(1_025), "message has 1025 bytes, but must have 0 to 1024");
}

#[test]
fn everything_within_the_limits_fits_into_a_frame() {
    let keys = vec![key(7); KEYS_PER_ENTRY_MAX];
    let holds = vec![HoldId(u64::MAX); HOLDS_PER_ENTRY_MAX];
    let shard = Shard { index: 63, count: 64 };
    let held = Held { hold: holds[0], segment: u32::MAX, offset_bytes: u64::MAX, kind: HoldKind::Lease };
    let requests = [
        Request::Reserve { parent: key(1), shard, bytes_max: u64::MAX, keys: (&keys).into() },
        Request::Commit(vec![Filled { hold: holds[0], sums: vec![1] }; COMMITS_PER_ENTRY_MAX].into()),
        Request::Abort((&holds).into()),
        Request::Acquire { bytes_max: u64::MAX, keys: (&keys).into() },
        Request::Release((&holds).into()),
        Request::Lookup((&keys).into()),
        Request::Purge((&keys).into()),
        Request::Confirm(vec![held; CONFIRMS_PER_ENTRY_MAX].into()),
    ];
    for request in requests {
        let bytes = encoded(&request);
        assert!(bytes.len() <= FRAME_BYTES, "{:?}: {} bytes", request.verb(), bytes.len());
        assert!(Request::decode(request.verb().number(), &bytes) == Ok(request));
    }
    let extent = Extent { segment: u32::MAX, offset_bytes: u64::MAX, bytes: u32::MAX };
    let outcome = ReserveOutcome::Granted { hold: holds[0], extent };
    let block = LeasedBlock { tier: Tier::Host, verify: false, parts: vec![part(1, shard)] };
    let replies = [
        Reply::Reserved(vec![outcome; KEYS_PER_ENTRY_MAX]),
        Reply::Committed(vec![CommitOutcome::Gone; COMMITS_PER_ENTRY_MAX]),
        Reply::Acquired(Acquired { end: AcquireEnd::Complete, blocks: vec![block; KEYS_PER_ENTRY_MAX] }),
    ];
    for reply in replies {
        assert!(answered(&reply).len() <= FRAME_BYTES);
    }
}

#[test]
fn leased_blocks_that_do_not_fit_are_left_out_whole_and_told_of() {
    let shard = Shard { index: 0, count: 64 };
    // 5 bytes of head, and 2308 for each block: 28 of them are 64,624, and 907 bytes of the frame are free.
    let block = |parts: u64| LeasedBlock {
        tier: Tier::Host,
        verify: true,
        parts: (0..parts).map(|i| part(i, shard)).collect(),
    };
    let run = |last_parts: u64, more: u64| {
        let mut blocks = vec![block(64); 28];
        blocks.push(block(last_parts));
        blocks.extend(vec![block(1); more as usize]);
        Acquired { end: AcquireEnd::Miss, blocks }
    };
    for (last_parts, more, fitted) in [(25, 0, 29), (26, 0, 28), (26, 3, 28), (24, 1, 29), (23, 2, 30)] {
        let acquired = run(last_parts, more);
        let mut bytes = Vec::new();
        let asked = Asked { verb: Verb::Acquire, items: acquired.blocks.len() };
        let reply = Reply::Acquired(acquired.clone());
        let left_out = reply.encode(&mut bytes);
        assert!(bytes.len() <= FRAME_BYTES);
        assert_eq!(left_out, &acquired.blocks[fitted..], "{last_parts} parts and {more} blocks more");
        let end = if left_out.is_empty() { AcquireEnd::Miss } else { AcquireEnd::Budget };
        let expected = Acquired { end, blocks: acquired.blocks[..fitted].to_vec() };
        assert_eq!(Reply::decode(asked, 1, &bytes), Ok(Reply::Acquired(expected)));
    }
}

#[test]
fn commits_are_cut_to_the_frame() {
    let commit = |sums: usize| Filled { hold: HoldId(1), sums: vec![3; sums] };
    let fits = |filled: &[Filled]| {
        let fitting = commits_that_fit(filled);
        assert!(encoded(&Request::Commit(filled[..fitting].into())).len() <= FRAME_BYTES);
        if let Some(more) = filled.get(..=fitting) {
            let too_many = encoded(&Request::Commit(more.into())).len() > FRAME_BYTES;
            assert!(too_many || fitting == COMMITS_PER_ENTRY_MAX, "one more had fitted");
        }
        fitting
    };
    assert_eq!(fits(&[]), 0);
    // 4 bytes of head; 12 and 8 per sum for each.
    assert_eq!(fits(&vec![commit(SUMS_MAX); 20]), 7);
    assert_eq!(fits(&vec![commit(16); 1_000]), 468);
    assert_eq!(fits(&vec![commit(1); 5_000]), COMMITS_PER_ENTRY_MAX);
    // To the byte: 65,532 = 7 x 8,204 + 8,104 left, of which 8,092 are 1,011 sums and a half.
    let mut filled = vec![commit(SUMS_MAX); 7];
    filled.push(commit(1_011));
    assert_eq!(fits(&filled), 8);
    filled[7].sums.push(1);
    assert_eq!(fits(&filled), 7);
    // Nothing is sent out of turn, though a smaller one behind would fit.
    filled.push(commit(1));
    assert_eq!(fits(&filled), 7);
}

#[test]
fn a_text_is_cut_between_characters() {
    let long = format!("a{}", "é".repeat(600));
    let bytes = answered(&Reply::Malformed(long.clone()));
    assert_eq!(bytes.len(), 1_023);
    let asked = Asked { verb: Verb::Lookup, items: 1 };
    assert_eq!(Reply::decode(asked, 6, &bytes), Ok(Reply::Malformed(long[..1_023].to_owned())));
    let exact = "b".repeat(1_024);
    assert_eq!(answered(&Reply::Malformed(exact.clone())), exact.as_bytes());
}

#[test]
fn a_lookup_says_as_much_of_the_disk_as_of_the_host() {
    let asked = Asked { verb: Verb::Lookup, items: 3 };
    let host = Bitmap::from_bytes(vec![0b101], 3);
    let residency = |disk| Reply::Lookup(Residency { prefix_blocks: 0, host: host.clone(), disk });
    for (disk_bits, disk) in [(0, 0), (2, 0b011), (3, 0b111), (16, 0b111)] {
        let bytes = answered(&residency(Bitmap::from_bytes(vec![0xff; 2], disk_bits)));
        assert_eq!(Reply::decode(asked, 1, &bytes), Ok(residency(Bitmap::from_bytes(vec![disk], 3))));
    }
}

#[test]
fn a_hold_is_a_place_and_a_generation() {
    let hold = HoldId::new(7, 3);
    assert_eq!((hold.0, hold.place(), hold.generation()), (3 << 32 | 7, 7, 3));
    let last = HoldId::new(u32::MAX, u32::MAX);
    assert_eq!((last.0, last.place(), last.generation()), (u64::MAX, u32::MAX, u32::MAX));
}

#[test]
fn more_than_the_limits_is_refused_rather_than_cut() {
    let keys = vec![key(1); KEYS_PER_ENTRY_MAX + 1];
    let bytes = encoded(&Request::Lookup((&keys).into()));
    let error = Request::decode(Verb::Lookup.number(), &bytes).unwrap_err();
    assert_eq!(error, FieldError::Range { field: "keys", value: 961, min: 0, max: 960 });
}

fn keys() -> impl Strategy<Value = Cow<'static, [BlockKey]>> {
    vec(any::<[u8; KEY_BYTES]>().prop_map(BlockKey::from_bytes), 0..20).prop_map(Cow::Owned)
}

fn holds() -> impl Strategy<Value = Cow<'static, [HoldId]>> {
    vec(any::<u64>().prop_map(HoldId), 0..50).prop_map(Cow::Owned)
}

fn shard() -> impl Strategy<Value = Shard> {
    (1u16..=64, any::<prop::sample::Index>())
        .prop_map(|(count, index)| Shard { index: index.index(count.into()) as u16, count })
}

fn filled() -> impl Strategy<Value = Filled> {
    (any::<u64>(), vec(any::<u64>(), 1..40)).prop_map(|(hold, sums)| Filled { hold: HoldId(hold), sums })
}

fn held() -> impl Strategy<Value = Held> {
    let kind = prop_oneof![Just(HoldKind::Lease), Just(HoldKind::Reservation)];
    (any::<u64>(), any::<u32>(), any::<u64>(), kind).prop_map(|(hold, segment, offset_bytes, kind)| Held {
        hold: HoldId(hold),
        segment,
        offset_bytes,
        kind,
    })
}

fn request() -> impl Strategy<Value = Request<'static>> {
    prop_oneof![
        (any::<[u8; KEY_BYTES]>(), shard(), any::<u64>(), keys()).prop_map(|(parent, shard, bytes_max, keys)| {
            Request::Reserve { parent: BlockKey::from_bytes(parent), shard, bytes_max, keys }
        }),
        vec(filled(), 0..20).prop_map(|filled| Request::Commit(filled.into())),
        holds().prop_map(Request::Abort),
        (any::<u64>(), keys()).prop_map(|(bytes_max, keys)| Request::Acquire { bytes_max, keys }),
        holds().prop_map(Request::Release),
        keys().prop_map(Request::Lookup),
        keys().prop_map(Request::Prefetch),
        keys().prop_map(Request::Durable),
        keys().prop_map(Request::Purge),
        Just(Request::PurgeNamespace),
        vec(held(), 0..20).prop_map(|held| Request::Confirm(held.into())),
    ]
}

fn reserve_outcome() -> impl Strategy<Value = ReserveOutcome> {
    prop_oneof![
        any::<(u64, u32, u64, u32)>().prop_map(|(hold, segment, offset_bytes, bytes)| {
            ReserveOutcome::Granted { hold: HoldId(hold), extent: Extent { segment, offset_bytes, bytes } }
        }),
        Just(ReserveOutcome::AlreadyPresent),
        Just(ReserveOutcome::BeingWritten),
        Just(ReserveOutcome::NoRoom),
        Just(ReserveOutcome::OverQuota),
    ]
}

fn leased_part() -> impl Strategy<Value = LeasedPart> {
    (any::<(u64, u32, u32, u64, u64)>(), shard()).prop_map(|(numbers, shard)| {
        let (hold, segment, payload_bytes, offset_bytes, root) = numbers;
        LeasedPart { hold: HoldId(hold), segment, payload_bytes, offset_bytes, shard, root }
    })
}

fn leased_block() -> impl Strategy<Value = LeasedBlock> {
    let tier = prop_oneof![Just(Tier::Host), Just(Tier::Disk), Just(Tier::Peer), Just(Tier::Object)];
    let parts = prop_oneof![vec(leased_part(), 1..3), vec(leased_part(), 1..=64)];
    (tier, any::<bool>(), parts).prop_map(|(tier, verify, parts)| LeasedBlock { tier, verify, parts })
}

fn residency() -> impl Strategy<Value = Residency> {
    vec(any::<(bool, bool)>(), 0..100).prop_flat_map(|bits| {
        (0..=bits.len() as u32).prop_map(move |prefix_blocks| Residency {
            prefix_blocks,
            host: bits.iter().map(|bits| bits.0).collect(),
            disk: bits.iter().map(|bits| bits.1).collect(),
        })
    })
}

fn bitmap() -> impl Strategy<Value = Bitmap> {
    vec(any::<bool>(), 0..100).prop_map(|bits| bits.into_iter().collect())
}

/// A reply, and what it answers.
fn reply() -> impl Strategy<Value = (Asked, Reply)> {
    let asked = |verb, items| Asked { verb, items };
    let end = prop_oneof![
        Just(AcquireEnd::Complete),
        Just(AcquireEnd::Miss),
        Just(AcquireEnd::Deadline),
        Just(AcquireEnd::Shed),
        Just(AcquireEnd::Budget)
    ];
    let commit = prop_oneof![Just(CommitOutcome::Stored), Just(CommitOutcome::ShardStored), Just(CommitOutcome::Gone)];
    let kind = prop_oneof![Just(RefusalKind::Invalid), Just(RefusalKind::Contradiction), Just(RefusalKind::Forbidden)];
    let text = || "\\PC{0,200}";
    prop_oneof![
        vec(reserve_outcome(), 0..50).prop_map(move |all| (asked(Verb::Reserve, all.len()), Reply::Reserved(all))),
        vec(commit, 0..50).prop_map(move |all| (asked(Verb::Commit, all.len()), Reply::Committed(all))),
        Just((asked(Verb::Abort, 3), Reply::Done)),
        Just((asked(Verb::Release, 3), Reply::Done)),
        (end, vec(leased_block(), 0..60), 0usize..5).prop_map(move |(end, blocks, missing)| {
            (asked(Verb::Acquire, blocks.len() + missing), Reply::Acquired(Acquired { end, blocks }))
        }),
        residency().prop_map(move |all| (asked(Verb::Lookup, all.host.len()), Reply::Lookup(all))),
        any::<(u32, u32, u32, u32)>().prop_map(move |(resident, loaded, missing, shed)| {
            (asked(Verb::Prefetch, 9), Reply::Prefetched(Prefetched { resident, loaded, missing, shed }))
        }),
        bitmap().prop_map(move |bits| (asked(Verb::Durable, bits.len()), Reply::Durable(bits))),
        any::<(u64, u64)>().prop_map(move |(purged_blocks, busy_blocks)| {
            (asked(Verb::Purge, 0), Reply::Purged { purged_blocks, busy_blocks })
        }),
        bitmap().prop_map(move |bits| (asked(Verb::Confirm, bits.len()), Reply::Confirmed(bits))),
        (kind, text()).prop_map(move |(kind, message)| (asked(Verb::Durable, 4), Reply::Refused { kind, message })),
        Just((asked(Verb::Lookup, 4), Reply::Unattached)),
        Just((asked(Verb::Lookup, 4), Reply::Busy)),
        Just((asked(Verb::Lookup, 4), Reply::Stopping)),
        text().prop_map(move |message| (asked(Verb::Lookup, 4), Reply::Malformed(message))),
    ]
}

/// Bytes with something done to them: cut, prolonged, some written over.
fn spoilt(
    mut bytes: Vec<u8>,
    cut: Option<prop::sample::Index>,
    more: &[u8],
    writes: &[(prop::sample::Index, u8)],
) -> Vec<u8> {
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len() + 1));
    }
    bytes.extend_from_slice(more);
    for (at, byte) in writes {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
    }
    bytes
}

fn spoiling() -> impl Strategy<Value = (Option<prop::sample::Index>, Vec<u8>, Vec<(prop::sample::Index, u8)>)> {
    let byte = prop_oneof![0u8..4, any::<u8>()];
    (any::<Option<prop::sample::Index>>(), vec(any::<u8>(), 0..3), vec((any::<prop::sample::Index>(), byte), 0..4))
}

proptest! {
    #[test]
    fn a_request_is_read_as_it_is_written(request in request()) {
        let bytes = encoded(&request);
        prop_assert_eq!(Request::decode(request.verb().number(), &bytes), Ok(request));
    }

    #[test]
    fn a_reply_is_read_as_it_is_written((asked, reply) in reply()) {
        let mut bytes = Vec::new();
        let left_out = reply.encode(&mut bytes).len();
        prop_assert!(bytes.len() <= FRAME_BYTES);
        let expected = match reply.clone() {
            Reply::Acquired(mut acquired) if left_out > 0 => {
                acquired.end = AcquireEnd::Budget;
                acquired.blocks.truncate(acquired.blocks.len() - left_out);
                Reply::Acquired(acquired)
            }
            reply => reply,
        };
        prop_assert_eq!(Reply::decode(asked, reply.status().number(), &bytes), Ok(expected));
    }

    #[test]
    fn any_bytes_are_a_request_or_an_error(verb in 0u16..12, bytes in vec(any::<u8>(), 0..300)) {
        if let Ok(request) = Request::decode(verb, &bytes) {
            prop_assert_eq!(encoded(&request), bytes);
        }
    }

    #[test]
    fn any_bytes_are_a_reply_or_an_error(
        request in request(),
        items in 0usize..20,
        status in 0u16..8,
        bytes in vec(prop_oneof![3 => 0u8..5, 1 => any::<u8>()], 0..300),
    ) {
        if let Ok(reply) = Reply::decode(Asked { verb: request.verb(), items }, status, &bytes) {
            prop_assert_eq!(answered(&reply), bytes);
        }
    }

    #[test]
    fn a_spoilt_request_is_another_one_or_an_error(request in request(), (cut, more, writes) in spoiling()) {
        let bytes = spoilt(encoded(&request), cut, &more, &writes);
        if let Ok(request) = Request::decode(request.verb().number(), &bytes) {
            prop_assert_eq!(encoded(&request), bytes);
        }
    }

    #[test]
    fn a_spoilt_reply_is_another_one_or_an_error((asked, reply) in reply(), (cut, more, writes) in spoiling()) {
        let mut bytes = Vec::new();
        let _ = reply.encode(&mut bytes).len();
        let bytes = spoilt(bytes, cut, &more, &writes);
        if let Ok(reply) = Reply::decode(asked, reply.status().number(), &bytes)
            && bytes.len() <= FRAME_BYTES
        {
            prop_assert_eq!(answered(&reply), bytes);
        }
    }

    #[test]
    fn a_bitmap_holds_its_bits(bits in vec(any::<bool>(), 0..100), beyond in vec(any::<u8>(), 0..4)) {
        let bitmap: Bitmap = bits.iter().copied().collect();
        prop_assert_eq!((bitmap.len(), bitmap.is_empty()), (bits.len(), bits.is_empty()));
        prop_assert_eq!(bitmap.iter().collect::<Vec<bool>>(), bits.clone());
        prop_assert_eq!(bitmap.count_ones(), bits.iter().filter(|bit| **bit).count());
        prop_assert!(!bitmap.get(bits.len()) && !bitmap.get(usize::MAX));
        // Whatever lies beyond the last bit is cut off, and what is missing is no.
        let mut bytes = bitmap.as_bytes().to_vec();
        bytes.extend(beyond);
        if let Some(last) = bits.len().checked_sub(1) {
            bytes[last / 8] |= !((2u16 << (last % 8)) - 1) as u8;
        }
        prop_assert_eq!(Bitmap::from_bytes(bytes, bits.len()), bitmap);
        prop_assert_eq!(Bitmap::from_bytes(Vec::new(), bits.len()).count_ones(), 0);
    }
}
