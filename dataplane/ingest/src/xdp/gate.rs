//! The XDP program's list of streams: packets of others do not get as far as a worker.

use std::fmt::Debug;
use std::sync::Arc;

use penstock_wire::packet::StreamKey;

/// Which packets the program lets through, by the key that they carry; implemented by the broker.
pub trait Gate: Debug + Send + Sync {
    /// Lets packets with this key through. Returns false if it cannot with this one: at most every
    /// other time.
    fn admit(&self, key: u64) -> bool;

    /// Lets no packet with this key through any more.
    fn dismiss(&self, key: u64);
}

/// Lets a stream's packets through until it is dropped.
#[derive(Debug)]
pub(crate) struct Pass {
    stream: StreamKey,
    gate: Arc<dyn Gate>,
}

impl Pass {
    /// For a stream of this number, with a key that nobody can guess.
    pub(super) fn draw(gate: &Arc<dyn Gate>, stream: u16) -> Result<Self, getrandom::Error> {
        loop {
            let key = getrandom::u64()?;
            if let Some(pass) = Self::of(gate, StreamKey { key, stream }) {
                return Ok(pass);
            }
        }
    }

    /// For the stream with this key, if the gate can tell it from others.
    pub(super) fn of(gate: &Arc<dyn Gate>, stream: StreamKey) -> Option<Self> {
        gate.admit(stream.key).then(|| Self {
            stream,
            gate: Arc::clone(gate),
        })
    }

    pub(crate) fn stream(&self) -> StreamKey {
        self.stream
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.dismiss(self.stream.key);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;

    use super::*;

    /// A gate that takes every other key.
    #[derive(Debug, Default)]
    pub(in crate::xdp) struct Odd(pub(in crate::xdp) Mutex<HashSet<u64>>);

    impl Gate for Odd {
        fn admit(&self, key: u64) -> bool {
            key % 2 == 1 && self.0.lock().unwrap().insert(key)
        }

        fn dismiss(&self, key: u64) {
            assert!(self.0.lock().unwrap().remove(&key), "it was admitted");
        }
    }

    #[test]
    fn a_pass_has_a_key_that_the_gate_takes_and_gives_it_back() {
        let odd = Arc::new(Odd::default());
        let gate: Arc<dyn Gate> = Arc::clone(&odd) as _;
        let passes: Vec<_> = (0..100).map(|n| Pass::draw(&gate, n).unwrap()).collect();
        for (number, pass) in (0..).zip(&passes) {
            assert_eq!(pass.stream().stream, number);
            assert!(odd.0.lock().unwrap().contains(&pass.stream().key));
        }
        assert!(Pass::of(&gate, passes[0].stream()).is_none(), "taken");
        drop(passes);
        assert!(odd.0.lock().unwrap().is_empty());
    }
}
