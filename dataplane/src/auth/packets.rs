//! Authentication of single packets: a tag instead of the checksum, and on ACKs a counter.
//!
//! The tag is that of ChaCha20-Poly1305 (RFC 8439) over bytes that are authenticated and none that
//! are encrypted, computed here from the two primitives because a packet lies in several parts.
//! Nothing is allocated.

use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher};
use poly1305::Poly1305;
use poly1305::universal_hash::{KeyInit, UniversalHash};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::key::{SECRET_LEN, mac};
use crate::wire::packet::{ACK_SEAL_LEN, TAG_LEN, Tag};

const BLOCK: usize = 16;
const COUNTER_LEN: usize = ACK_SEAL_LEN - TAG_LEN;

/// Keys of one stream's packets over one connection, one for each direction.
pub struct PacketKeys {
    data: Zeroizing<[u8; SECRET_LEN]>,
    acks: Zeroizing<[u8; SECRET_LEN]>,
}

impl PacketKeys {
    /// Derives both from the secret that the broker gives in its sealed answer.
    #[must_use]
    pub fn new(secret: &[u8; SECRET_LEN]) -> Self {
        let derived = |purpose: &str| Zeroizing::new(mac(secret, &[purpose.as_bytes()]));
        Self {
            data: derived("penstock packets"),
            acks: derived("penstock acks"),
        }
    }

    /// The tag of a DATA packet. No number may be given to two packets.
    #[must_use]
    pub fn seal_data(&self, packet: u64, parts: &[&[u8]]) -> Tag {
        tag(&self.data, packet, parts)
    }

    /// Whether a DATA packet is as it was sealed.
    #[must_use]
    pub fn verify_data(&self, packet: u64, sealed: &Tag, parts: &[&[u8]]) -> bool {
        self.seal_data(packet, parts).ct_eq(sealed).into()
    }

    /// Puts counter and tag behind an ACK of `len` bytes at the start of `out`; returns the length of
    /// the whole. No counter may be given to two ACKs.
    ///
    /// # Panics
    /// If `out` has not [`ACK_SEAL_LEN`] bytes more.
    pub fn seal_ack(&self, counter: u64, out: &mut [u8], len: usize) -> usize {
        let end = len + COUNTER_LEN;
        out[len..end].copy_from_slice(&counter.to_le_bytes());
        let tag = tag(&self.acks, counter, &[&out[..end]]);
        out[end..end + TAG_LEN].copy_from_slice(&tag);
        end + TAG_LEN
    }

    /// The ACK inside a sealed one and its counter, if it is as it was sealed.
    #[must_use]
    pub fn open_ack<'a>(&self, sealed: &'a [u8]) -> Option<(u64, &'a [u8])> {
        let (covered, sent) = sealed.split_last_chunk::<TAG_LEN>()?;
        let (ack, counter) = covered.split_last_chunk::<COUNTER_LEN>()?;
        let counter = u64::from_le_bytes(*counter);
        let computed = tag(&self.acks, counter, &[covered]);
        bool::from(computed.ct_eq(sent)).then_some((counter, ack))
    }
}

impl std::fmt::Debug for PacketKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketKeys").finish_non_exhaustive()
    }
}

/// RFC 8439 section 2.8, with empty plaintext; the nonce is the number and four zeros.
fn tag(key: &[u8; SECRET_LEN], number: u64, parts: &[&[u8]]) -> Tag {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    let mut once = [0; SECRET_LEN];
    ChaCha20::new(key.into(), &nonce.into()).apply_keystream(&mut once);
    let mut blocks = Blocks {
        poly: Poly1305::new(&once.into()),
        carry: [0; BLOCK],
        filled: 0,
    };
    let mut len = 0;
    for part in parts {
        len += part.len() as u64;
        blocks.add(part);
    }
    blocks.finish(len)
}

/// Bytes that come in parts, for a hash that takes whole blocks.
struct Blocks {
    poly: Poly1305,
    carry: [u8; BLOCK],
    filled: usize,
}

impl Blocks {
    fn add(&mut self, mut bytes: &[u8]) {
        if self.filled > 0 {
            let taken = bytes.len().min(BLOCK - self.filled);
            self.carry[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled < BLOCK {
                return;
            }
            self.poly.update_padded(&self.carry);
        }
        let (whole, rest) = bytes.split_at(bytes.len() / BLOCK * BLOCK);
        self.poly.update_padded(whole);
        self.carry[..rest.len()].copy_from_slice(rest);
        self.filled = rest.len();
    }

    fn finish(mut self, len: u64) -> Tag {
        self.poly.update_padded(&self.carry[..self.filled]);
        let mut lengths = [0; BLOCK];
        lengths[..8].copy_from_slice(&len.to_le_bytes());
        self.poly.update_padded(&lengths);
        self.poly.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chacha20poly1305::ChaCha20Poly1305;
    use chacha20poly1305::aead::AeadInPlace;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn keys(byte: u8) -> PacketKeys {
        PacketKeys::new(&[byte; SECRET_LEN])
    }

    proptest! {
        /// However it lies, the tag is that of a whole implementation.
        #[test]
        fn the_tag_is_that_of_rfc_8439(key: [u8; SECRET_LEN], number: u64, parts in vec(vec(any::<u8>(), 0..200), 0..6)) {
            let whole = parts.concat();
            let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
            let nonce = [&number.to_le_bytes()[..], &[0; 4]].concat();
            let cipher = ChaCha20Poly1305::new(&key.into());
            let theirs = cipher.encrypt_in_place_detached(nonce[..].into(), &whole, &mut []).unwrap();
            prop_assert_eq!(&tag(&key, number, &parts)[..], &theirs[..]);
        }

        #[test]
        fn any_change_is_noticed(number in 1u64.., bytes in vec(any::<u8>(), 1..300), bit: usize) {
            let sealed = keys(1).seal_data(number, &[&bytes]);
            prop_assert!(keys(1).verify_data(number, &sealed, &[&bytes]));
            prop_assert!(!keys(1).verify_data(number - 1, &sealed, &[&bytes]));
            prop_assert!(!keys(2).verify_data(number, &sealed, &[&bytes]));
            let mut changed = bytes.clone();
            let bit = bit % (bytes.len() * 8);
            changed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!keys(1).verify_data(number, &sealed, &[&changed]));

            let mut ack = bytes.clone();
            ack.resize(bytes.len() + ACK_SEAL_LEN, 0);
            let len = keys(1).seal_ack(number, &mut ack, bytes.len());
            prop_assert_eq!(len, ack.len());
            prop_assert_eq!(keys(1).open_ack(&ack), Some((number, &bytes[..])));
            prop_assert_eq!(keys(2).open_ack(&ack), None);
            prop_assert_eq!(keys(1).open_ack(&ack[1..]), None);
            let bit = bit % (ack.len() * 8);
            ack[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(keys(1).open_ack(&ack), None);
        }

        #[test]
        fn arbitrary_acks_open_nothing(bytes in vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(keys(1).open_ack(&bytes), None);
        }
    }
}
