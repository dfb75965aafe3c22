//! Frames, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by a test over its corpus.

use crate::frame::{self, Headers};

/// Frames of the network, and the answer to one.
pub fn ethernet(data: &[u8]) {
    for total in [data.len(), data.len() + 1000] {
        let Some(datagram) = frame::parse(data, total) else {
            continue;
        };
        assert!(datagram.start <= data.len() && datagram.start + datagram.len <= total);
        let back = Headers::back(data, &datagram);
        assert!(back.leads_back(data, &datagram));
        let mut answer = vec![0; back.len() + 5];
        let (head, payload) = answer.split_at_mut(back.len());
        back.write(head, &[payload]);
        let parsed = frame::parse(&answer, answer.len()).expect("an answer is a good frame");
        assert_eq!((parsed.start, parsed.len), (back.len(), 5));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kept_and_mutated_frames() {
        penstock_fuzz_replay::replay("ethernet", 2000, super::ethernet);
    }
}
