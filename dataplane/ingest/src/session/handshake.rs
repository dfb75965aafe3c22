//! The handshake of one connection, as a state machine without I/O. It takes exactly the bytes that belong to it,
//! so that the first frame is still in the socket when a worker gets it.
//!
//! Without keys the hello is plain text. With keys the publisher starts with an AuthInit, and has to prove that
//! it holds a key before the broker does anything for it; see [`penstock_auth`].

use std::sync::Arc;

use penstock_auth::{AuthError, Channel, Grant, Grants, respond};
use penstock_wire::MAGIC;
use penstock_wire::auth_handshake::{
    AUTH_INIT_LEN, AUTH_MAGIC, AuthHandshakeError, AuthInit, SEALED_HELLO_LEN, SealedHello,
    SealedWelcome,
};
use penstock_wire::handshake::{
    BadTopic, HELLO_LEN, Hello, HelloError, Purpose, Refusal, WELCOME_LEN, check_topic,
};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Length of the longest message of a handshake, bytes.
const MAX_MESSAGE_LEN: usize = SEALED_HELLO_LEN;

/// The broker's side of a handshake.
#[derive(Debug)]
pub(crate) struct ServerHandshake {
    buffer: [u8; MAX_MESSAGE_LEN],
    filled: usize,
    /// End of the current message in the buffer.
    end: usize,
    stage: Stage,
}

/// The message that is being received.
#[derive(Debug)]
enum Stage {
    /// The first bytes, which determine what follows.
    Magic,
    Hello,
    Topic(Purpose),
    AuthInit,
    SealedHello(Box<Authenticated>),
    /// None: the handshake is complete.
    Complete(Option<Box<Authenticated>>),
}

/// A publisher that started the handshake with a key. It has proved that it holds the key once its hello is
/// opened.
#[derive(Debug)]
struct Authenticated {
    channel: Channel,
    grant: Arc<Grant>,
    packet_auth: bool,
}

/// The next step after received bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Receive more.
    NeedMore,
    /// Send these bytes, then receive more.
    Send(Vec<u8>),
    /// The peer opens the connection for this purpose, on this topic.
    Open(Purpose, String),
}

/// The peer sent something other than a valid hello.
#[derive(Debug, Error)]
pub(crate) enum HandshakeError {
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error(transparent)]
    Topic(#[from] BadTopic),
    #[error(transparent)]
    Auth(AuthHandshakeError),
    #[error("it has no key")]
    KeyNeeded,
    #[error("it has a key; this broker was started without --auth-keys")]
    NoKeys,
    #[error("its key is not one of --auth-keys")]
    UnknownKey,
    #[error("it knows the number of key {0}, but does not hold it")]
    NotHeld(String),
    #[error("it repeats or changes what another peer sent with key {0}")]
    Repeated(String),
}

impl HandshakeError {
    /// The code for the peer; none for a peer that does not speak this protocol.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Hello(error) | Self::Auth(AuthHandshakeError::Hello(error)) => error.refusal(),
            Self::Topic(_) | Self::Auth(AuthHandshakeError::Topic(_)) => Some(Refusal::Topic),
            Self::Auth(AuthHandshakeError::Version { .. }) => Some(Refusal::Version),
            Self::Auth(AuthHandshakeError::Reserved) => Some(Refusal::Unsupported),
            Self::KeyNeeded
            | Self::NoKeys
            | Self::UnknownKey
            | Self::NotHeld(_)
            | Self::Repeated(_) => Some(Refusal::Authentication),
        }
    }

    /// The text for the peer, which does not reveal which keys exist.
    pub(crate) fn peer_text(&self) -> String {
        match self {
            Self::KeyNeeded => {
                "this broker takes publishers with a key only: use --auth-key with a file that its owner gave you".to_owned()
            }
            Self::NoKeys => {
                "this broker was started without keys: leave --auth-key out, or have it started with --auth-keys".to_owned()
            }
            Self::UnknownKey | Self::NotHeld(_) | Self::Repeated(_) => {
                "this broker does not accept the key: compare the publisher's --auth-key file with the broker's --auth-keys file".to_owned()
            }
            _ => self.to_string(),
        }
    }
}

impl ServerHandshake {
    pub(crate) fn new() -> Self {
        Self {
            buffer: [0; MAX_MESSAGE_LEN],
            filled: 0,
            end: MAGIC.len(),
            stage: Stage::Magic,
        }
    }

    /// Buffer for the next bytes, which never exceed the handshake.
    pub(crate) fn missing(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..self.end]
    }

    /// Processes `len` bytes that were written to the buffer from [`Self::missing`]. Without `grants` anyone
    /// may publish.
    pub(crate) fn advance(
        &mut self,
        len: usize,
        grants: Option<&Grants>,
    ) -> Result<Step, HandshakeError> {
        self.filled += len;
        if matches!(self.stage, Stage::Magic) {
            self.check_magic()?;
        }
        if self.filled < self.end {
            return Ok(Step::NeedMore);
        }
        match std::mem::replace(&mut self.stage, Stage::Complete(None)) {
            Stage::Magic => {
                if self.buffer[..MAGIC.len()] == AUTH_MAGIC {
                    (self.stage, self.end) = (Stage::AuthInit, AUTH_INIT_LEN);
                } else {
                    (self.stage, self.end) = (Stage::Hello, HELLO_LEN);
                }
                Ok(Step::NeedMore)
            }
            Stage::Hello => {
                let hello = Hello::ref_from_bytes(&self.buffer[..HELLO_LEN]);
                let (topic_len, purpose) = hello.expect("a hello is plain bytes").parse()?;
                if grants.is_some() {
                    return Err(HandshakeError::KeyNeeded);
                }
                (self.stage, self.end) = (Stage::Topic(purpose), HELLO_LEN + topic_len);
                Ok(Step::NeedMore)
            }
            Stage::Topic(purpose) => {
                let topic = check_topic(&self.buffer[HELLO_LEN..self.end])?;
                Ok(Step::Open(purpose, topic.to_owned()))
            }
            Stage::AuthInit => self.answer_init(grants),
            Stage::SealedHello(authenticated) => self.open_hello(authenticated),
            Stage::Complete(_) => unreachable!("the handshake is complete"),
        }
    }

    fn check_magic(&self) -> Result<(), HandshakeError> {
        let so_far = &self.buffer[..self.filled];
        if Hello::may_start_with(so_far) || AuthInit::may_start_with(so_far) {
            return Ok(());
        }
        let mut first = [0; MAGIC.len()];
        first[..so_far.len()].copy_from_slice(so_far);
        Err(HelloError::Magic(first).into())
    }

    fn answer_init(&mut self, grants: Option<&Grants>) -> Result<Step, HandshakeError> {
        let init = AuthInit::ref_from_bytes(&self.buffer[..AUTH_INIT_LEN]).expect("plain bytes");
        let (_, id, _) = init.parse().map_err(HandshakeError::Auth)?;
        let grants = grants.ok_or(HandshakeError::NoKeys)?;
        let (grant, key) = grants.find(id);
        let responded = respond(key, init);
        let grant = grant.ok_or(HandshakeError::UnknownKey)?;
        let (channel, answer) =
            responded.map_err(|_: AuthError| HandshakeError::NotHeld(grant.name.clone()))?;
        self.stage = Stage::SealedHello(Box::new(Authenticated {
            channel,
            grant: Arc::clone(grant),
            packet_auth: false,
        }));
        (self.filled, self.end) = (0, SEALED_HELLO_LEN);
        Ok(Step::Send(answer.as_bytes().to_vec()))
    }

    fn open_hello(
        &mut self,
        mut authenticated: Box<Authenticated>,
    ) -> Result<Step, HandshakeError> {
        let Ok(opened) = authenticated.channel.open(&self.buffer[..SEALED_HELLO_LEN]) else {
            return Err(HandshakeError::Repeated(authenticated.grant.name.clone()));
        };
        let hello = SealedHello::ref_from_bytes(&opened).expect("it has this length");
        let parsed = hello.parse();
        authenticated.packet_auth = matches!(parsed, Ok((_, _, true)));
        // From now on refusals are sealed as well.
        self.stage = Stage::Complete(Some(authenticated));
        let (purpose, topic, _) = parsed.map_err(HandshakeError::Auth)?;
        Ok(Step::Open(purpose, topic.to_owned()))
    }

    /// The key that the publisher has proved to hold, if any.
    pub(crate) fn grant(&self) -> Option<&Arc<Grant>> {
        match &self.stage {
            Stage::Complete(Some(authenticated)) => Some(&authenticated.grant),
            _ => None,
        }
    }

    /// Whether the publisher wants its packets authenticated.
    pub(crate) fn wants_packet_auth(&self) -> bool {
        matches!(&self.stage, Stage::Complete(Some(authenticated)) if authenticated.packet_auth)
    }

    /// The bytes of an answer: a Welcome and its text. If the publisher has proved its key, the answer is
    /// sealed and carries the secret of the stream's packets.
    pub(crate) fn seal(&mut self, answer: Vec<u8>, packets: [u8; 32]) -> Vec<u8> {
        let Stage::Complete(Some(authenticated)) = &mut self.stage else {
            return answer;
        };
        let (welcome, text) = answer.split_at(WELCOME_LEN);
        let welcome = SealedWelcome {
            packets,
            ..SealedWelcome::new(welcome.try_into().expect("split at its length"))
        };
        let mut sealed = authenticated.channel.seal(welcome.as_bytes());
        if !text.is_empty() {
            sealed.extend(authenticated.channel.seal(text));
        }
        sealed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_auth::{Initiator, Key};
    use penstock_wire::auth_handshake::{
        AUTH_RESPONSE_LEN, AuthResponse, SEAL_LEN, SEALED_WELCOME_LEN,
    };
    use penstock_wire::handshake::{AckLevel, Answer, OrderLevel, Path, Request, Welcome};
    use proptest::prelude::*;

    /// For the only stream of a new session, over tcp.
    fn request() -> Request {
        Request {
            session: 0,
            stream: 0,
            streams: 1,
            ack: AckLevel::Committed,
            order: OrderLevel::PerStream,
            max_payload: 4096,
            path: Path::Tcp,
            resume_from: None,
            max_datagram: 0,
        }
    }

    fn key(byte: u8) -> Key {
        Key::new(&[byte; 32])
    }

    /// Key 1 may publish to `t` and to topics that begin with `a`, key 2 to `other`.
    fn grants() -> Grants {
        let (one, two) = ("01".repeat(32), "02".repeat(32));
        let text = format!("one {one} t a*\ntwo {two} other\n");
        Grants::parse("keys".as_ref(), &text).unwrap()
    }

    fn plain(topic: &str) -> Vec<u8> {
        let hello = Hello::new(&request(), topic.len());
        [hello.as_bytes(), topic.as_bytes()].concat()
    }

    /// Feeds bytes in pieces until there is a step other than [`Step::NeedMore`]; returns the number of bytes
    /// taken, and the step.
    fn feed(
        handshake: &mut ServerHandshake,
        bytes: &[u8],
        grants: Option<&Grants>,
        mut piece: impl FnMut() -> usize,
    ) -> (usize, Result<Step, HandshakeError>) {
        let mut at = 0;
        while at < bytes.len() {
            let buffer = handshake.missing();
            let len = buffer.len().min(piece()).min(bytes.len() - at);
            buffer[..len].copy_from_slice(&bytes[at..at + len]);
            at += len;
            match handshake.advance(len, grants) {
                Ok(Step::NeedMore) => {}
                other => return (at, other),
            }
        }
        (at, Ok(Step::NeedMore))
    }

    fn whole(bytes: &[u8], grants: Option<&Grants>) -> Result<Step, HandshakeError> {
        feed(&mut ServerHandshake::new(), bytes, grants, || usize::MAX).1
    }

    /// Runs a handshake with a key up to the request; returns the broker's and the publisher's end.
    fn requested(
        grants: &Grants,
        key: &Key,
        topic: &str,
        mut piece: impl FnMut() -> usize,
    ) -> (ServerHandshake, Channel) {
        let mut handshake = ServerHandshake::new();
        let (publisher, init) = Initiator::start(key).unwrap();
        let (taken, step) = feed(&mut handshake, init.as_bytes(), Some(grants), &mut piece);
        let Ok(Step::Send(answer)) = step else {
            panic!("{step:?}")
        };
        assert_eq!((taken, answer.len()), (AUTH_INIT_LEN, AUTH_RESPONSE_LEN));
        assert!(handshake.grant().is_none(), "it has proved nothing yet");
        let answer = AuthResponse::read_from_bytes(&answer).unwrap();
        let mut channel = publisher.finish(&answer).unwrap();
        let hello = SealedHello::new(&Purpose::Publish(request()), topic, false).unwrap();
        let mut bytes = channel.seal(hello.as_bytes());
        let len = bytes.len();
        bytes.extend_from_slice(b"first frame");
        let (taken, step) = feed(&mut handshake, &bytes, Some(grants), piece);
        assert_eq!(taken, len);
        assert_eq!(
            step.unwrap(),
            Step::Open(Purpose::Publish(request()), topic.to_owned())
        );
        (handshake, channel)
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_and_leaves_the_frames(topic in "[a-z]{1,128}", pieces in prop::collection::vec(1usize..60, 1..200)) {
            let mut bytes = plain(&topic);
            let len = bytes.len();
            bytes.extend_from_slice(b"first frame");
            let mut pieces = pieces.into_iter().cycle();
            let (taken, step) = feed(&mut ServerHandshake::new(), &bytes, None, || pieces.next().unwrap());
            prop_assert_eq!(taken, len);
            prop_assert_eq!(step.unwrap(), Step::Open(Purpose::Publish(request()), topic));
        }

        #[test]
        fn any_split_of_a_sealed_hello_gives_the_same(topic in "[a-z]{1,128}", pieces in prop::collection::vec(1usize..60, 1..200)) {
            let mut pieces = pieces.into_iter().cycle();
            let (handshake, _) = requested(&grants(), &key(1), &topic, || pieces.next().unwrap());
            prop_assert_eq!(&handshake.grant().unwrap().name, "one");
        }

        #[test]
        fn arbitrary_bytes_open_nothing(mut bytes in prop::collection::vec(any::<u8>(), 0..300), magic in 0..3) {
            if magic > 0 && bytes.len() > 8 {
                bytes[..4].copy_from_slice(if magic == 1 { &MAGIC } else { &AUTH_MAGIC });
                bytes[4..8].copy_from_slice(&[1, 0, 0, 0]);
            }
            let step = whole(&bytes, Some(&grants()));
            prop_assert!(!matches!(step, Ok(Step::Send(_) | Step::Open(..))));
        }
    }

    #[test]
    fn garbage_is_recognised_by_its_first_byte() {
        let (taken, step) = feed(
            &mut ServerHandshake::new(),
            b"GET / HTTP/1.1\r\n",
            None,
            || 1,
        );
        assert_eq!(taken, 1);
        let error = step.unwrap_err();
        assert!(error.refusal().is_none());
        assert!(error.to_string().contains("not a Penstock publisher"));
    }

    #[test]
    fn a_handshake_cut_short_at_any_length_opens_nothing() {
        let grants = grants();
        let (_, init) = Initiator::start(&key(1)).unwrap();
        for len in 0..AUTH_INIT_LEN {
            let step = whole(&init.as_bytes()[..len], Some(&grants));
            assert_eq!(step.unwrap(), Step::NeedMore, "{len}");
        }
        let mut handshake = ServerHandshake::new();
        let (publisher, init) = Initiator::start(&key(1)).unwrap();
        let Ok(Step::Send(answer)) = feed(&mut handshake, init.as_bytes(), Some(&grants), || 99).1
        else {
            panic!("no answer")
        };
        let answer = AuthResponse::read_from_bytes(&answer).unwrap();
        let mut channel = publisher.finish(&answer).unwrap();
        let hello = channel.seal(
            SealedHello::new(&Purpose::Publish(request()), "t", false)
                .unwrap()
                .as_bytes(),
        );
        let mut steps = hello.iter().map(|byte| {
            handshake.missing()[0] = *byte;
            handshake.advance(1, Some(&grants)).unwrap()
        });
        let before = steps.by_ref().take(hello.len() - 1);
        assert!(before.into_iter().all(|step| step == Step::NeedMore));
        assert!(matches!(steps.next(), Some(Step::Open(..))));
    }

    #[test]
    fn every_publisher_without_the_key_gets_the_same_text() {
        let grants = grants();
        let (_, unknown) = Initiator::start(&key(9)).unwrap();
        let unknown = whole(unknown.as_bytes(), Some(&grants)).unwrap_err();
        assert!(matches!(unknown, HandshakeError::UnknownKey), "{unknown:?}");
        // A peer that saw the id of a key on the wire.
        let (_, other) = Initiator::start(&key(9)).unwrap();
        let mut bytes = other.as_bytes().to_vec();
        bytes[8..24].copy_from_slice(key(1).id());
        let not_held = whole(&bytes, Some(&grants)).unwrap_err();
        assert!(matches!(&not_held, HandshakeError::NotHeld(name) if name == "one"));
        // A peer that recorded a whole handshake.
        let (publisher, init) = Initiator::start(&key(1)).unwrap();
        let (mut channel, _) = {
            let (_, answer) = respond(&key(1), &init).unwrap();
            (publisher.finish(&answer).unwrap(), ())
        };
        let hello = channel.seal(
            SealedHello::new(&Purpose::Publish(request()), "t", false)
                .unwrap()
                .as_bytes(),
        );
        let mut handshake = ServerHandshake::new();
        let step = feed(&mut handshake, init.as_bytes(), Some(&grants), || 99).1;
        assert!(matches!(step, Ok(Step::Send(_))), "{step:?}");
        let repeated = feed(&mut handshake, &hello, Some(&grants), || 999)
            .1
            .unwrap_err();
        assert!(
            matches!(repeated, HandshakeError::Repeated(_)),
            "{repeated:?}"
        );
        for error in [&unknown, &not_held, &repeated] {
            assert_eq!(error.refusal(), Some(Refusal::Authentication));
            assert_eq!(error.peer_text(), unknown.peer_text());
            assert!(!error.peer_text().contains("one"), "{}", error.peer_text());
        }
    }

    #[test]
    fn a_broker_with_keys_refuses_a_plain_hello() {
        let error = whole(&plain("t"), Some(&grants())).unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::Authentication));
        assert!(
            error.peer_text().contains("--auth-key"),
            "{}",
            error.peer_text()
        );
        // A broker without keys refuses a handshake with one.
        let (_, init) = Initiator::start(&key(1)).unwrap();
        let error = whole(init.as_bytes(), None).unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::Authentication));
        assert!(
            error.peer_text().contains("without keys"),
            "{}",
            error.peer_text()
        );
    }

    #[test]
    fn answers_are_sealed_only_after_the_key_is_proved() {
        let refusal = Welcome::refuse(Refusal::Topic, "no more topics");
        assert_eq!(
            ServerHandshake::new().seal(refusal.clone(), [0; 32]),
            refusal
        );
        let (mut handshake, mut channel) = requested(&grants(), &key(2), "t", || 999);
        assert!(!handshake.grant().unwrap().permits("t"));
        let sealed = handshake.seal(refusal, [0; 32]);
        let (reply, text) = sealed.split_at(SEALED_WELCOME_LEN);
        let reply = channel.open(reply).unwrap();
        let welcome = Welcome::read_from_prefix(&reply).unwrap().0;
        let text_len = b"no more topics".len();
        assert_eq!(welcome.parse(), Ok(Answer::Refused { code: 3, text_len }));
        assert_eq!(text.len(), text_len + SEAL_LEN);
        assert_eq!(channel.open(text).unwrap(), b"no more topics");
    }
}
