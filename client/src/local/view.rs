//! A block where it lies: leased pieces of mapped memory, given back when the last view of it is dropped.

use std::sync::Arc;

use super::connection::Connection;
use super::debts::Held;
use super::mapping::Mapping;

/// Compared at once: copied out, since what is shared is never borrowed.
const COMPARED_BYTES: usize = 16 << 10;

/// The bytes of a block that is leased.
#[derive(Debug)]
pub(crate) struct LeasedBytes {
    pieces: Vec<Piece>,
    bytes: usize,
    /// Given back before the connection is let go of.
    _lease: Held,
    /// The daemon is not left as long as something is leased.
    _connection: Arc<Connection>,
}

/// Bytes of one mapping.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) mapping: Arc<Mapping>,
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

impl LeasedBytes {
    /// # Panics
    /// If a piece does not lie in its mapping.
    pub(super) fn new(pieces: Vec<Piece>, lease: Held, connection: &Arc<Connection>) -> Self {
        assert!(
            pieces.iter().all(|piece| piece.mapping.holds(piece.offset, piece.bytes as u64)),
            "pieces were checked"
        );
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        Self { pieces, bytes, _lease: lease, _connection: Arc::clone(connection) }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn copy_to(&self, target: &mut [u8]) {
        let (bytes, room) = (self.bytes, target.len());
        assert_eq!(bytes, room, "a block of {bytes} bytes is copied to a place of exactly that length");
        let mut rest = target;
        for piece in &self.pieces {
            let (into, after) = rest.split_at_mut(piece.bytes);
            piece.mapping.copy_to(piece.offset, into);
            rest = after;
        }
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut copy = Vec::with_capacity(self.bytes);
        self.pieces.iter().for_each(|piece| piece.mapping.append_to(piece.offset, piece.bytes, &mut copy));
        copy
    }

    pub(crate) fn equals(&self, bytes: &[u8]) -> bool {
        if bytes.len() != self.bytes {
            return false;
        }
        let mut buffer = [0; COMPARED_BYTES];
        let mut rest = bytes;
        self.pieces.iter().all(|piece| {
            let (expected, after) = rest.split_at(piece.bytes);
            rest = after;
            (piece.offset..).step_by(COMPARED_BYTES).zip(expected.chunks(COMPARED_BYTES)).all(|(offset, expected)| {
                let copy = &mut buffer[..expected.len()];
                piece.mapping.copy_to(offset, copy);
                copy == expected
            })
        })
    }

    /// Where the pieces lie, in order.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (*const u8, usize)> {
        self.pieces.iter().map(|piece| (piece.mapping.start(piece.offset, piece.bytes), piece.bytes))
    }
}
