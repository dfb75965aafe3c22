//! The memory of spills: one mapping, divided into pieces. Its size bounds the memory, regardless of
//! which threads take and return pieces.

use std::sync::{Mutex, OnceLock};

use memmap2::{MmapMut, MmapRaw, UncheckedAdvice};

use penstock_runtime::poison::lock;

/// Size of a piece, bytes: one page.
pub(super) const PIECE: usize = 4096;
/// When all pieces are back, the pool returns its memory to the kernel if more pieces than this were
/// used.
const WORTH_RETURNING: u32 = 64;

/// A pool of memory pieces.
#[derive(Debug)]
pub(super) struct PiecePool {
    pieces: u32,
    /// Mapped on first use; `None` if the kernel refused.
    map: OnceLock<Option<MmapRaw>>,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// Pieces that were given back.
    returned: Vec<u32>,
    /// Pieces from this number on have not been used.
    fresh: u32,
    taken: u32,
}

/// A piece in use. Return it with [`PiecePool::give`].
#[derive(Debug)]
pub(super) struct Piece(u32);

impl PiecePool {
    /// A pool of this many bytes. The kernel allocates no page before it is written.
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

    /// Takes a zeroed piece, if one is left.
    pub(super) fn take(&self) -> Option<Piece> {
        self.map()?;
        let (mut piece, is_used) = self.take_any()?;
        if is_used {
            // What another stream left in the piece must not reach this stream's log.
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
            // pieces that are taken later are zero or written before they are read.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// The bytes of a piece.
    pub(super) fn bytes<'a>(&'a self, piece: &'a Piece) -> &'a [u8; PIECE] {
        // SAFETY: the piece lies inside the mapping. Its owner is the only one with its number, and
        // cannot write to it while it is borrowed. Anonymous memory is initialised.
        unsafe { &*self.start(piece).cast() }
    }

    /// The bytes of a piece, writable.
    pub(super) fn bytes_mut<'a>(&'a self, piece: &'a mut Piece) -> &'a mut [u8; PIECE] {
        // SAFETY: as in `bytes`; the piece is borrowed exclusively.
        unsafe { &mut *self.start(piece).cast() }
    }

    fn start(&self, piece: &Piece) -> *mut u8 {
        let map = self
            .map()
            .expect("the mapping exists while a piece is in use");
        assert!(piece.0 < self.pieces);
        // SAFETY: the number is below the pieces of the mapping.
        unsafe { map.as_mut_ptr().add(piece.0 as usize * PIECE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_piece_is_zeroed() {
        let pool = PiecePool::new(2 * PIECE as u64);
        // While another piece is in use, returned pieces keep their contents.
        let _kept = pool.take().unwrap();
        let mut piece = pool.take().unwrap();
        pool.bytes_mut(&mut piece).fill(7);
        pool.give([piece].into_iter());
        let again = pool.take().unwrap();
        assert!(pool.bytes(&again).iter().all(|byte| *byte == 0));
    }
}
