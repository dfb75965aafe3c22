//! Texts that explain a refusal or an error to a peer.

/// Longest text of a refusal, bytes.
pub const MAX_TEXT_LEN: usize = 1024;

/// The longest prefix of `text` that has at most `max` bytes and cuts no character.
pub(super) fn clip(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}
