// A broker that serves subscribers from memory, and misbehaves on request. Included by tests and documentation.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use penstock_auth::{Key, PacketKeys, respond};
use penstock_wire::auth_handshake::{
    AUTH_INIT_LEN, AuthInit, SEALED_HELLO_LEN, SealedHello, SealedWelcome,
};
use penstock_wire::batch;
use penstock_wire::delivery::{
    BatchInfo, Delivery, DeliveryHeader, REQUEST_LEN, Request, RequestFrame, StartAt,
};
use penstock_wire::handshake::{HELLO_LEN, Offer, Refusal, Welcome};
use penstock_wire::message;
use penstock_wire::packet::TAG_LEN;
use zerocopy::{FromBytes, IntoBytes};

pub const SESSION: u64 = 0xab;
pub const MAX_PAYLOAD: u32 = 1 << 20;
/// Secret of the frames and deliveries of each connection with a key.
const FRAMES: [u8; 32] = [9; 32];

/// How the broker behaves.
#[derive(Default)]
pub struct State {
    /// Batches from `oldest` on.
    pub log: Vec<(BatchInfo, Vec<u8>)>,
    pub oldest: u64,
    /// Identity of the log.
    pub id: u64,
    /// The connection ends after this many bytes, once for each element.
    pub cuts: Vec<usize>,
    /// Subscribers need the key with this secret; deliveries are authenticated.
    pub secret: Option<[u8; 32]>,
    /// Batches of which a byte is changed on the way, and how often.
    pub corrupt: HashMap<u64, u32>,
    pub refusal: Option<(Refusal, String)>,
    /// Sent instead of a log.
    pub raw: Option<Vec<u8>>,
    /// Sends nothing after the welcome.
    pub is_silent: bool,
    /// Every request that arrived.
    pub requests: Vec<Request>,
    pub connections: u32,
    /// Requests that the protocol forbids.
    pub violations: Vec<String>,
    pub max_payload: Option<u32>,
    /// A change ends every connection.
    pub epoch: u32,
    is_over: bool,
}

impl State {
    /// The batch with this index, and whether a byte of it is to be changed.
    fn batch(&mut self, index: u64) -> Option<(BatchInfo, Vec<u8>, bool)> {
        let at = (index - self.oldest) as usize;
        let (info, payload) = self.log.get(at)?.clone();
        let times = self.corrupt.get_mut(&index).filter(|times| **times > 0);
        let is_changed = times.is_some();
        times.into_iter().for_each(|times| *times -= 1);
        Some((info, payload, is_changed))
    }
}

/// A broker on a port of its own.
pub struct FakeBroker {
    address: String,
    pub state: Arc<Mutex<State>>,
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        let violations = {
            let mut state = self.state.lock().unwrap();
            state.is_over = true;
            std::mem::take(&mut state.violations)
        };
        let _ = TcpStream::connect(&self.address);
        assert!(
            violations.is_empty() || thread::panicking(),
            "{violations:?}"
        );
    }
}

#[allow(dead_code)]
impl FakeBroker {
    pub fn start() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub fn on(listener: TcpListener) -> Self {
        let state = Arc::<Mutex<State>>::default();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for socket in listener.incoming() {
                if shared.lock().unwrap().is_over {
                    return;
                }
                let state = Arc::clone(&shared);
                // Ends with an error when the subscriber leaves.
                thread::spawn(move || serve(&socket.unwrap(), &state));
            }
        });
        Self { address, state }
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Changes how it behaves.
    pub fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// Adds a batch with the stream's next number.
    pub fn publish(&self, stream: u32, messages: &[&[u8]]) {
        let next = {
            let state = self.state.lock().unwrap();
            let of_stream = state.log.iter().filter(|batch| batch.0.stream == stream);
            of_stream
                .map(|batch| batch.0.batch_seq + 1)
                .max()
                .unwrap_or(0)
        };
        self.publish_as(stream, next, messages);
    }

    pub fn publish_as(&self, stream: u32, batch_seq: u64, messages: &[&[u8]]) {
        let mut payload = Vec::new();
        messages
            .iter()
            .for_each(|m| message::append(&mut payload, m));
        let mut state = self.state.lock().unwrap();
        let count = messages.len() as u32;
        let info = BatchInfo {
            index: state.oldest + state.log.len() as u64,
            session: SESSION,
            stream,
            batch_seq,
            messages: count,
            payload_len: payload.len() as u32,
            checksum: batch::checksum(batch_seq, count, &payload),
            arrival_unix_ns: 1 + batch_seq,
        };
        state.log.push((info, payload));
    }
}

/// Counts what is sent, and cuts the connection where it is to be cut.
struct Sender<'a> {
    socket: &'a TcpStream,
    cut: Option<usize>,
    sent: u64,
    keys: Option<PacketKeys>,
    sealed: u64,
}

impl Sender<'_> {
    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let room = self.cut.map_or(bytes.len(), |cut| bytes.len().min(cut));
        self.socket.write_all(&bytes[..room])?;
        if let Some(cut) = &mut self.cut {
            *cut -= room;
            if *cut == 0 {
                self.socket.shutdown(std::net::Shutdown::Both)?;
                return Err(std::io::ErrorKind::ConnectionAborted.into());
            }
        }
        self.sent += bytes.len() as u64;
        Ok(())
    }

    fn deliver(
        &mut self,
        delivery: &Delivery,
        payload: &[u8],
        is_changed: bool,
    ) -> std::io::Result<()> {
        let header = DeliveryHeader::new(delivery);
        self.send(header.as_bytes())?;
        let keys = self.keys.as_ref();
        if let Some(tag) = keys.map(|k| k.seal_reply(self.sealed, &[header.as_bytes(), payload])) {
            self.sealed += 1;
            self.send(&tag)?;
        }
        let mut payload = payload.to_vec();
        if is_changed {
            *payload.last_mut().unwrap() ^= 1;
        }
        self.send(&payload)
    }
}

/// The requests of a subscriber.
struct Requests {
    socket: TcpStream,
    state: Arc<Mutex<State>>,
    keys: Option<PacketKeys>,
    verified: u64,
}

impl Requests {
    fn next(&mut self) -> std::io::Result<Request> {
        let mut frame = [0; REQUEST_LEN];
        self.socket.read_exact(&mut frame)?;
        if let Some(keys) = &self.keys {
            let mut tag = [0; TAG_LEN];
            self.socket.read_exact(&mut tag)?;
            assert!(keys.verify_frame(self.verified, &tag, &[&frame]), "a tag");
            self.verified += 1;
        }
        let request = RequestFrame::read_from_bytes(&frame).unwrap().parse();
        let request = request.expect("a subscriber's frame");
        self.state.lock().unwrap().requests.push(request);
        Ok(request)
    }
}

/// Proves the key, and answers the sealed hello.
fn welcome_sealed(
    mut socket: &TcpStream,
    secret: &[u8; 32],
    welcome: &Welcome,
) -> std::io::Result<Vec<u8>> {
    let mut init = [0; AUTH_INIT_LEN];
    socket.read_exact(&mut init)?;
    let init = AuthInit::read_from_bytes(&init).unwrap();
    let (mut channel, response) = respond(&Key::new(secret), &init).expect("the same key");
    socket.write_all(response.as_bytes())?;
    let mut hello = [0; SEALED_HELLO_LEN];
    socket.read_exact(&mut hello)?;
    let hello = channel.open(&hello).expect("sealed with the key");
    SealedHello::read_from_bytes(&hello)
        .unwrap()
        .parse()
        .unwrap();
    let welcome = SealedWelcome {
        welcome: welcome.as_bytes().try_into().unwrap(),
        packets: FRAMES,
    };
    Ok(channel.seal(welcome.as_bytes()))
}

/// Answers the hello; the connection may now be used, except after a refusal.
fn welcome<'a>(
    mut socket: &'a TcpStream,
    state: &Mutex<State>,
) -> std::io::Result<Option<Sender<'a>>> {
    let secret = state.lock().unwrap().secret;
    if secret.is_none() {
        let mut hello = [0; HELLO_LEN];
        socket.read_exact(&mut hello)?;
        let topic_len = usize::from(u16::from_le_bytes([hello[6], hello[7]]));
        socket.read_exact(&mut vec![0; topic_len])?;
    }
    let mut state = state.lock().unwrap();
    state.connections += 1;
    if let Some((refusal, text)) = &state.refusal {
        socket.write_all(&Welcome::refuse(*refusal, text))?;
        return Ok(None);
    }
    let welcome = Welcome::accept(Offer {
        session: state.id,
        max_payload: state.max_payload.unwrap_or(MAX_PAYLOAD),
        committed: state.oldest + state.log.len() as u64,
        datagrams: None,
    });
    let cut = (!state.cuts.is_empty()).then(|| state.cuts.remove(0));
    drop(state);
    let mut sender = Sender {
        socket,
        cut,
        sent: 0,
        keys: secret.map(|_| PacketKeys::new(&FRAMES)),
        sealed: 0,
    };
    match secret {
        Some(secret) => sender.send(&welcome_sealed(socket, &secret, &welcome)?)?,
        None => sender.send(welcome.as_bytes())?,
    }
    sender.sent = 0;
    Ok(Some(sender))
}

fn serve(socket: &TcpStream, state: &Arc<Mutex<State>>) -> std::io::Result<()> {
    let Some(mut sender) = welcome(socket, state)? else {
        return Ok(());
    };
    let mut requests = Requests {
        socket: socket.try_clone()?,
        state: Arc::clone(state),
        keys: sender.keys.as_ref().map(|_| PacketKeys::new(&FRAMES)),
        verified: 0,
    };
    let Request::Start(start) = requests.next()? else {
        panic!("a start comes first");
    };
    let raw = state.lock().unwrap().raw.clone();
    if let Some(raw) = raw {
        return sender.send(&raw);
    }
    let (oldest, end, epoch) = {
        let state = state.lock().unwrap();
        let end = state.oldest + state.log.len() as u64;
        (state.oldest, end, state.epoch)
    };
    let mut next = match start.at {
        StartAt::Oldest | StartAt::Time(_) => oldest,
        StartAt::End => end,
        StartAt::Index(index) => index,
    };
    let credit = Arc::new(Mutex::new(start.credit));
    let sent = Arc::new(Mutex::new(next));
    let (raised, shown) = (Arc::clone(&credit), Arc::clone(&sent));
    let mut needed_from = next;
    thread::spawn(move || {
        while let Ok(Request::Progress(progress)) = requests.next() {
            let next = *shown.lock().unwrap();
            let mut credit = raised.lock().unwrap();
            if !(needed_from..=next).contains(&progress.needed_from) || progress.credit < *credit {
                let text = format!("{progress:?} after {needed_from} and {credit}, at {next}");
                requests.state.lock().unwrap().violations.push(text);
            }
            needed_from = progress.needed_from;
            *credit = progress.credit;
        }
    });
    if next < oldest {
        let (batches, messages) = (oldest - next, oldest - next);
        next = oldest;
        *sent.lock().unwrap() = next;
        let lost = Delivery::Lost {
            next,
            batches,
            messages,
        };
        sender.deliver(&lost, &[], false)?;
    }
    let mut told_end: Option<Instant> = None;
    loop {
        let found = {
            let mut state = state.lock().unwrap();
            if state.is_over || state.epoch != epoch {
                return socket.shutdown(std::net::Shutdown::Both);
            }
            let has_credit = sender.sent < *credit.lock().unwrap();
            match state.is_silent || !has_credit {
                true => None,
                false => Some(state.batch(next)),
            }
        };
        match found {
            Some(Some((info, payload, is_changed))) => {
                told_end = None;
                *sent.lock().unwrap() = next + 1;
                sender.deliver(&Delivery::Batch(info), &payload, is_changed)?;
                next += 1;
            }
            Some(None) if told_end.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) => {
                told_end = Some(Instant::now());
                sender.deliver(&Delivery::CaughtUp { next }, &[], false)?;
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}
