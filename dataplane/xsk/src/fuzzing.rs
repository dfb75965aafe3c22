//! Frames, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by a test over its corpus.

use crate::frame::{self, FrameTemplate};

/// Frames from the network, and the reply to one.
pub fn ethernet(data: &[u8]) {
    for total in [data.len(), data.len() + 1000] {
        let Some(datagram) = frame::parse(data, total) else {
            continue;
        };
        assert!(datagram.start <= data.len() && datagram.start + datagram.len <= total);
        let template = FrameTemplate::reply_template(data, &datagram);
        assert!(template.matches_sender(data, &datagram));
        let mut reply = vec![0; template.len() + 5];
        let (head, payload) = reply.split_at_mut(template.len());
        template.write(head, &[payload]);
        let parsed = frame::parse(&reply, reply.len()).expect("a reply is a valid frame");
        assert_eq!((parsed.start, parsed.len), (template.len(), 5));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kept_and_mutated_frames() {
        penstock_fuzz_replay::replay("ethernet", 2000, super::ethernet);
    }
}
