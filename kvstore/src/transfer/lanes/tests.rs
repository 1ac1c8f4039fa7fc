//! Order and shares of the lanes.

use super::*;

fn filled(depth: usize, counts: [u64; 3]) -> Lanes {
    let mut lanes = Lanes::new(depth);
    for (lane, (count, base)) in LANES.into_iter().zip(counts.into_iter().zip([100, 200, 300])) {
        (0..count).for_each(|at| lanes.push(lane, TransferId(base + at)));
    }
    lanes
}

fn drain(lanes: &mut Lanes) -> Vec<Lane> {
    std::iter::from_fn(|| lanes.take().map(|(lane, _)| lane)).collect()
}

#[test]
fn what_somebody_waits_for_goes_before_the_rest_in_its_order() {
    let mut lanes = filled(1, [2, 2, 2]);
    let order = std::iter::from_fn(|| {
        let (lane, id) = lanes.take()?;
        lanes.done(lane);
        Some(id.0)
    });
    assert_eq!(order.collect::<Vec<_>>(), [100, 101, 200, 201, 300, 301]);
}

#[test]
fn no_more_than_the_depth_is_handed_out() {
    let mut lanes = filled(4, [10, 0, 0]);
    assert_eq!(drain(&mut lanes).len(), 4);
    lanes.done(Lane::Demand);
    assert_eq!((drain(&mut lanes).len(), lanes.in_flight(), lanes.queued(Lane::Demand)), (1, 4, 5));
}

#[test]
fn write_back_has_an_eighth_however_much_is_read() {
    let mut lanes = filled(16, [100, 100, 0]);
    let handed = drain(&mut lanes);
    assert_eq!(handed.iter().filter(|&&lane| lane == Lane::WriteBack).count(), 2);
    for _ in 0..50 {
        lanes.done(Lane::Demand);
        assert_eq!(lanes.take().map(|(lane, _)| lane), Some(Lane::Demand), "its share is taken already");
    }
}

#[test]
fn a_prefetch_that_somebody_waits_for_overtakes() {
    let mut lanes = filled(1, [1, 1, 2]);
    assert!(lanes.promote(TransferId(301)), "it was still queued");
    let mut order = Vec::new();
    while let Some((lane, id)) = lanes.take() {
        order.push((lane, id.0));
        lanes.done(lane);
    }
    let expected = [(Lane::Demand, 100), (Lane::Demand, 301), (Lane::WriteBack, 200), (Lane::Prefetch, 300)];
    assert_eq!(order, expected);
    assert!(!lanes.promote(TransferId(300)), "what is gone stays where it is");
}
