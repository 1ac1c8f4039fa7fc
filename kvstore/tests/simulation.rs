//! The simulated world, over many seeds: no wrong byte, nothing acknowledged that is lost, nothing purged that comes back, nobody left
//! without an answer, no slot leaked.
//!
//! `TENDER_SIM_SEED` runs one seed (or, with `TENDER_SIM_SEEDS`, so many from it on), `TENDER_SIM_OPS` sets the operations of each;
//! `TENDER_SIM_TRACE` names a file for all that is known of a failure's past.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tender_kvstore::simulate;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not `{text}`")))
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 1_000..1_006 {
        let [one, other] = [(); 2].map(|()| simulate::run(seed, 3_000).unwrap_or_else(|failure| panic!("{failure}")));
        assert_eq!(one, other, "seed {seed}");
        assert_ne!(
            one.trace,
            simulate::run(seed + 100, 3_000).expect("another world").trace,
            "the trace tells worlds apart"
        );
    }
}

#[test]
fn every_world_keeps_its_promises() {
    let first = number("TENDER_SIM_SEED").unwrap_or(1);
    let alone = number("TENDER_SIM_SEED").map(|_| 1);
    let count = number("TENDER_SIM_SEEDS").or(alone).unwrap_or(SEEDS);
    let operations = number("TENDER_SIM_OPS").unwrap_or(OPERATIONS);
    let (next, start) = (AtomicU64::new(first), Instant::now());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let totals = std::thread::scope(|scope| {
        let worker = || {
            let mut totals = [0; 13];
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + count {
                    return totals;
                }
                let done = simulate::run(seed, operations).unwrap_or_else(|failure| {
                    if let Some(file) = std::env::var_os("TENDER_SIM_TRACE") {
                        std::fs::write(&file, failure.last.join("\n")).expect("TENDER_SIM_TRACE can be written");
                    }
                    panic!("{failure}")
                });
                let numbers = [
                    done.steps,
                    done.leased_blocks,
                    done.loaded_blocks,
                    done.committed_shards,
                    done.evicted_copies,
                    done.sum_mismatches,
                    done.purges,
                    done.survived_blocks,
                    done.kills + done.power_cuts,
                    done.warm_restarts,
                    done.cut_steps,
                    done.warm_blocks,
                    done.confirmed_holds,
                ];
                totals.iter_mut().zip(numbers).for_each(|(total, number)| *total += number);
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let sums = workers.into_iter().map(|worker| worker.join().expect("a world failed; see above"));
        sums.fold([0; 13], |sum, of_worker| std::array::from_fn(|i| sum[i] + of_worker[i]))
    });
    let [steps, leased, loaded, committed, evicted, mismatches, purges, survived, crashes, warm, cut, found, confirmed] =
        totals;
    println!(
        "{count} worlds x {operations} operations in {:.1} s: {steps} steps, {leased} blocks leased ({loaded} from disk), \
         {committed} shards committed, {evicted} copies evicted, {mismatches} bad reads found, {purges} purges, {crashes} crashes \
         survived by {survived} durable blocks, {warm} restarts of the worker alone ({cut} within a step) that found {found} blocks and \
         {confirmed} holds",
        start.elapsed().as_secs_f64()
    );
    if count >= SEEDS && operations >= OPERATIONS {
        let numbers = [loaded, committed, evicted, mismatches, purges, survived, crashes, warm, cut, found, confirmed];
        assert!(
            numbers.iter().all(|&number| number > 100),
            "a world in which little happens proves little: {numbers:?}"
        );
    }
}

const SEEDS: u64 = 400;
const OPERATIONS: u64 = 20_000;
