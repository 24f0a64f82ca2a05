//! Names: which model, and which tokens.

use sha1::{Digest, Sha1};
use std::fmt;

/// What state depends on besides the tokens: the weights, how they are quantized, the layout of rows, rounding and numeric
/// mode. State of another fingerprint means nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 20]);

/// Name of a block: the SHA-1 of a fingerprint and all token ids from the start to the block's end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(pub [u8; 20]);

fn hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl Name {
    /// Reads 40 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 20];
        if text.len() != 40 || !text.is_ascii() {
            return None;
        }
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Name(bytes))
    }
}

/// Names of ever longer prefixes of one sequence of tokens, in one pass over it.
#[derive(Clone)]
pub struct Names {
    sha: Sha1,
    len: usize,
}

impl Names {
    /// At the start.
    pub fn new(fingerprint: &Fingerprint) -> Self {
        Names { sha: Sha1::new_with_prefix(fingerprint.0), len: 0 }
    }

    /// The name of the first `len` of `tokens`; `len` must not be less than at the call before.
    pub fn of(&mut self, tokens: &[u32], len: usize) -> Name {
        for token in &tokens[self.len.min(len)..len] {
            self.sha.update(token.to_le_bytes());
        }
        self.len = len;
        Name(self.sha.clone().finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_name() {
        let mut names = Names::new(&Fingerprint([0; 20]));
        let (empty, two) = (names.of(&[1, 2, 3], 0), names.of(&[1, 2, 3], 2));
        // SHA-1 of 20 zero bytes, by other hands.
        assert_eq!(empty.to_string(), "6768033e216468247bd031a0a2d9876d79818f8f");
        assert_eq!(two, Names::new(&Fingerprint([0; 20])).of(&[1, 2], 2));
        assert_ne!(two, Names::new(&Fingerprint([1; 20])).of(&[1, 2], 2));
    }
}
