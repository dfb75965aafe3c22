//! Puts the deliveries of a broker together from the bytes of a connection; no I/O.

use std::io::IoSliceMut;
use std::ops::Deref;
use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_log::ChecksumMismatch;
use penstock_wire::batch;
use penstock_wire::delivery::{BatchInfo, DELIVERY_LEN, Delivery, DeliveryHeader, InvalidFrame};
use penstock_wire::packet::TAG_LEN;
use thiserror::Error;
use zerocopy::FromBytes;

/// Bytes that are allocated for a payload before any of it has arrived, at most.
const FIRST_ALLOCATION: usize = 1 << 20;

/// Payload of a batch, in a buffer that is used again.
#[derive(Debug, Default)]
pub(super) struct Payload {
    bytes: Vec<u8>,
    len: usize,
}

impl Payload {
    /// The buffer, for the next payload.
    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.bytes
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A complete delivery.
#[derive(Debug)]
pub(super) enum Arrived {
    /// A batch, and whether its bytes are those that its publisher sent.
    Batch(BatchInfo, Payload, Result<(), ChecksumMismatch>),
    /// The broker closes the connection.
    Error { code: u16, text: Vec<u8> },
    /// Any other.
    Other(Delivery),
}

/// What arrives is no delivery that this subscriber may take.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub(super) enum BadDelivery {
    #[error(transparent)]
    Frame(#[from] InvalidFrame),
    #[error("a delivery begins at byte {at}, beyond the {credit} bytes that were requested")]
    Credit { at: u64, credit: u64 },
    /// Its bytes were changed on the path, or in the log while the broker sent them.
    #[error("a delivery has an invalid tag: it was changed on the path")]
    Forged {
        /// Index of the batch, if it is one.
        batch: Option<u64>,
    },
}

/// The delivery whose payload or text is arriving.
#[derive(Debug)]
struct Body {
    delivery: Delivery,
    /// Header and tag.
    head: [u8; HEAD_LEN],
    payload: Payload,
    filled: usize,
}

const HEAD_LEN: usize = DELIVERY_LEN + TAG_LEN;

/// The deliveries of one connection.
#[derive(Debug)]
pub(super) struct Deliveries {
    max_payload: u32,
    /// Keys for the tags, if there are any, and the number of deliveries so far.
    keys: Option<Arc<PacketKeys>>,
    verified: u64,
    head: [u8; HEAD_LEN],
    filled: usize,
    body: Option<Body>,
    received: u64,
}

impl Deliveries {
    pub(super) fn new(max_payload: u32, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            max_payload,
            keys,
            verified: 0,
            head: [0; HEAD_LEN],
            filled: 0,
            body: None,
            received: 0,
        }
    }

    /// Bytes received over the connection.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Bytes of header and tag, if deliveries carry tags.
    pub(super) fn head_len(&self) -> usize {
        match self.keys {
            Some(_) => HEAD_LEN,
            None => DELIVERY_LEN,
        }
    }

    /// Where the next bytes belong: the rest of a payload, and the next header.
    pub(super) fn room(&mut self) -> [IoSliceMut<'_>; 2] {
        let len = self.head_len();
        let Some(body) = &mut self.body else {
            let head = &mut self.head[self.filled..len];
            return [IoSliceMut::new(head), IoSliceMut::new(&mut [])];
        };
        let payload = &mut body.payload;
        // Memory grows with what arrives, not with what a header claims.
        if body.filled == payload.bytes.len() {
            let more = (2 * body.filled).max(FIRST_ALLOCATION).min(payload.len);
            payload.bytes.resize(more, 0);
        }
        let end = payload.bytes.len().min(payload.len);
        let head = match end == payload.len {
            true => &mut self.head[..len],
            false => &mut [],
        };
        let rest = &mut payload.bytes[body.filled..end];
        [IoSliceMut::new(rest), IoSliceMut::new(head)]
    }

    /// Takes `count` bytes that were written to [`Self::room`]; adds what they complete. No delivery may begin
    /// at or beyond `credit`.
    pub(super) fn on_received(
        &mut self,
        count: usize,
        credit: u64,
        buffer: impl FnOnce() -> Vec<u8>,
        arrived: &mut Vec<Arrived>,
    ) -> Result<(), BadDelivery> {
        self.received += count as u64;
        let mut head = count;
        if let Some(body) = &mut self.body {
            let taken = count.min(body.payload.len - body.filled);
            body.filled += taken;
            head -= taken;
            if body.filled == body.payload.len {
                let body = self.body.take().expect("it is there");
                arrived.push(self.complete(body)?);
            }
        }
        self.filled += head;
        if self.filled == self.head_len() {
            let at = self.received - self.filled as u64;
            self.filled = 0;
            let beyond = (at >= credit).then_some(BadDelivery::Credit { at, credit });
            arrived.extend(self.begin(beyond, buffer)?);
        }
        Ok(())
    }

    /// A header is complete; returns the delivery if it has no more bytes. Only the last one may begin beyond the
    /// credit.
    fn begin(
        &mut self,
        beyond: Option<BadDelivery>,
        buffer: impl FnOnce() -> Vec<u8>,
    ) -> Result<Option<Arrived>, BadDelivery> {
        let header = DeliveryHeader::ref_from_bytes(&self.head[..DELIVERY_LEN]);
        let delivery = header
            .expect("the length matches")
            .parse(self.max_payload)?;
        if let Some(bad) = beyond
            && !matches!(delivery, Delivery::Error { .. })
        {
            return Err(bad);
        }
        let (len, bytes) = match delivery {
            Delivery::Batch(batch) => (batch.payload_len as usize, buffer()),
            Delivery::Error { text_len, .. } => (text_len, Vec::new()),
            _ => (0, Vec::new()),
        };
        let body = Body {
            delivery,
            head: self.head,
            payload: Payload { bytes, len },
            filled: 0,
        };
        if len > 0 {
            self.body = Some(body);
            return Ok(None);
        }
        self.complete(body).map(Some)
    }

    fn complete(&mut self, body: Body) -> Result<Arrived, BadDelivery> {
        let payload = body.payload;
        self.verify(&body.head, &payload).map_err(|()| {
            let batch = match body.delivery {
                Delivery::Batch(batch) => Some(batch.index),
                _ => None,
            };
            BadDelivery::Forged { batch }
        })?;
        Ok(match body.delivery {
            Delivery::Batch(batch) => {
                let intact = verify_checksum(&batch, &payload);
                Arrived::Batch(batch, payload, intact)
            }
            Delivery::Error { code, .. } => Arrived::Error {
                code,
                text: payload.to_vec(),
            },
            other => Arrived::Other(other),
        })
    }

    fn verify(&mut self, head: &[u8; HEAD_LEN], body: &[u8]) -> Result<(), ()> {
        let Some(keys) = &self.keys else {
            return Ok(());
        };
        let (header, tag) = head.split_at(DELIVERY_LEN);
        let tag = tag.try_into().expect("the length matches");
        let number = self.verified;
        self.verified += 1;
        match keys.verify_reply(number, tag, &[header, body]) {
            true => Ok(()),
            false => Err(()),
        }
    }
}

fn verify_checksum(batch: &BatchInfo, payload: &[u8]) -> Result<(), ChecksumMismatch> {
    let computed = batch::checksum(batch.batch_seq, batch.messages, payload);
    match computed == batch.checksum {
        true => Ok(()),
        false => Err(ChecksumMismatch {
            index: batch.index,
            stream: batch.stream,
            batch_seq: batch.batch_seq,
            computed,
            sent: batch.checksum,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::message;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn batch(index: u64, payload: &[u8]) -> BatchInfo {
        BatchInfo {
            index,
            session: 1,
            stream: 2,
            batch_seq: index,
            messages: 1,
            payload_len: payload.len() as u32,
            checksum: batch::checksum(index, 1, payload),
            arrival_unix_ns: 0,
        }
    }

    fn payload(len: usize) -> Vec<u8> {
        let mut payload = Vec::new();
        message::append(&mut payload, &vec![7; len]);
        payload
    }

    /// The bytes of a delivery as a broker sends them.
    fn bytes(delivery: &Delivery, body: &[u8], keys: Option<(&PacketKeys, u64)>) -> Vec<u8> {
        let header = DeliveryHeader::new(delivery);
        let tag = keys.map(|(keys, number)| keys.seal_reply(number, &[header.as_bytes(), body]));
        let tag = tag.as_ref().map_or(&[][..], |tag| &tag[..]);
        [header.as_bytes(), tag, body].concat()
    }

    /// Feeds bytes in pieces of these lengths, in turn.
    fn feed(
        deliveries: &mut Deliveries,
        mut bytes: &[u8],
        pieces: &[usize],
        credit: u64,
    ) -> Result<Vec<Arrived>, BadDelivery> {
        let mut arrived = Vec::new();
        for piece in pieces.iter().cycle() {
            if bytes.is_empty() {
                break;
            }
            let mut piece = &bytes[..bytes.len().min(*piece)];
            let mut count = 0;
            for mut room in deliveries.room() {
                let fits = room.len().min(piece.len());
                room[..fits].copy_from_slice(&piece[..fits]);
                piece = &piece[fits..];
                count += fits;
            }
            bytes = &bytes[count..];
            deliveries.on_received(count, credit, Vec::new, &mut arrived)?;
        }
        Ok(arrived)
    }

    fn shown(arrived: &[Arrived]) -> Vec<String> {
        let show = |arrived: &Arrived| match arrived {
            Arrived::Batch(info, payload, intact) => {
                format!("{} {} {}", info.index, payload.len(), intact.is_ok())
            }
            Arrived::Error { text, .. } => format!("error {}", String::from_utf8_lossy(text)),
            Arrived::Other(other) => format!("{other:?}"),
        };
        arrived.iter().map(show).collect()
    }

    #[test]
    fn a_length_is_not_believed_before_its_bytes_arrive() {
        let max = batch::MAX_PAYLOAD;
        let mut claim = batch(0, &payload(1));
        claim.payload_len = max;
        let mut deliveries = Deliveries::new(max, None);
        let header = bytes(&Delivery::Batch(claim), &[], None);
        feed(&mut deliveries, &header, &[64], u64::MAX).unwrap();
        assert_eq!(deliveries.room()[0].len(), FIRST_ALLOCATION);
        let mut small = Deliveries::new(max - 1, None);
        let refused = feed(&mut small, &header, &[64], u64::MAX).unwrap_err();
        assert!(matches!(
            refused,
            BadDelivery::Frame(InvalidFrame::Batch { .. })
        ));
    }

    #[test]
    fn more_than_was_requested_is_refused() {
        let content = payload(10);
        let one = bytes(&Delivery::Batch(batch(0, &content)), &content, None);
        let two = [&one[..], &one].concat();
        let mut deliveries = Deliveries::new(1024, None);
        // The first delivery may end beyond the limit; none may begin there.
        let credit = one.len() as u64;
        let refused = feed(&mut deliveries, &two, &[1000], credit).unwrap_err();
        assert_eq!(refused, BadDelivery::Credit { at: credit, credit });
        let mut deliveries = Deliveries::new(1024, None);
        assert!(feed(&mut deliveries, &two, &[1000], credit + 1).is_ok());
    }

    #[test]
    fn deliveries_without_their_tag_are_refused() {
        let keys = Arc::new(PacketKeys::new(&[3; 32]));
        let content = payload(10);
        let first = Delivery::Batch(batch(0, &content));
        let whole = [
            bytes(&first, &content, Some((&keys, 0))),
            bytes(&Delivery::CaughtUp { next: 1 }, &[], Some((&keys, 1))),
        ]
        .concat();
        let mut deliveries = Deliveries::new(1024, Some(Arc::clone(&keys)));
        let arrived = feed(&mut deliveries, &whole, &[1], u64::MAX).unwrap();
        assert_eq!(shown(&arrived), ["0 14 true", "CaughtUp { next: 1 }"]);
        // Another key, a changed payload, one removed.
        let other = Arc::new(PacketKeys::new(&[4; 32]));
        let mut changed = whole.clone();
        changed[HEAD_LEN + 5] ^= 1;
        let removed = whole[HEAD_LEN + content.len()..].to_vec();
        for (keys, sent, batch) in [
            (&other, &whole, Some(0)),
            (&keys, &changed, Some(0)),
            (&keys, &removed, None),
        ] {
            let mut deliveries = Deliveries::new(1024, Some(Arc::clone(keys)));
            let refused = feed(&mut deliveries, sent, &[1000], u64::MAX).unwrap_err();
            assert_eq!(refused, BadDelivery::Forged { batch });
        }
    }

    proptest! {
        #[test]
        fn deliveries_do_not_depend_on_how_their_bytes_arrive(lens in prop::collection::vec(0..3000usize, 0..8), pieces in prop::collection::vec(1..2000usize, 1..5), sealed: bool, flip in 0..20usize) {
            let keys = Arc::new(PacketKeys::new(&[3; 32]));
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            let mut send = |delivery: &Delivery, body: &[u8], number| {
                stream.extend(bytes(delivery, body, sealed.then_some((&*keys, number))));
            };
            for (index, len) in lens.iter().enumerate() {
                let content = payload(*len);
                let mut info = batch(index as u64, &content);
                let intact = index != flip;
                info.checksum ^= u32::from(!intact);
                send(&Delivery::Batch(info), &content, index as u64);
                expected.push(format!("{index} {} {intact}", content.len()));
            }
            let text = b"the end";
            let error = Delivery::Error { code: 4, text_len: text.len() };
            send(&error, text, lens.len() as u64);
            expected.push("error the end".to_owned());
            let mut deliveries = Deliveries::new(4096, sealed.then_some(keys));
            let arrived = feed(&mut deliveries, &stream, &pieces, u64::MAX).unwrap();
            prop_assert_eq!(shown(&arrived), expected);
            prop_assert_eq!(deliveries.received(), stream.len() as u64);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..500), pieces in prop::collection::vec(1..100usize, 1..5)) {
            let _ = feed(&mut Deliveries::new(4096, None), &bytes, &pieces, u64::MAX);
        }
    }
}
