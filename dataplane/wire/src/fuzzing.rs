//! Parsers of packets, driven by arbitrary bytes: by libFuzzer in `fuzz/`, and by a test over its corpus.

use crate::batch;
use crate::packet::{Content, Feedback, MAX_ACK_LEN, MAX_GAPS, MAX_PACKET, StreamKey, split};

const STREAM: StreamKey = StreamKey { key: 7, stream: 3 };

/// Packets of both directions. A checksum that is wrong ends it soon, so the right one is tried too.
pub fn packets(data: &[u8]) {
    let mut mended = data.to_vec();
    for data in [data, mend(&mut mended)] {
        if let Ok((header, rest)) = split(data) {
            let (first, second) = rest.split_at(rest.len() / 2);
            let whole = header.parse(&[rest]);
            assert_eq!(whole, header.parse(&[first, second]), "however it lies");
            if let Ok(received) = whole {
                assert!(received.packet < MAX_PACKET);
                if let Content::Payload(chunk) = received.content {
                    let end = chunk.offset as usize + rest.len();
                    assert!(!rest.is_empty() && end <= chunk.batch.len as usize);
                }
            }
        }
        let mut feedback = Feedback::new(STREAM);
        if feedback.read(data).is_ok() {
            check_ranges(&feedback);
            let mut written = [0; MAX_ACK_LEN];
            let len = feedback.write(&mut written);
            let mut again = Feedback::new(STREAM);
            assert_eq!(again.read(&written[..len]), Ok(()));
            assert_eq!(again, feedback);
        }
    }
}

/// Puts the checksum right that packets have at bytes 4 to 8.
fn mend(packet: &mut [u8]) -> &[u8] {
    if packet.len() >= 8 {
        let sum = batch::payload_checksum(&packet[8..]);
        packet[4..8].copy_from_slice(&sum.to_le_bytes());
    }
    packet
}

fn check_ranges(feedback: &Feedback) {
    assert!(feedback.received.len() <= MAX_GAPS + 1);
    let mut below = MAX_PACKET;
    for &(low, high) in &feedback.received {
        assert!(low <= high && high < below, "{:?}", feedback.received);
        below = low;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kept_and_mutated_packets() {
        penstock_fuzz_replay::replay("packets", 2000, super::packets);
    }
}
