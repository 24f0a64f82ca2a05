//! Text from bytes that arrive in pieces.

/// Decodes UTF-8 incrementally: an incomplete character waits for its rest, invalid bytes become U+FFFD.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    held: Vec<u8>,
}

impl Utf8Stream {
    /// Takes bytes; returns the text that is complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut used = 0;
        while let Err(e) = std::str::from_utf8(&self.held[used..]) {
            let valid = used + e.valid_up_to();
            text.push_str(&String::from_utf8_lossy(&self.held[used..valid]));
            used = valid;
            let Some(invalid) = e.error_len() else {
                // The beginning of a character.
                self.held.drain(..used);
                return text;
            };
            text.push(char::REPLACEMENT_CHARACTER);
            used += invalid;
        }
        text.push_str(&String::from_utf8_lossy(&self.held[used..]));
        self.held.clear();
        text
    }

    /// What is left when no more bytes come: U+FFFD for an unfinished character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the bytes are cut, the text is that of the whole.
        #[test]
        fn cuts_do_not_matter(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xe2), Just(0x82), Just(0xac), Just(0xf0)], 0..60),
            cut in 1usize..7,
        ) {
            let mut stream = Utf8Stream::default();
            let mut text: String = bytes.chunks(cut).map(|c| stream.push(c)).collect();
            text.push_str(&stream.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn holds_back_no_more_than_a_character() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push("a€".as_bytes().split_at(3).0), "a");
        assert_eq!(stream.push(&"€".as_bytes()[2..]), "€");
        assert_eq!(stream.push(b"\xf0\x9f"), "");
        assert_eq!(stream.push(b"x"), "\u{fffd}x");
    }
}
