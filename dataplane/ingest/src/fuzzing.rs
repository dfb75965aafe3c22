//! Handshakes and frames of connections, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by a test
//! over its corpora.

use penstock_auth::{Grants, Initiator, Key, respond};
use penstock_wire::auth_handshake::{AUTH_INIT_LEN, SEAL_LEN, SEALED_HELLO_LEN};
use penstock_wire::batch;
use penstock_wire::handshake::{MAX_TOPIC_LEN, WELCOME_LEN, Welcome};
use penstock_wire::message::{Messages, encoded_len};
use penstock_wire::reply::{REPLY_LEN, Reply};
use zerocopy::{FromBytes, IntoBytes};

use crate::session::handshake::{ServerHandshake, Step};

/// Input of connections: hello, welcome, batch header, reply, and messages inside a batch.
pub fn framing(data: &[u8]) {
    let mut handshake = ServerHandshake::new();
    let mut rest = data;
    while !rest.is_empty() {
        let buffer = handshake.missing();
        assert!(!buffer.is_empty());
        // In pieces, as a network may deliver them.
        let len = buffer.len().min(rest.len()).min(13);
        buffer[..len].copy_from_slice(&rest[..len]);
        rest = &rest[len..];
        match handshake.advance(len, None) {
            Ok(Step::NeedMore) => {}
            Ok(Step::Send(_)) => unreachable!("there are no keys"),
            Ok(Step::Open(_, topic)) => {
                assert!((1..=MAX_TOPIC_LEN).contains(&topic.len()));
                assert!(!topic.starts_with('.') && !topic.contains('/'));
                break;
            }
            Err(_) => break,
        }
    }
    if let Some(bytes) = data.first_chunk::<WELCOME_LEN>() {
        let welcome = Welcome::read_from_bytes(bytes).expect("plain bytes");
        let _ = welcome.parse();
    }
    if let Some(bytes) = data.first_chunk::<{ batch::HEADER_LEN }>() {
        let header = batch::Header::read_from_bytes(bytes).expect("plain bytes");
        if let Ok(batch::Frame::Batch(batch)) = header.parse(1 << 20) {
            assert!((1..=1 << 20).contains(&batch.payload_len) && batch.messages > 0);
        }
    }
    if let Some(bytes) = data.first_chunk::<REPLY_LEN>() {
        let reply = Reply::read_from_bytes(bytes).expect("plain bytes");
        if reply.parse().is_ok() {
            assert_eq!(reply.as_bytes().len(), REPLY_LEN);
        }
    }
    let whole = Messages::new(data).map_while(Result::ok);
    let total: usize = whole.map(|message| encoded_len(message.len())).sum();
    assert!(total <= data.len());
}

/// Input of a publisher without a key to a broker with keys, and key files. The first byte is an offset in a
/// valid handshake; the other bytes overwrite the handshake from there on.
pub fn opening(data: &[u8]) {
    let _ = Grants::parse("keys".as_ref(), &String::from_utf8_lossy(data));
    let Some((at, bytes)) = data.split_first() else {
        return;
    };
    let key = Key::new(&[1; 32]);
    let line = format!("one {} *", "01".repeat(32));
    let grants = Grants::parse("keys".as_ref(), &line).expect("a good line");
    let (publisher, init) = Initiator::start(&key).expect("random numbers");
    let (_, answer) = respond(&key, &init).expect("the same key");
    let mut channel = publisher.finish(&answer).expect("the same key");
    let hello = channel.seal(&[0; SEALED_HELLO_LEN - SEAL_LEN]);
    let mut sent = [init.as_bytes(), &hello].concat();
    let covered = sent.iter_mut().skip(usize::from(*at)).zip(bytes);
    covered.for_each(|(byte, other)| *byte = *other);

    let mut handshake = ServerHandshake::new();
    let mut rest = &sent[..];
    while !rest.is_empty() {
        let buffer = handshake.missing();
        let len = buffer.len().min(rest.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        rest = &rest[len..];
        match handshake.advance(len, Some(&grants)) {
            Ok(Step::NeedMore) => {}
            // The first message alone may be a recorded one; what follows belongs to another handshake.
            Ok(Step::Send(_)) => assert_eq!(sent[..AUTH_INIT_LEN], *init.as_bytes()),
            Ok(Step::Open(..)) => panic!("opened without a key"),
            Err(_) => return,
        }
        assert!(handshake.grant().is_none());
    }
}

#[cfg(test)]
mod tests {
    use penstock_fuzz_replay::replay;

    #[test]
    fn kept_and_mutated_frames() {
        replay("framing", 2000, super::framing);
    }

    #[test]
    fn kept_and_mutated_openings() {
        replay("opening", 200, super::opening);
    }
}
