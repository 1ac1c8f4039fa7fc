use proptest::prelude::*;

use super::*;
use crate::layout::{BlockLayout, Dtype};

const SECTOR_BYTES: usize = 512;

/// The doc of this module, word for word and slowly.
mod reference {
    use super::{FRAGMENT_BYTES, GOLDEN, mix};

    pub fn fragment_sum(bytes: &[u8]) -> u64 {
        let (mut a, mut b) = (0u64, 0u64);
        for (p, chunk) in (0u64..).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let word = u64::from_le_bytes(word);
            let keyed = word ^ (p + 1).wrapping_mul(GOLDEN);
            a = a.wrapping_add((keyed % (1 << 32)).wrapping_mul(keyed / (1 << 32)));
            b = b.wrapping_add(word);
        }
        mix(a ^ mix(b ^ bytes.len() as u64))
    }

    pub fn root(seed: u64, payload: &[u8]) -> u64 {
        let mut sum = 0u64;
        for (i, fragment) in (0u64..).zip(payload.chunks(FRAGMENT_BYTES)) {
            let place = mix(seed.wrapping_add((i + 1).wrapping_mul(GOLDEN)));
            sum = sum.wrapping_add(mix(fragment_sum(fragment).wrapping_add(place)));
        }
        mix(seed ^ sum)
    }
}

/// Bytes without a pattern.
fn random(seed: u64, bytes: usize) -> Vec<u8> {
    let words = (0..bytes.div_ceil(8) as u64).map(|i| mix(mix(seed).wrapping_add(i.wrapping_mul(GOLDEN))));
    words.flat_map(u64::to_le_bytes).take(bytes).collect()
}

/// Payloads as they occur: noise, zeros, one value all over, small numbers.
fn payload(bytes: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    (any::<u64>(), bytes, 0u8..4).prop_map(|(seed, bytes, kind)| match kind {
        0 => random(seed, bytes),
        1 => vec![0; bytes],
        2 => vec![seed as u8; bytes],
        _ => random(seed, bytes).into_iter().map(|byte| byte & 1).collect(),
    })
}

fn a_key() -> BlockKey {
    BlockKey::from_bytes([7; 32])
}

/// Computed apart from this code.
#[test]
fn sums_meet_the_published_vectors() {
    assert_eq!(fragment_sum(b""), 0);
    assert_eq!(fragment_sum(b"abc"), 0x4870_f926_b656_3501);
    assert_eq!(fragment_sum(&(0..=255).collect::<Vec<u8>>()), 0x8252_c71a_8077_3e02);
    let key = "e7bc51d5e82b3bf0e37ea7e6567386fd3578900f694fe58038597d5a1348163f".parse().unwrap();
    let layout = BlockLayout::attention(32, 8, 128, Dtype::Bf16, 16);
    let seed = seed(&key, Shard { index: 3, count: 8 }, layout.fingerprint());
    assert_eq!(seed, 0xafd3_3fba_40f0_b32c);
    assert_eq!(payload_root(seed, b""), 0x69ff_4db2_785b_e1d0);
    let payload: Vec<u8> = (0..150_000u32).map(|i| (i * 31 + 7) as u8).collect();
    assert_eq!(payload_root(seed, &payload), 0x0a93_54d1_dccc_cc86);
}

#[test]
fn every_short_length_is_summed_as_written_down() {
    let bytes = random(1, 300);
    for length in 0..=300 {
        assert_eq!(fragment_sum(&bytes[..length]), reference::fragment_sum(&bytes[..length]), "{length} bytes");
        assert_eq!(payload_root(9, &bytes[..length]), reference::root(9, &bytes[..length]), "{length} bytes");
    }
    let fragment = random(2, FRAGMENT_BYTES);
    assert_eq!(fragment_sum(&fragment), reference::fragment_sum(&fragment));
}

#[test]
fn all_lanes_sum_alike() {
    // What the processor has is taken; this is what it would be without.
    for length in (0..2000).step_by(7).chain([FRAGMENT_BYTES]) {
        let bytes = random(3, length);
        assert_eq!(accumulate(&bytes, 5), accumulate_lanes(&bytes, 5), "{length} bytes");
    }
}

#[test]
fn every_bit_of_a_short_payload_counts() {
    for bytes in [random(4, 100), vec![0; 100], vec![0xff; 100]] {
        let root = payload_root(5, &bytes);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(payload_root(5, &flipped), root, "bit {bit}");
        }
    }
}

#[test]
fn every_length_of_zeros_has_a_root_of_its_own() {
    let zeros = vec![0; 3 * FRAGMENT_BYTES];
    let lengths = (0..600).chain((1..=3).flat_map(|n| [n * FRAGMENT_BYTES - 1, n * FRAGMENT_BYTES]));
    let mut roots: Vec<u64> = lengths.map(|length| payload_root(6, &zeros[..length])).collect();
    let count = roots.len();
    roots.sort_unstable();
    roots.dedup();
    assert_eq!(roots.len(), count);
}

/// Copies with sums, from an address `skip` bytes behind an aligned one.
#[expect(unsafe_code, reason = "calls what is tested")]
fn copied(bytes: &[u8], skip: usize) -> (Vec<u8>, Vec<u64>) {
    let mut from = vec![0u64; bytes.len() / 8 + 3];
    let mut copy = vec![0xee; bytes.len() + 16];
    // SAFETY: `from` has room for `skip`, at most 15 bytes, and the bytes behind; `copy` for the bytes and eight on either side.
    let sums = unsafe {
        let from = from.as_mut_ptr().cast::<u8>().add(skip);
        ptr::copy_nonoverlapping(bytes.as_ptr(), from, bytes.len());
        copy_with_sums(from, copy.as_mut_ptr().add(8), bytes.len())
    };
    assert!(copy[..8].iter().chain(&copy[8 + bytes.len()..]).all(|&byte| byte == 0xee), "bytes around it were touched");
    (copy[8..8 + bytes.len()].to_vec(), sums)
}

#[test]
fn a_copy_with_sums_is_the_copy_and_the_sums() {
    let lengths = (0..=300).chain([4095, 4096, 4097, FRAGMENT_BYTES - 1, FRAGMENT_BYTES, FRAGMENT_BYTES + 9, 200_000]);
    for (length, skip) in lengths.zip((0..8).cycle()) {
        let bytes = random(8, length);
        let (copy, sums) = copied(&bytes, skip);
        assert_eq!(copy, bytes, "{length} bytes");
        assert_eq!(sums, fragment_sums(&bytes), "{length} bytes");
    }
}

/// Two whole fragments and a part, all of whose words another thread turns over again and again.
#[test]
#[expect(unsafe_code, reason = "calls what is tested")]
fn sums_are_those_of_the_copy_whoever_writes_meanwhile() {
    const CHANGES: usize = 500;
    let words: Vec<AtomicU64> = (0..20_000).map(AtomicU64::new).collect();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let mut copy = vec![0u8; words.len() * 8];
    let (mut seen, mut changes) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                words.iter().for_each(|word| word.store(!word.load(Ordering::Relaxed), Ordering::Relaxed));
            }
        });
        while changes < CHANGES && std::time::Instant::now() < patience {
            // SAFETY: both have that many bytes, and the other thread writes by atomic operations.
            let sums = unsafe { copy_with_sums(words.as_ptr().cast(), copy.as_mut_ptr(), copy.len()) };
            if sums != fragment_sums(&copy) {
                break;
            }
            changes += usize::from(seen != sums);
            seen = sums;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(changes, CHANGES, "the sums are not those of the copy, or nobody wrote meanwhile");
}

#[test]
fn fragments_are_counted() {
    for (bytes, fragments) in [(0, 0), (1, 1), (FRAGMENT_BYTES, 1), (FRAGMENT_BYTES + 1, 2), (32 * FRAGMENT_BYTES, 32)]
    {
        assert_eq!(fragment_count(bytes), fragments);
        assert_eq!(fragment_sums(&vec![1; bytes]).len(), fragments);
    }
}

#[test]
fn identity_is_part_of_the_root() {
    let layout = BlockLayout::opaque(4096);
    let bytes = random(7, 4096);
    let root = |key: &BlockKey, index, count, layout: &BlockLayout| {
        payload_root(seed(key, Shard { index, count }, layout.fingerprint()), &bytes)
    };
    let other = |at: usize| {
        let mut key = *a_key().as_bytes();
        key[at] ^= 1;
        BlockKey::from_bytes(key)
    };
    let mut roots = vec![root(&a_key(), 0, 1, &layout), root(&a_key(), 0, 1, &BlockLayout::opaque(8192))];
    roots.extend((0..32).map(|at| root(&other(at), 0, 1, &layout)));
    roots.extend(
        [2u16, 4, 8]
            .into_iter()
            .flat_map(|count| (0..count).map(move |index| (index, count)))
            .map(|(index, count)| root(&a_key(), index, count, &layout)),
    );
    let count = roots.len();
    roots.sort_unstable();
    roots.dedup();
    assert_eq!(roots.len(), count);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_fast_sum_is_the_one_written_down(bytes in payload(0..300_000), seed: u64) {
        prop_assert_eq!(payload_root(seed, &bytes), reference::root(seed, &bytes));
        prop_assert_eq!(root(seed, &fragment_sums(&bytes)), payload_root(seed, &bytes));
    }

    #[test]
    fn a_flipped_bit_is_noticed(bytes in payload(1..200_000), at: prop::sample::Index, bit in 0..8) {
        let mut flipped = bytes.clone();
        flipped[at.index(bytes.len())] ^= 1u8 << bit;
        prop_assert_ne!(payload_root(1, &flipped), payload_root(1, &bytes));
    }

    #[test]
    fn words_that_change_places_are_noticed(bytes in payload(16..200_000), one: prop::sample::Index, two: prop::sample::Index) {
        let words = bytes.len() / 8;
        let swapped = swap(&bytes, 8, one.index(words), two.index(words));
        prop_assert_eq!(payload_root(1, &swapped) == payload_root(1, &bytes), swapped == bytes);
    }

    #[test]
    fn sectors_that_change_places_are_noticed(bytes in payload(1024..200_000), one: prop::sample::Index, two: prop::sample::Index) {
        let sectors = bytes.len() / SECTOR_BYTES;
        let swapped = swap(&bytes, SECTOR_BYTES, one.index(sectors), two.index(sectors));
        prop_assert_eq!(payload_root(1, &swapped) == payload_root(1, &bytes), swapped == bytes);
    }

    #[test]
    fn a_lost_sector_is_noticed(bytes in payload(512..200_000), at: prop::sample::Index) {
        let start = at.index(bytes.len() / SECTOR_BYTES) * SECTOR_BYTES;
        let mut lost = bytes.clone();
        lost[start..start + SECTOR_BYTES].fill(0);
        prop_assert_eq!(payload_root(1, &lost) == payload_root(1, &bytes), lost == bytes);
    }

    #[test]
    fn a_sector_of_another_payload_is_noticed(seed: u64, at in 0usize..100) {
        let (bytes, mut torn) = (random(seed, 51_200), random(seed, 51_200));
        let start = at * SECTOR_BYTES;
        torn[start..start + SECTOR_BYTES].copy_from_slice(&random(!seed, 51_200)[start..start + SECTOR_BYTES]);
        prop_assert_ne!(payload_root(1, &torn), payload_root(1, &bytes));
    }

    #[test]
    fn a_cut_is_noticed(bytes in payload(1..200_000), at: prop::sample::Index) {
        let cut = &bytes[..at.index(bytes.len())];
        prop_assert_ne!(payload_root(1, cut), payload_root(1, &bytes));
    }

    #[test]
    fn fragments_that_change_places_are_noticed(seed: u64, fragments in 2usize..5, rotation in 1usize..5) {
        prop_assume!(!rotation.is_multiple_of(fragments));
        let mut bytes = random(seed, fragments * FRAGMENT_BYTES);
        let root = payload_root(1, &bytes);
        bytes.rotate_left(rotation % fragments * FRAGMENT_BYTES);
        prop_assert_ne!(payload_root(1, &bytes), root);
    }

    #[test]
    fn a_fragment_moved_to_another_place_is_noticed(seed: u64, before in 1usize..3) {
        let fragment = random(seed, FRAGMENT_BYTES);
        let sums = vec![fragment_sum(&fragment); before + 1];
        prop_assert_ne!(root(1, &sums[..1]), root(1, &sums));
        prop_assert_ne!(root(1, &[sums[0], 0]), root(1, &[0, sums[0]]));
    }

    #[test]
    fn seeds_make_roots(bytes in payload(0..10_000), seed: u64, bit in 0..64) {
        prop_assert_ne!(payload_root(seed, &bytes), payload_root(seed ^ (1u64 << bit), &bytes));
    }
}

fn swap(bytes: &[u8], piece: usize, one: usize, two: usize) -> Vec<u8> {
    let mut swapped = bytes.to_vec();
    let (one, two) = (one * piece, two * piece);
    swapped[one..one + piece].copy_from_slice(&bytes[two..two + piece]);
    swapped[two..two + piece].copy_from_slice(&bytes[one..one + piece]);
    swapped
}
