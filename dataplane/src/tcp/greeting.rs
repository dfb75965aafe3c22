//! The handshake of one connection, as a state machine: takes exactly the bytes of the hello and
//! the topic's name, so that the first frame is still in the socket when a worker gets it.

use thiserror::Error;
use zerocopy::FromBytes;

use crate::wire::handshake::{
    BadTopic, HELLO_LEN, Hello, HelloError, MAX_TOPIC_LEN, Refusal, Request, check_topic,
};

/// The bytes of a handshake as they come in.
#[derive(Debug)]
pub(crate) struct Greeting {
    buffer: [u8; HELLO_LEN + MAX_TOPIC_LEN],
    filled: usize,
    /// The hello, once it is complete, and the length of the whole handshake.
    request: Option<(Request, usize)>,
}

/// The peer said something else than a good hello.
#[derive(Debug, Error)]
pub(crate) enum GreetingError {
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error(transparent)]
    Topic(#[from] BadTopic),
}

impl GreetingError {
    /// What to answer; nothing to a peer that would not understand it.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Hello(error) => error.refusal(),
            Self::Topic(_) => Some(Refusal::Topic),
        }
    }
}

impl Greeting {
    pub(crate) fn new() -> Self {
        Self {
            buffer: [0; HELLO_LEN + MAX_TOPIC_LEN],
            filled: 0,
            request: None,
        }
    }

    /// Where the next bytes go: never more than belong to the handshake.
    pub(crate) fn wanted(&mut self) -> &mut [u8] {
        let end = self.request.as_ref().map_or(HELLO_LEN, |(_, end)| *end);
        &mut self.buffer[self.filled..end]
    }

    /// Takes note of `len` bytes that were put where [`Self::wanted`] said. Returns the request
    /// and the topic once all is there.
    pub(crate) fn received(
        &mut self,
        len: usize,
    ) -> Result<Option<(Request, &str)>, GreetingError> {
        self.filled += len;
        if self.request.is_none() {
            let so_far = &self.buffer[..self.filled];
            if !Hello::may_start_with(so_far) {
                let mut first = [0; 4];
                let len = self.filled.min(4);
                first[..len].copy_from_slice(&so_far[..len]);
                return Err(HelloError::Magic(first).into());
            }
            if self.filled < HELLO_LEN {
                return Ok(None);
            }
            let hello = Hello::ref_from_bytes(&self.buffer[..HELLO_LEN]);
            let (topic_len, request) = hello.expect("a hello is plain bytes").parse()?;
            self.request = Some((request, HELLO_LEN + topic_len));
        }
        match &self.request {
            Some((request, end)) if self.filled == *end => {
                let topic = check_topic(&self.buffer[HELLO_LEN..*end])?;
                Ok(Some((request.clone(), topic)))
            }
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::handshake::{AckLevel, OrderLevel, Path};
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

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

    /// Feeds bytes in pieces; returns how many were taken and what came of it.
    fn feed(
        bytes: &[u8],
        mut piece: impl FnMut() -> usize,
    ) -> (usize, Result<Option<String>, String>) {
        let mut greeting = Greeting::new();
        let mut at = 0;
        while at < bytes.len() {
            let wanted = greeting.wanted();
            let len = wanted.len().min(piece()).min(bytes.len() - at);
            wanted[..len].copy_from_slice(&bytes[at..at + len]);
            at += len;
            match greeting.received(len) {
                Ok(None) => {}
                Ok(Some((got, topic))) => {
                    assert_eq!(got, request());
                    return (at, Ok(Some(topic.to_owned())));
                }
                Err(error) => return (at, Err(error.to_string())),
            }
        }
        (at, Ok(None))
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_and_leaves_the_frames(topic in "[a-z]{1,128}", pieces in prop::collection::vec(1usize..60, 1..200)) {
            let mut bytes = Hello::new(&request(), topic.len()).as_bytes().to_vec();
            bytes.extend_from_slice(topic.as_bytes());
            let whole = bytes.len();
            bytes.extend_from_slice(b"first frame");
            let mut pieces = pieces.into_iter().cycle();
            let (taken, result) = feed(&bytes, || pieces.next().unwrap());
            prop_assert_eq!(taken, whole);
            prop_assert_eq!(result, Ok(Some(topic)));
        }
    }

    #[test]
    fn garbage_is_told_by_its_first_byte() {
        let (taken, result) = feed(b"GET / HTTP/1.1\r\n", || 1);
        assert_eq!(taken, 1);
        assert!(result.unwrap_err().contains("not a Penstock publisher"));
    }
}
