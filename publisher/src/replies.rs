//! Replies of a broker as they arrive over a connection, with their tags if they carry any.

use std::sync::Arc;

use penstock_dataplane::auth::PacketKeys;
use penstock_dataplane::wire::packet::TAG_LEN;
use penstock_dataplane::wire::reply::{Parsed, REPLY_LEN, Reply};
use zerocopy::FromBytes;

use crate::Error;

/// The reply that is being received, without the text of an error.
pub(crate) struct Replies {
    broker: String,
    bytes: [u8; REPLY_LEN + TAG_LEN],
    filled: usize,
    /// Keys for the tags of replies, if there are any, and the number of replies so far.
    keys: Option<Arc<PacketKeys>>,
    verified: u64,
}

impl Replies {
    pub(crate) fn new(broker: &str, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            broker: broker.to_owned(),
            bytes: [0; REPLY_LEN + TAG_LEN],
            filled: 0,
            keys,
            verified: 0,
        }
    }

    fn len(&self) -> usize {
        match self.keys {
            Some(_) => REPLY_LEN + TAG_LEN,
            None => REPLY_LEN,
        }
    }

    /// The buffer for the next bytes.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let len = self.len();
        &mut self.bytes[self.filled..len]
    }

    /// Processes bytes that were written there; returns the reply once it is complete. The tag of an
    /// ack is verified here; that of an error with [`Self::verify`].
    pub(crate) fn received(&mut self, got: usize) -> Result<Option<Parsed>, Error> {
        self.filled += got;
        if self.filled < self.len() {
            return Ok(None);
        }
        self.filled = 0;
        let reply = Reply::read_from_prefix(&self.bytes)
            .expect("the length matches")
            .0;
        let parsed = reply.parse().map_err(|source| Error::BadReply {
            broker: self.broker.clone(),
            source,
        })?;
        if matches!(parsed, Parsed::Ack { .. }) {
            self.verify(&[])?;
        }
        Ok(Some(parsed))
    }

    /// Verifies the tag of the reply and the text after it.
    pub(crate) fn verify(&mut self, text: &[u8]) -> Result<(), Error> {
        let Some(keys) = &self.keys else {
            return Ok(());
        };
        let (reply, tag) = self.bytes.split_at(REPLY_LEN);
        let tag = tag.try_into().expect("the length matches");
        if !keys.verify_reply(self.verified, tag, &[reply, text]) {
            return Err(Error::Forged {
                broker: self.broker.clone(),
            });
        }
        self.verified += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_dataplane::wire::reply::Fault;
    use zerocopy::IntoBytes;

    fn sealed(keys: &PacketKeys, number: u64, reply: &[u8]) -> Vec<u8> {
        let (head, text) = reply.split_at(REPLY_LEN);
        let tag = keys.seal_reply(number, &[head, text]);
        [head, &tag, text].concat()
    }

    /// Feeds bytes one by one; returns the reply and the rest.
    fn feed<'a>(replies: &mut Replies, bytes: &'a [u8]) -> Result<(Parsed, &'a [u8]), Error> {
        for (at, byte) in bytes.iter().enumerate() {
            replies.room()[0] = *byte;
            if let Some(parsed) = replies.received(1)? {
                return Ok((parsed, &bytes[at + 1..]));
            }
        }
        panic!("no whole reply")
    }

    #[test]
    fn replies_that_do_not_carry_their_tag_are_noticed() {
        let keys = Arc::new(PacketKeys::new(&[1; 32]));
        let mut replies = Replies::new("b", Some(Arc::clone(&keys)));
        let ack = Reply::ack(1, false);
        let first = sealed(&keys, 0, ack.as_bytes());
        assert!(feed(&mut replies, &first).is_ok());
        let repeated = feed(&mut replies, &first);
        assert!(matches!(repeated, Err(Error::Forged { .. })));
        let error = sealed(&keys, 1, &Reply::error(Fault::Shutdown, 1, "the end"));
        let (_, text) = feed(&mut replies, &error).unwrap();
        assert!(replies.verify(b"the END").is_err());
        replies.verify(text).unwrap();
        let mut plain = Replies::new("b", None);
        assert!(feed(&mut plain, ack.as_bytes()).is_ok());
    }
}
