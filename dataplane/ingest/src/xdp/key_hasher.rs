//! The hash of a stream's key: the key itself. The broker draws keys at random, so they need no mixing;
//! peers choose only what is looked up.

use std::hash::{BuildHasherDefault, Hasher};

/// For maps from [`penstock_wire::packet::StreamKey`].
pub(super) type KeyHash = BuildHasherDefault<KeyHasher>;

#[derive(Debug, Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u16(&mut self, number: u16) {
        self.0 ^= u64::from(number);
    }

    fn write_u64(&mut self, number: u64) {
        self.0 ^= number;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
