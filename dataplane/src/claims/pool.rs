//! The memory of spills: one mapping, in pieces, so that it is never more than it may be, whichever
//! threads take and return it.

use std::sync::{Mutex, OnceLock};

use memmap2::{MmapMut, MmapRaw, UncheckedAdvice};

use crate::poison::lock;

/// Bytes of a piece: a page.
pub(super) const PIECE: usize = 4096;
/// When all pieces are back, the kernel gets the memory if it was more than so many.
const WORTH_RETURNING: u32 = 64;

/// Pieces of memory.
#[derive(Debug)]
pub(super) struct PiecePool {
    pieces: u32,
    /// Mapped when the first is taken; none if the kernel gave nothing.
    map: OnceLock<Option<MmapRaw>>,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// Pieces that came back.
    returned: Vec<u32>,
    /// Pieces from here on have not been taken.
    fresh: u32,
    taken: u32,
}

/// A piece that was taken. It goes back with [`PiecePool::give`].
#[derive(Debug)]
pub(super) struct Piece(u32);

impl PiecePool {
    /// So many bytes; none is taken from the kernel before it is written.
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            pieces: (bytes / PIECE as u64) as u32,
            map: OnceLock::new(),
            free: Mutex::default(),
        }
    }

    fn map(&self) -> Option<&MmapRaw> {
        let bytes = self.pieces as usize * PIECE;
        let made = self
            .map
            .get_or_init(|| MmapMut::map_anon(bytes).ok().map(MmapRaw::from));
        made.as_ref()
    }

    /// A piece of zeros, while there are any.
    pub(super) fn take(&self) -> Option<Piece> {
        self.map()?;
        let (mut piece, is_used) = self.take_any()?;
        if is_used {
            // What another stream left there must not reach this one's log.
            self.bytes_mut(&mut piece).fill(0);
        }
        Some(piece)
    }

    /// A piece, and whether it has been used before.
    fn take_any(&self) -> Option<(Piece, bool)> {
        let mut free = lock(&self.free);
        let (number, is_used) = match free.returned.pop() {
            Some(number) => (number, true),
            None if free.fresh < self.pieces => {
                free.fresh += 1;
                (free.fresh - 1, false)
            }
            None => return None,
        };
        free.taken += 1;
        Some((Piece(number), is_used))
    }

    /// Takes pieces back.
    pub(super) fn give(&self, pieces: impl Iterator<Item = Piece>) {
        let mut free = lock(&self.free);
        for Piece(number) in pieces {
            free.returned.push(number);
            free.taken -= 1;
        }
        if free.taken > 0 || free.fresh < WORTH_RETURNING {
            return;
        }
        *free = Free::default();
        if let Some(map) = self.map() {
            // SAFETY: every piece is back and the lock keeps it so: nothing refers to the memory, and
            // what is taken later is zero or written before it is read.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// The bytes of a piece.
    pub(super) fn bytes<'a>(&'a self, piece: &'a Piece) -> &'a [u8; PIECE] {
        // SAFETY: the piece lies inside the mapping; whoever has it is the only one with its number,
        // and cannot write to it while it is borrowed. Anonymous memory is initialised.
        unsafe { &*self.start(piece).cast() }
    }

    /// The same, to be written.
    pub(super) fn bytes_mut<'a>(&'a self, piece: &'a mut Piece) -> &'a mut [u8; PIECE] {
        // SAFETY: as in `bytes`; the piece is borrowed exclusively.
        unsafe { &mut *self.start(piece).cast() }
    }

    fn start(&self, piece: &Piece) -> *mut u8 {
        let map = self.map().expect("it was there when the piece was taken");
        assert!(piece.0 < self.pieces);
        // SAFETY: the number is below the pieces of the mapping.
        unsafe { map.as_mut_ptr().add(piece.0 as usize * PIECE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_that_was_used_is_zeros_again() {
        let pool = PiecePool::new(2 * PIECE as u64);
        // While another is out, pieces keep what was written to them.
        let _kept = pool.take().unwrap();
        let mut piece = pool.take().unwrap();
        pool.bytes_mut(&mut piece).fill(7);
        pool.give([piece].into_iter());
        let again = pool.take().unwrap();
        assert!(pool.bytes(&again).iter().all(|byte| *byte == 0));
    }
}
