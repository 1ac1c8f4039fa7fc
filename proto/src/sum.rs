//! The sum: a position-keyed 64-bit sum per fragment of 64 KiB, and a root over the fragments.
//!
//! ```text
//! fragment i of a payload = its bytes [i · 65536, (i + 1) · 65536), the last one shorter, read as u64 LE words w[0], w[1] …,
//!                           the last word padded with zero bytes
//!   k[p] = (p + 1) · GOLDEN                      key of word position p
//!   a    = Σ lo32(w[p] ^ k[p]) · hi32(w[p] ^ k[p])      both sums modulo 2^64
//!   b    = Σ w[p]
//!   fragment_sum = mix(a ^ mix(b ^ length_bytes))
//! root(seed)   = mix(seed ^ Σ mix(fragment_sum[i] + mix(seed + (i + 1) · GOLDEN)))
//! seed         = mix over key, shard and layout: see `seed`
//! ```
//! `a` notices words that change places, `b` any single change that a zero factor would hide. Both are plain sums, so the words of
//! a fragment may be taken in any order and by many lanes: AVX2 has the 32 x 32 -> 64 bit product as one instruction, a GPU as one
//! multiply-add. Refused: CRC32C (32 bits; serial per lane, so copy + CRC runs at half of copy's speed), XXH3 (serial in 1 KiB steps).
//!
//! It catches faults (flipped bits, torn, lost, misplaced and stale sectors), with a chance of 2^-64 to miss one. It is no
//! defence against somebody who makes bytes on purpose: whoever may write a block's bytes is trusted for them.

use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::key::BlockKey;
use crate::layout::Shard;

/// Bytes of one fragment.
pub const FRAGMENT_BYTES: usize = 64 * 1024;

/// Read at once from memory that others may change: whole rows of lanes, and small enough to stay in the first-level cache.
const CHUNK_BYTES: usize = 4096;

/// 2^64 divided by the golden ratio: steps through all 64-bit numbers, neighbours far apart.
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser: a bijection in which each input bit reaches every output bit.
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Number of fragments of a payload.
pub const fn fragment_count(payload_bytes: usize) -> usize {
    payload_bytes.div_ceil(FRAGMENT_BYTES)
}

/// Seeds a root, so that one comparison proves both identity and integrity. `layout` is `BlockLayout::fingerprint`.
pub fn seed(key: &BlockKey, shard: Shard, layout: u64) -> u64 {
    let (words, _) = key.as_bytes().as_chunks::<8>();
    let identity = words.iter().fold(layout, |sum, word| mix(sum ^ u64::from_le_bytes(*word)).wrapping_add(GOLDEN));
    mix(identity ^ (u64::from(shard.count) << 32 | u64::from(shard.index)))
}

/// Root over sums of fragments.
pub fn root(seed: u64, fragment_sums: &[u64]) -> u64 {
    let sum = fragment_sums.iter().zip(1u64..).fold(0u64, |sum, (fragment, i)| {
        sum.wrapping_add(mix(fragment.wrapping_add(mix(seed.wrapping_add(i.wrapping_mul(GOLDEN))))))
    });
    mix(seed ^ sum)
}

/// Root of a whole payload.
pub fn payload_root(seed: u64, payload: &[u8]) -> u64 {
    root(seed, &fragment_sums(payload))
}

/// Sums of all fragments of a payload.
pub fn fragment_sums(payload: &[u8]) -> Vec<u64> {
    payload.chunks(FRAGMENT_BYTES).map(fragment_sum).collect()
}

/// Sum of one fragment, at most `FRAGMENT_BYTES` long.
pub fn fragment_sum(bytes: &[u8]) -> u64 {
    debug_assert!(bytes.len() <= FRAGMENT_BYTES, "a fragment has at most {FRAGMENT_BYTES} bytes");
    let mut terms = Terms::default();
    terms.add(bytes);
    terms.sum()
}

/// Copies memory that other processes may be changing, and sums what was copied: each byte is read once, into a private buffer from which
/// both copy and sums are taken. Whatever the others write meanwhile, the sums returned are the [`fragment_sums`] of the copy.
///
/// # Safety
/// `from` is mapped for reading and `to` for writing, both for `bytes`, and they do not overlap. This process neither writes to `from`
/// meanwhile, other than by atomic operations, nor uses `to`.
#[expect(unsafe_code, reason = "reads what no reference may point to, since it changes")]
pub unsafe fn copy_with_sums(from: *const u8, to: *mut u8, bytes: usize) -> Vec<u64> {
    let mut chunk = [0u8; CHUNK_BYTES];
    let mut sums = Vec::with_capacity(fragment_count(bytes));
    for fragment in (0..bytes).step_by(FRAGMENT_BYTES) {
        let end = bytes.min(fragment + FRAGMENT_BYTES);
        let mut terms = Terms::default();
        for offset in (fragment..end).step_by(CHUNK_BYTES) {
            let chunk = &mut chunk[..CHUNK_BYTES.min(end - offset)];
            // SAFETY: `offset` and the chunk behind it lie within `bytes`, for which the caller vouches; the chunk is this function's.
            unsafe {
                copy_changing(from.add(offset), chunk.as_mut_ptr(), chunk.len());
                ptr::copy_nonoverlapping(chunk.as_ptr(), to.add(offset), chunk.len());
            }
            terms.add(chunk);
        }
        sums.push(terms.sum());
    }
    sums
}

/// Copies memory that other processes may be changing; each byte is read once. The copy may be of no single moment.
///
/// # Safety
/// As for [`copy_with_sums`].
#[expect(unsafe_code, reason = "reads what no reference may point to, since it changes")]
pub unsafe fn copy_changing(from: *const u8, to: *mut u8, bytes: usize) {
    let head = from.align_offset(size_of::<u64>()).min(bytes);
    let words_end = head + (bytes - head) / size_of::<u64>() * size_of::<u64>();
    // SAFETY: all offsets are below `bytes`, for which the caller vouches, and those of words are aligned from `head` on. Atomic loads, so
    // that the compiler reads once and a write at the same time is no data race; a plain load is what they become.
    unsafe {
        for offset in (0..head).chain(words_end..bytes) {
            to.add(offset).write((*from.add(offset).cast::<AtomicU8>()).load(Ordering::Relaxed));
        }
        for offset in (head..words_end).step_by(size_of::<u64>()) {
            let word = (*from.add(offset).cast::<AtomicU64>()).load(Ordering::Relaxed);
            to.add(offset).cast::<u64>().write_unaligned(word);
        }
    }
}

/// The two sums of one fragment, as far as it was taken.
#[derive(Default)]
struct Terms {
    a: u64,
    b: u64,
    bytes: usize,
}

impl Terms {
    /// Takes the next bytes: whole words, but for the fragment's last.
    fn add(&mut self, bytes: &[u8]) {
        debug_assert!(self.bytes.is_multiple_of(8), "only the last piece of a fragment may end within a word");
        let first = (self.bytes / 8) as u64;
        let (mut a, mut b) = accumulate(bytes, first);
        let rest = bytes.len() % 8;
        if rest != 0 {
            let mut last = [0u8; 8];
            last[..rest].copy_from_slice(&bytes[bytes.len() - rest..]);
            let (product, word) = word_terms(u64::from_le_bytes(last), first + (bytes.len() / 8) as u64);
            a = a.wrapping_add(product);
            b = b.wrapping_add(word);
        }
        self.a = self.a.wrapping_add(a);
        self.b = self.b.wrapping_add(b);
        self.bytes += bytes.len();
    }

    fn sum(&self) -> u64 {
        mix(self.a ^ mix(self.b ^ self.bytes as u64))
    }
}

const fn word_terms(word: u64, position: u64) -> (u64, u64) {
    let keyed = word ^ position.wrapping_add(1).wrapping_mul(GOLDEN);
    ((keyed & 0xffff_ffff).wrapping_mul(keyed >> 32), word)
}

/// The whole words of `bytes`, of which the first is word `first` of its fragment, eight lanes abreast: the compiler makes vector code of
/// the fixed inner loop.
#[inline(always)]
fn accumulate_lanes(bytes: &[u8], first: u64) -> (u64, u64) {
    const LANES: usize = 8;
    let mut keys = [0u64; LANES];
    for (lane, key) in (1u64..).zip(&mut keys) {
        *key = first.wrapping_add(lane).wrapping_mul(GOLDEN);
    }
    let (mut a, mut b) = ([0u64; LANES], [0u64; LANES]);
    let (words, _) = bytes.as_chunks::<8>();
    let (rows, rest) = words.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            let word = u64::from_le_bytes(row[lane]);
            let keyed = word ^ keys[lane];
            a[lane] = a[lane].wrapping_add((keyed & 0xffff_ffff).wrapping_mul(keyed >> 32));
            b[lane] = b[lane].wrapping_add(word);
            keys[lane] = keys[lane].wrapping_add(GOLDEN.wrapping_mul(LANES as u64));
        }
    }
    let total = |lanes: [u64; LANES]| lanes.into_iter().fold(0u64, u64::wrapping_add);
    let rest_first = first + (rows.len() * LANES) as u64;
    rest.iter().zip(rest_first..).fold((total(a), total(b)), |(a, b), (word, position)| {
        let (product, word) = word_terms(u64::from_le_bytes(*word), position);
        (a.wrapping_add(product), b.wrapping_add(word))
    })
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "calls of functions compiled for a processor feature that was just found")]
fn accumulate(bytes: &[u8], first: u64) -> (u64, u64) {
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512F, asked one line above.
        unsafe { accumulate_avx512(bytes, first) }
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, asked one line above.
        unsafe { accumulate_avx2(bytes, first) }
    } else {
        accumulate_lanes(bytes, first)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn accumulate_avx512(bytes: &[u8], first: u64) -> (u64, u64) {
    accumulate_lanes(bytes, first)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn accumulate_avx2(bytes: &[u8], first: u64) -> (u64, u64) {
    accumulate_lanes(bytes, first)
}

#[cfg(not(target_arch = "x86_64"))]
fn accumulate(bytes: &[u8], first: u64) -> (u64, u64) {
    accumulate_lanes(bytes, first)
}

#[cfg(test)]
mod tests;
