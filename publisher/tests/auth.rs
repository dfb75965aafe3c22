//! The library with a key, against brokers that hold it, do not, or pretend.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use penstock_auth::{Channel, Key, PacketKeys, respond};
use penstock_publisher::{Config, Error, Publisher};
use penstock_wire::auth_handshake::{
    AUTH_INIT_LEN, AuthInit, SEALED_HELLO_LEN, SealedHello, SealedWelcome,
};
use penstock_wire::batch::{Frame, HEADER_LEN, Header};
use penstock_wire::handshake::{Offer, Refusal, Welcome};
use penstock_wire::packet::TAG_LEN;
use penstock_wire::reply;
use zerocopy::{FromBytes, IntoBytes};

const OFFER: Offer = Offer {
    session: 0x5e55,
    max_payload: 1 << 20,
    committed: 0,
    datagrams: None,
};

fn key(byte: u8) -> Key {
    Key::new(&[byte; 32])
}

/// Plays a broker that takes one connection; returns its address.
fn broker<T: Send + 'static>(
    play: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (String, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (
        address,
        thread::spawn(move || play(listener.accept().unwrap().0)),
    )
}

fn config(address: String) -> Config {
    Config {
        key: Some(key(1)),
        timeout: Duration::from_secs(20),
        ..Config::new([address], "t")
    }
}

fn read_init(socket: &mut TcpStream) -> AuthInit {
    let mut bytes = [0; AUTH_INIT_LEN];
    socket.read_exact(&mut bytes).unwrap();
    AuthInit::read_from_bytes(&bytes).unwrap()
}

/// Answers an [`AuthInit`] as a holder of the key does; returns the topic that is asked for.
fn shake_hands(socket: &mut TcpStream) -> (Channel, String) {
    let (mut channel, answer) = respond(&key(1), &read_init(socket)).unwrap();
    socket.write_all(answer.as_bytes()).unwrap();
    let mut question = [0; SEALED_HELLO_LEN];
    socket.read_exact(&mut question).unwrap();
    let question = channel.open(&question).unwrap();
    let question = SealedHello::read_from_bytes(&question).unwrap();
    let topic = question.parse().unwrap().1.to_owned();
    (channel, topic)
}

fn seal(channel: &mut Channel, welcome: &[u8]) -> Vec<u8> {
    channel.seal(SealedWelcome::new(welcome.try_into().unwrap()).as_bytes())
}

#[test]
fn a_stream_is_opened_with_a_broker_that_holds_the_key() {
    let (address, played) = broker(|mut socket| {
        let (mut channel, topic) = shake_hands(&mut socket);
        let sealed = seal(&mut channel, Welcome::accept(OFFER).as_bytes());
        socket.write_all(&sealed).unwrap();
        let mut header = [0; HEADER_LEN];
        socket.read_exact(&mut header).unwrap();
        let frame = Header::read_from_bytes(&header).unwrap().parse(1 << 20);
        (topic, matches!(frame, Ok(Frame::Batch(_))))
    });
    let mut publisher = Publisher::connect(Config {
        timeout: Duration::from_millis(200),
        ..config(address)
    })
    .unwrap();
    publisher.publish(b"first").unwrap();
    // The broker leaves without an ack, and does not come back.
    publisher.close().unwrap_err();
    assert_eq!(played.join().unwrap(), ("t".to_owned(), true));
}

/// Accepts a stream whose frames carry tags, and takes its first batch.
fn take_sealed_batch(socket: &mut TcpStream) -> PacketKeys {
    let (mut channel, _) = shake_hands(socket);
    let mut answer = SealedWelcome::new(Welcome::accept(OFFER).as_bytes().try_into().unwrap());
    answer.packets = [7; 32];
    let sealed = channel.seal(answer.as_bytes());
    socket.write_all(&sealed).unwrap();
    let keys = PacketKeys::new(&[7; 32]);
    let mut header = [0; HEADER_LEN];
    socket.read_exact(&mut header).unwrap();
    let mut tag = [0; TAG_LEN];
    socket.read_exact(&mut tag).unwrap();
    let Ok(Frame::Batch(batch)) = Header::read_from_bytes(&header).unwrap().parse(1 << 20) else {
        panic!("no batch")
    };
    let mut payload = vec![0; batch.payload_len as usize];
    socket.read_exact(&mut payload).unwrap();
    assert!(keys.verify_frame(0, &tag, &[&header, &payload]));
    keys
}

#[test]
fn with_packet_auth_frames_carry_tags_over_tcp_as_well() {
    let (address, played) = broker(|mut socket| {
        let keys = take_sealed_batch(&mut socket);
        let ack = reply::Reply::ack(1, false);
        let tag = keys.seal_reply(0, &[ack.as_bytes()]);
        socket.write_all(&[ack.as_bytes(), &tag].concat()).unwrap();
        let mut end = [0; HEADER_LEN + TAG_LEN];
        socket.read_exact(&mut end).unwrap();
        let (header, tag) = end.split_at(HEADER_LEN);
        assert!(keys.verify_frame(1, tag.try_into().unwrap(), &[header]));
        let tag = keys.seal_reply(1, &[ack.as_bytes()]);
        socket.write_all(&[ack.as_bytes(), &tag].concat()).unwrap();
    });
    let mut publisher = Publisher::connect(Config {
        packet_auth: true,
        ..config(address)
    })
    .unwrap();
    publisher.publish(b"pay alice 1").unwrap();
    assert_eq!(publisher.close().unwrap().messages_acked, 1);
    played.join().unwrap();
}

#[test]
fn an_ack_that_somebody_else_wrote_acknowledges_nothing() {
    let (address, _) = broker(|mut socket| {
        take_sealed_batch(&mut socket);
        let ack = reply::Reply::ack(1, false);
        let tag = PacketKeys::new(&[8; 32]).seal_reply(0, &[ack.as_bytes()]);
        socket.write_all(&[ack.as_bytes(), &tag].concat()).unwrap();
        // Until the publisher closes.
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let mut publisher = Publisher::connect(Config {
        packet_auth: true,
        ..config(address)
    })
    .unwrap();
    let progress = publisher.progress();
    publisher.publish(b"pay alice 1").unwrap();
    let error = publisher.close().unwrap_err();
    assert!(matches!(error, Error::Forged { .. }), "{error}");
    assert_eq!(progress.messages_acked(), 0);
}

#[test]
fn a_broker_that_does_not_authenticate_payload_is_sent_none() {
    let (address, _) = broker(|mut socket| {
        let (mut channel, _) = shake_hands(&mut socket);
        let sealed = seal(&mut channel, Welcome::accept(OFFER).as_bytes());
        socket.write_all(&sealed).unwrap();
    });
    let asked = Publisher::connect(Config {
        packet_auth: true,
        ..config(address)
    });
    let said = asked.map(|_| ()).unwrap_err();
    assert!(matches!(said, Error::NotAuthenticated { .. }), "{said}");
}

#[test]
fn a_sealed_refusal_is_told() {
    let (address, _) = broker(|mut socket| {
        let (mut channel, _) = shake_hands(&mut socket);
        let refusal = Welcome::refuse(Refusal::Permission, "not this topic");
        let (welcome, text) = refusal.split_at(refusal.len() - 14);
        let sealed = [seal(&mut channel, welcome), channel.seal(text)].concat();
        socket.write_all(&sealed).unwrap();
    });
    let Err(Error::Refused { code, text, .. }) = Publisher::connect(config(address)) else {
        panic!("not refused")
    };
    assert_eq!(
        (code, text.as_str()),
        (Refusal::Permission as u16, "not this topic")
    );
}

#[test]
fn a_refusal_before_the_handshake_is_told() {
    let (address, _) = broker(|mut socket| {
        read_init(&mut socket);
        let refusal = Welcome::refuse(Refusal::Authentication, "no such key");
        socket.write_all(&refusal).unwrap();
    });
    let said = Publisher::connect(config(address)).map(|_| ()).unwrap_err();
    assert!(said.to_string().contains("no such key"), "{said}");
}

#[test]
fn an_acceptance_without_the_key_is_refused_and_nothing_is_told_to_it() {
    let (address, played) = broker(|mut socket| {
        read_init(&mut socket);
        socket.write_all(Welcome::accept(OFFER).as_bytes()).unwrap();
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).unwrap();
        rest
    });
    let said = Publisher::connect(config(address)).map(|_| ()).unwrap_err();
    assert!(matches!(said, Error::Stripped { .. }), "{said}");
    assert_eq!(played.join().unwrap(), b"");
}

#[test]
fn a_broker_with_another_key_is_told_nothing() {
    let (address, played) = broker(|mut socket| {
        // It answers whatever it is told, with the key that it has.
        read_init(&mut socket);
        let (_, own) = penstock_auth::Initiator::start(&key(2)).unwrap();
        let (_, answer) = respond(&key(2), &own).unwrap();
        socket.write_all(answer.as_bytes()).unwrap();
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).unwrap();
        rest
    });
    let said = Publisher::connect(config(address)).map(|_| ()).unwrap_err();
    assert!(matches!(said, Error::Unproven { .. }), "{said}");
    assert_eq!(played.join().unwrap(), b"");
}

#[test]
fn a_changed_answer_is_noticed() {
    let (address, _) = broker(|mut socket| {
        let (mut channel, _) = shake_hands(&mut socket);
        let mut sealed = seal(&mut channel, Welcome::accept(OFFER).as_bytes());
        sealed[20] ^= 1;
        socket.write_all(&sealed).unwrap();
    });
    let said = Publisher::connect(config(address)).map(|_| ()).unwrap_err();
    assert!(matches!(said, Error::Unproven { .. }), "{said}");
}
