//! A spilled batch, which lies outside the ring: its memory grows as its bytes arrive.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::pool::{PIECE, Piece};
use super::{ClaimPriority, Ledger, Shares};

/// The bytes of a batch outside the ring. It takes a piece of memory only for bytes that are about to be
/// written, so its memory grows with the bytes that arrived, not with the length that the batch claims.
#[derive(Debug)]
pub(crate) struct Spill {
    ledger: Arc<Ledger>,
    shares: Arc<Shares>,
    /// Indexed by the piece's number in the batch.
    pieces: BTreeMap<u32, Piece>,
}

/// The shares or the pool do not have enough memory left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;

impl Spill {
    pub(super) fn new(ledger: Arc<Ledger>, shares: Arc<Shares>) -> Self {
        Self {
            ledger,
            shares,
            pieces: BTreeMap::new(),
        }
    }

    /// Takes memory for `len` bytes at `offset` of the batch, unless it already has it.
    pub(crate) fn reserve(
        &mut self,
        offset: u32,
        len: u32,
        priority: ClaimPriority,
    ) -> Result<(), NoMemory> {
        let numbers = numbers(offset, len);
        let present = self.pieces.range(numbers.clone()).count();
        let wanted = (numbers.len() - present) as u64;
        if wanted == 0 {
            return Ok(());
        }
        if let Err(account) = self.shares.take(wanted * PIECE as u64, priority) {
            self.ledger.press(account);
            return Err(NoMemory);
        }
        let mut taken = 0;
        for number in numbers {
            if self.pieces.contains_key(&number) {
                continue;
            }
            // The shares never exceed the pool, so this fails only if the kernel gave no memory.
            let Some(piece) = self.ledger.pool.take() else {
                self.shares.give((wanted - taken) * PIECE as u64);
                return Err(NoMemory);
            };
            self.pieces.insert(number, piece);
            taken += 1;
        }
        Ok(())
    }

    /// Whether it has memory for `len` bytes at `offset`.
    pub(crate) fn has(&self, offset: u32, len: u32) -> bool {
        numbers(offset, len).all(|number| self.pieces.contains_key(&number))
    }

    /// Gives back the pieces that lie entirely after the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: u32) {
        let behind = self.pieces.split_off(&len.div_ceil(PIECE as u32));
        let bytes = (behind.len() * PIECE) as u64;
        if bytes > 0 {
            // Pieces before shares, so that a spill that gets the share also finds the pieces.
            self.ledger.pool.give(behind.into_values());
            self.shares.give(bytes);
        }
    }

    /// Writes bytes for which memory was reserved.
    pub(crate) fn write(&mut self, offset: u32, mut bytes: &[u8]) {
        let mut offset = offset as usize;
        while !bytes.is_empty() {
            let (number, at) = (offset / PIECE, offset % PIECE);
            let (now, rest) = bytes.split_at(bytes.len().min(PIECE - at));
            let piece = self.pieces.get_mut(&(number as u32));
            let piece = piece.expect("memory was reserved");
            self.ledger.pool.bytes_mut(piece)[at..at + now.len()].copy_from_slice(now);
            bytes = rest;
            offset += now.len();
        }
    }

    /// The pieces that hold the first `len` bytes, each with its offset. The unwritten bytes of a partly
    /// written piece are undefined.
    pub(crate) fn written_pieces(&self, len: u32) -> impl Iterator<Item = (u32, &[u8])> {
        let len = len as usize;
        self.pieces.iter().map_while(move |(number, piece)| {
            let offset = *number as usize * PIECE;
            let present = len.checked_sub(offset)?.min(PIECE);
            Some((offset as u32, &self.ledger.pool.bytes(piece)[..present]))
        })
    }

    /// Bytes of memory in use.
    pub(crate) fn held(&self) -> u64 {
        (self.pieces.len() * PIECE) as u64
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        self.truncate(0);
    }
}

/// Numbers of the pieces that a range of the batch lies in.
fn numbers(offset: u32, len: u32) -> std::ops::Range<u32> {
    let end = u64::from(offset) + u64::from(len);
    offset / PIECE as u32..end.div_ceil(PIECE as u64) as u32
}
