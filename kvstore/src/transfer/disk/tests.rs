use super::*;
use crate::device::block::simulated::{DiskImage, Faults, SimulatedDisk};
use crate::device::block::{Operation, PageFile};

const SLOT_BYTES: u32 = 4 * PAGE_BYTES as u32;
const PAYLOAD_BYTES: u32 = SLOT_BYTES - 100;
const INTO: Extent = Extent { segment: 0, offset: PAGE_BYTES as u32, bytes: SLOT_BYTES };
/// What the slot of the arena held before.
const BEFORE: u8 = 0xbe;
/// The rest of the slot on disk, which no sum speaks of.
const REST: u8 = 0x7e;

fn slot(payload: u8) -> Vec<u8> {
    let mut slot = vec![payload; PAYLOAD_BYTES as usize];
    slot.resize(SLOT_BYTES as usize, REST);
    slot
}

fn expected(payload: u8) -> Expected {
    let sums = sum::fragment_sums(&slot(payload)[..PAYLOAD_BYTES as usize]);
    Expected { seed: 7, root: sum::root(7, &sums), payload_bytes: PAYLOAD_BYTES }
}

/// Loads a slot of a disk that holds `held`; how that ends, and what the slot of the arena holds then.
fn load(held: u8, wanted: u8, is_private: bool, faults: Faults) -> (Outcome, Vec<u8>) {
    let arena = Arc::new(Arena::new(16 * PAGE_BYTES, 1).expect("addresses"));
    arena.write(INTO, 0, &[BEFORE; SLOT_BYTES as usize]);
    let mut image = DiskImage::new(16 * PAGE_BYTES);
    let mut pages = PageBuffer::zeroed(4).expect("memory");
    pages.copy_from_slice(&slot(held));
    image.write_pages(8 * PAGE_BYTES, &pages).expect("within the disk");
    let mut disk = SimulatedDisk::new(1, image, Arc::clone(&arena), faults);
    let mut in_flight = InFlight::new(Arc::clone(&arena));
    let expected = expected(wanted);
    let transfer = Transfer::Load { offset: 8 * PAGE_BYTES, into: INTO, expected, is_private };
    in_flight.start(TransferId(5), transfer);
    in_flight.submit(&mut disk);
    let mut done = Vec::new();
    disk.advance(disk.next_due_us().expect("it was submitted"));
    disk.wait(Duration::ZERO, &mut done);
    let (id, outcome) = in_flight.outcome(done.pop().expect("it is due"));
    assert!(id == TransferId(5) && done.is_empty() && in_flight.is_empty());
    let mut found = vec![0; SLOT_BYTES as usize];
    arena.read(INTO, 0, &mut found);
    (outcome, found)
}

#[test]
fn a_private_load_brings_what_was_asked_for_and_nothing_besides() {
    let (outcome, found) = load(1, 1, true, Faults::default());
    assert!(matches!(outcome, Outcome::Done(sums) if sums.len() == 1));
    let (payload, rest) = found.split_at(PAYLOAD_BYTES as usize);
    assert!(payload.iter().all(|&byte| byte == 1) && rest.iter().all(|&byte| byte == 0));
}

#[test]
fn what_a_private_load_finds_and_nobody_asked_for_never_comes_to_the_arena() {
    let (outcome, found) = load(2, 1, true, Faults::default());
    assert_eq!(outcome, Outcome::Mismatch);
    assert!(found == [BEFORE; SLOT_BYTES as usize]);
    for faults in [
        Faults { read_error_per_mille: 1000, ..Faults::default() },
        Faults { short_per_mille: 1000, ..Faults::default() },
        Faults { bit_flip_per_mille: 1000, ..Faults::default() },
    ] {
        let (outcome, found) = load(1, 1, true, faults);
        // A flipped bit of the rest is no fault.
        if !matches!(outcome, Outcome::Done(_)) {
            assert!(found == [BEFORE; SLOT_BYTES as usize], "{outcome:?}");
        }
    }
}

#[test]
fn a_load_of_what_is_sure_is_read_in_place() {
    let (outcome, found) = load(1, 1, false, Faults::default());
    assert!(matches!(outcome, Outcome::Done(_)));
    assert!(found == slot(1), "all of the slot comes as it is");
}

/// Takes everything, and ends nothing by itself.
#[derive(Default)]
struct Keeper(Vec<IoRequest>);

impl BlockDevice for Keeper {
    fn depth(&self) -> usize {
        64
    }

    fn submit(&mut self, request: IoRequest) {
        self.0.push(request);
    }

    fn wait(&mut self, _timeout: Duration, _done: &mut Vec<IoDone>) {}

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        Arc::new(|| ())
    }

    fn segment_ready(&mut self, _segment: u32) {}

    fn describe(&self) -> String {
        "keeps what it is given".to_owned()
    }
}

impl Keeper {
    /// Ends the oldest private load; the memory that it had is still at that address.
    fn fail_first(&mut self, in_flight: &mut InFlight) {
        let IoRequest { id, operation } = self.0.remove(0);
        let Operation::ReadPrivate { into, .. } = operation else { panic!("not a private load: {operation:?}") };
        let done = IoDone { id, result: Err(IoFault::Short), private: Some(into) };
        assert_eq!(in_flight.outcome(done), (TransferId(id), Outcome::Failed(IoFault::Short)));
    }
}

#[test]
fn memory_of_private_loads_is_bounded_and_given_back() {
    let mut in_flight = InFlight::new(Arc::new(Arena::new(1 << 30, 1).expect("addresses")));
    let mut device = Keeper::default();
    let slot_bytes = limits::PRIVATE_LOADS_BYTES_MAX as u32 / 4;
    for place in 0..8 {
        let into = Extent { segment: 0, offset: place * slot_bytes, bytes: slot_bytes };
        let transfer = Transfer::Load { offset: 0, into, expected: expected(1), is_private: true };
        in_flight.start(TransferId(place.into()), transfer);
    }
    in_flight.start(TransferId(8), Transfer::Flush);
    in_flight.submit(&mut device);
    assert_eq!(device.0.len(), 4);
    device.fail_first(&mut in_flight);
    in_flight.submit(&mut device);
    assert_eq!(device.0.len(), 4);
    for _ in 0..7 {
        device.fail_first(&mut in_flight);
        in_flight.submit(&mut device);
    }
    assert!(matches!(device.0[..], [IoRequest { id: 8, operation: Operation::Flush }]));
    assert_eq!((in_flight.private.in_flight_bytes, in_flight.private.spare.len()), (0, 0));
}
