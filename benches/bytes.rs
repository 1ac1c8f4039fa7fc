//! What a byte costs: sums against a copy, and tokens into keys. Ratios are taken within a round; medians of seven, interleaved.

use std::hint::black_box;
use std::time::Instant;

use tender_proto::{BlockKey, sum};

const ROUNDS: usize = 7;
/// Beyond every cache, so that memory is what is measured.
const BYTES: usize = 256 << 20;

fn gb_per_s(bytes: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    bytes as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn print(name: &str, mut values: Vec<f64>, unit: &str) {
    values.sort_by(f64::total_cmp);
    println!(
        "  {name:36} median {:6.2}   min {:6.2}   max {:6.2}   {unit}",
        values[ROUNDS / 2],
        values[0],
        values[ROUNDS - 1]
    );
}

fn main() {
    let source: Vec<u8> = (0..BYTES).map(|i| ((i * 31) >> 3) as u8).collect();
    let mut target = vec![0u8; BYTES];
    let tokens: Vec<u32> = (0..4 << 20).collect();
    let root = BlockKey::from_bytes([7; 32]);
    let (mut copies, mut sums, mut ratios, mut hot) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut keys_16, mut keys_64) = (Vec::new(), Vec::new());
    target.copy_from_slice(&source);
    for _ in 0..ROUNDS {
        let copy = gb_per_s(BYTES, || black_box(&mut target).copy_from_slice(black_box(&source)));
        let summed = gb_per_s(BYTES, || {
            black_box(sum::fragment_sums(black_box(&source)));
        });
        copies.push(copy);
        sums.push(summed);
        ratios.push(summed / copy);
        let fragment = &source[..sum::FRAGMENT_BYTES];
        hot.push(gb_per_s(BYTES, || {
            for _ in 0..BYTES / sum::FRAGMENT_BYTES {
                black_box(sum::fragment_sum(black_box(fragment)));
            }
        }));
        keys_16.push(gb_per_s(4 * tokens.len(), || drop(black_box(root.chain(black_box(&tokens), 16)))));
        keys_64.push(gb_per_s(4 * tokens.len(), || drop(black_box(root.chain(black_box(&tokens), 64)))));
    }
    println!("bytes, one thread, {} MiB", BYTES >> 20);
    print("copy", copies, "GB/s");
    print("sum, from memory", sums, "GB/s");
    print("sum, from cache", hot, "GB/s");
    print("sum / copy", ratios, "");
    print("tokens into keys, blocks of 16", keys_16, "GB/s of tokens");
    print("tokens into keys, blocks of 64", keys_64, "GB/s of tokens");
}
