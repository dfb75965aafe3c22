//! Plays brokers, and makes publishers for them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use penstock_publisher::{Config, Error, Publisher};
use penstock_wire::batch::{Batch, Frame, HEADER_LEN, Header};
use penstock_wire::handshake::{AckLevel, HELLO_LEN, Hello, Offer, Request, Welcome};
use penstock_wire::message::Messages;
use penstock_wire::reply::Reply;
use zerocopy::{FromBytes, IntoBytes};

pub const MAX_PAYLOAD: u32 = 1 << 20;
pub const SESSION: u64 = 0x5e55;
/// How long a publisher tries to go on where a test has it fail.
pub const BRIEF: Duration = Duration::from_millis(200);
/// Longer than anything here takes; a test that waits for it has failed anyhow.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// The broker's end of one stream, after the Hello.
pub struct Peer {
    pub socket: TcpStream,
    pub topic: String,
    pub request: Request,
}

impl Peer {
    pub fn accept(listener: &TcpListener) -> Self {
        Self::of(listener.accept().unwrap().0)
    }

    fn of(mut socket: TcpStream) -> Self {
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut hello = [0; HELLO_LEN];
        socket.read_exact(&mut hello).unwrap();
        let (topic_len, purpose) = Hello::read_from_bytes(&hello).unwrap().parse().unwrap();
        let request = purpose.into_request().unwrap();
        let mut topic = vec![0; topic_len];
        socket.read_exact(&mut topic).unwrap();
        let topic = String::from_utf8(topic).unwrap();
        Self {
            socket,
            topic,
            request,
        }
    }

    /// The next stream, unless the connection is closed before it asks for one, as that of a probe.
    pub fn accept_stream(listener: &TcpListener) -> Self {
        loop {
            let (socket, _) = listener.accept().unwrap();
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
            if matches!(socket.peek(&mut [0]), Ok(1)) {
                return Self::of(socket);
            }
        }
    }

    pub fn welcome(&mut self) {
        self.welcome_back(0);
    }

    /// Accepts a stream that is resumed after `committed` batches.
    pub fn welcome_back(&mut self, committed: u64) {
        self.welcome_as(SESSION, committed);
    }

    /// Accepts a stream of this session; the next batch is `committed`, and earlier ones may be elsewhere.
    pub fn welcome_as(&mut self, session: u64, committed: u64) {
        let offer = Offer {
            session,
            max_payload: MAX_PAYLOAD,
            committed,
            datagrams: None,
        };
        self.say(Welcome::accept(offer).as_bytes());
    }

    pub fn accept_welcome(listener: &TcpListener) -> Self {
        let mut peer = Self::accept(listener);
        peer.welcome();
        peer
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Acknowledges each batch, then calls `acked` with the number of batches; returns the number of
    /// messages once the stream has ended.
    pub fn ack_all(&mut self, mut acked: impl FnMut(u64)) -> usize {
        let mut count = 0;
        for committed in 1.. {
            let Frame::Batch(batch) = self.frame() else {
                self.ack(committed - 1);
                break;
            };
            count += self.messages(&batch).len();
            self.ack(committed);
            acked(committed);
        }
        count
    }

    pub fn ack(&mut self, committed: u64) {
        self.say(Reply::ack(committed, false).as_bytes());
    }

    pub fn frame(&mut self) -> Frame {
        let mut header = [0; HEADER_LEN];
        self.socket.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        header.parse(MAX_PAYLOAD).unwrap()
    }

    pub fn messages(&mut self, batch: &Batch) -> Vec<Vec<u8>> {
        let mut payload = vec![0; batch.payload_len as usize];
        self.socket.read_exact(&mut payload).unwrap();
        let messages: Vec<_> = Messages::new(&payload)
            .map(|message| message.unwrap().to_vec())
            .collect();
        assert_eq!(messages.len(), batch.messages as usize);
        messages
    }

    /// The messages of the next frame, which must be a batch.
    pub fn batch(&mut self) -> Vec<Vec<u8>> {
        match self.frame() {
            Frame::Batch(batch) => self.messages(&batch),
            Frame::End { .. } => panic!("the stream ended"),
        }
    }

    /// Takes and acks everything up to the end of the stream; returns the messages by batch.
    pub fn serve(self) -> Vec<Vec<Vec<u8>>> {
        self.serve_from(0)
    }

    /// Likewise, for a stream that is resumed after `committed` batches.
    pub fn serve_from(mut self, committed: u64) -> Vec<Vec<Vec<u8>>> {
        self.welcome_back(committed);
        let mut batches = Vec::new();
        loop {
            let next = committed + batches.len() as u64;
            match self.frame() {
                Frame::Batch(batch) => {
                    assert_eq!(batch.batch_seq, next);
                    batches.push(self.messages(&batch));
                    if self.request.ack == AckLevel::Committed {
                        self.ack(next + 1);
                    }
                }
                Frame::End { batches: sent } => {
                    assert_eq!(sent, next);
                    self.ack(sent);
                    return batches;
                }
            }
        }
    }

    /// Whether the publisher is still there to be told something.
    pub fn tell(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    /// Reads something, if anything comes in time.
    pub fn read_some(&mut self) {
        let _ = self.socket.read(&mut [0; 65536]);
    }

    /// Whether something comes within a moment.
    pub fn has_something(&mut self) -> bool {
        let moment = Duration::from_millis(10);
        self.socket.set_read_timeout(Some(moment)).unwrap();
        let has_something = self.socket.peek(&mut [0]).is_ok();
        self.socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        has_something
    }

    /// Acknowledges each batch until the publisher goes, at whatever point.
    pub fn ack_until_gone(mut self) {
        let mut header = [0; HEADER_LEN];
        for committed in 1.. {
            if self.socket.read_exact(&mut header).is_err() {
                return;
            }
            let frame = Header::read_from_bytes(&header).unwrap();
            let Ok(Frame::Batch(batch)) = frame.parse(MAX_PAYLOAD) else {
                panic!("the stream ended");
            };
            let mut payload = vec![0; batch.payload_len as usize];
            let ack = Reply::ack(committed, false);
            if self.socket.read_exact(&mut payload).is_err()
                || self.socket.write_all(ack.as_bytes()).is_err()
            {
                return;
            }
        }
    }

    /// Waits until the publisher sends something, or has closed the connection: says which.
    pub fn is_closed(&mut self) -> bool {
        match self.socket.peek(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
            Err(error) => panic!("the publisher neither sends nor closes: {error}"),
        }
    }

    /// Closes the connection. The publisher sees everything that was said before, unlike after a reset.
    pub fn close(self) {
        self.socket.shutdown(Shutdown::Write).unwrap();
        self.drain();
    }

    /// Reads until the publisher closes.
    pub fn drain(mut self) {
        let mut buffer = [0; 65536];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("the publisher did not close: {error}"),
            }
        }
    }
}

pub fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Plays a broker of one stream; returns its address.
pub fn broker<T: Send + 'static>(
    play: impl FnOnce(Peer) -> T + Send + 'static,
) -> (String, JoinHandle<T>) {
    let (listener, address) = listen();
    (
        address,
        thread::spawn(move || play(Peer::accept(&listener))),
    )
}

/// One stream as a good broker saw it.
pub struct Served {
    pub topic: String,
    pub request: Request,
    pub batches: Vec<Vec<Vec<u8>>>,
}

/// Plays a good broker of so many streams.
pub fn good_broker(streams: usize) -> (String, JoinHandle<Vec<Served>>) {
    let (listener, address) = listen();
    let serve = move || {
        // The next stream comes once the one before is welcome.
        let peers: Vec<_> = (0..streams)
            .map(|_| {
                let peer = Peer::accept(&listener);
                let (topic, request) = (peer.topic.clone(), peer.request.clone());
                (topic, request, thread::spawn(|| peer.serve()))
            })
            .collect();
        let served = peers.into_iter().map(|(topic, request, thread)| Served {
            topic,
            request,
            batches: thread.join().unwrap(),
        });
        served.collect()
    };
    (address, thread::spawn(serve))
}

/// Batches are sent when they are full or asked for, unless a test says otherwise.
pub fn config(brokers: &[&String]) -> Config {
    Config {
        batch_size: 1000,
        linger: Duration::from_secs(3600),
        timeout: TIMEOUT,
        ..Config::new(brokers.iter().map(|b| (*b).clone()), "t")
    }
}

pub fn numbered(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|n| n.to_string().into_bytes()).collect()
}

pub fn publish_all(publisher: &mut Publisher, messages: &[Vec<u8>]) {
    for message in messages {
        publisher.publish(message).unwrap();
    }
}

/// Publishes until the publisher fails, and returns how.
pub fn failure_of(publisher: &mut Publisher) -> Error {
    loop {
        if let Err(error) = publisher.publish(&[0; 100]) {
            return error;
        }
    }
}

pub fn refusal_of(config: Config) -> Error {
    Publisher::connect(config).err().expect("no connection")
}
