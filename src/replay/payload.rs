//! The bytes of a block in a replay: made from its key and the run's generation, so that whoever reads them back knows every one.
//!
//! ```text
//! seed   = mix over the generation and the four words of the key
//! x[i]   = seed + (i + 1) · GOLDEN
//! w[i]   = (x ^ x >> 29) + (x << 23), as u64 LE; the last word is cut off where the block ends
//! ```
//! No two words of a block are alike, so a byte that moved is noticed as surely as one that changed. Only adds, shifts and xors on
//! independent lanes: the compiler makes vector code of it on every processor, and it runs at the speed of writing memory.

use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use tender_proto::BlockKey;
use tender_proto::sum::{GOLDEN, mix};

/// Words made abreast.
const LANES: usize = 8;

/// Makes and knows the payloads of one run.
#[derive(Clone, Copy, Debug)]
pub struct Payload {
    generation: u64,
}

impl Payload {
    /// Payloads of a generation.
    pub fn new(generation: u64) -> Self {
        Self { generation }
    }

    /// Writes the bytes of a block.
    pub fn fill(&self, key: &BlockKey, bytes: &mut [u8]) {
        let (words, _) = key.as_bytes().as_chunks::<8>();
        let seed = words.iter().fold(mix(self.generation ^ GOLDEN), |seed, word| mix(seed ^ u64::from_le_bytes(*word)));
        let mut x = [0u64; LANES];
        for (lane, x) in (1u64..).zip(&mut x) {
            *x = seed.wrapping_add(lane.wrapping_mul(GOLDEN));
        }
        let (rows, rest) = bytes.as_chunks_mut::<{ 8 * LANES }>();
        for row in rows {
            write_row(row, &x);
            x.iter_mut().for_each(|x| *x = x.wrapping_add(GOLDEN.wrapping_mul(LANES as u64)));
        }
        let mut row = [0u8; 8 * LANES];
        write_row(&mut row, &x);
        rest.copy_from_slice(&row[..rest.len()]);
    }
}

#[inline(always)]
fn write_row(row: &mut [u8; 8 * LANES], x: &[u64; LANES]) {
    let (words, _) = row.as_chunks_mut::<8>();
    for (word, x) in words.iter_mut().zip(x) {
        *word = (x ^ (x >> 29)).wrapping_add(x << 23).to_le_bytes();
    }
}

/// Memory for whole blocks, used again: memory touched for the first time costs more than filling it.
#[derive(Debug)]
pub struct Buffers {
    block_bytes: usize,
    free: Mutex<Vec<BytesMut>>,
}

impl Buffers {
    /// Buffers of a block each; grows to as many as are in use at once.
    pub fn new(block_bytes: usize) -> Self {
        Self { block_bytes, free: Mutex::default() }
    }

    /// Bytes of each.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// One buffer, with any content.
    pub fn take(&self) -> BytesMut {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| BytesMut::zeroed(self.block_bytes))
    }

    /// Gives a buffer back.
    pub fn put_back(&self, buffer: BytesMut) {
        debug_assert_eq!(buffer.len(), self.block_bytes, "a buffer holds one block");
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }

    /// Gives buffers back that were lent out for reading; what somebody still reads is left to him.
    pub fn put_back_read(&self, payloads: Vec<Bytes>) {
        payloads.into_iter().filter_map(|payload| payload.try_into_mut().ok()).for_each(|buffer| self.put_back(buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(generation: u64, key: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Payload::new(generation).fill(&BlockKey::from_bytes([key; 32]), &mut bytes);
        bytes
    }

    #[test]
    fn depends_on_generation_and_key_and_on_nothing_else() {
        assert_eq!(bytes(1, 2, 1000), bytes(1, 2, 1000));
        assert_ne!(bytes(1, 2, 1000), bytes(2, 2, 1000));
        assert_ne!(bytes(1, 2, 1000), bytes(1, 3, 1000));
        assert_eq!(bytes(1, 2, 1003)[..997], bytes(1, 2, 997)[..]);
    }

    #[test]
    fn all_words_differ() {
        let bytes = bytes(7, 7, 1 << 20);
        let mut words = bytes.as_chunks::<8>().0.to_vec();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), (1 << 20) / 8);
    }

    #[test]
    fn buffers_come_back_unless_they_are_still_read() {
        let buffers = Buffers::new(64);
        let lent = vec![buffers.take().freeze(), buffers.take().freeze()];
        let reader = lent[0].clone();
        buffers.put_back_read(lent);
        assert_eq!(buffers.free.lock().unwrap().len(), 1);
        assert_eq!(reader.len(), 64);
    }
}
