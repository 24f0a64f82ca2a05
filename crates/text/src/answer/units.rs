//! Tokens and bytes as one stream in which a marker is one byte that no UTF-8 text contains, so that the parser never
//! takes text for a marker or the other way round.

use crate::{Marker, Part, Utf8Stream};

/// Part of every tag.
pub(super) const DSML: u8 = 0xff;
/// Opens reasoning.
pub(super) const THINK: u8 = 0xfe;
/// Ends reasoning.
pub(super) const THINK_END: u8 = 0xfd;

/// Markers with a meaning inside an answer.
const INLINE: [(u8, Marker); 3] =
    [(DSML, Marker::Dsml), (THINK, Marker::Think), (THINK_END, Marker::ThinkEnd)];

pub(super) fn is_marker(unit: u8) -> bool {
    unit >= THINK_END
}

/// The stream that comes in.
#[derive(Default)]
pub(super) struct Units {
    utf8: Utf8Stream,
    /// The beginning of what may be a marker, spelled in bytes.
    held: String,
}

impl Units {
    /// A marker token. Others than those with a meaning are their text.
    pub(super) fn marker(&mut self, marker: Marker, out: &mut Vec<u8>) {
        out.extend_from_slice(self.utf8.finish().as_bytes());
        match INLINE.iter().find(|(_, m)| *m == marker) {
            Some((unit, _)) => out.push(*unit),
            None => out.extend_from_slice(marker.text().as_bytes()),
        }
    }

    /// Bytes of a token that is no marker.
    pub(super) fn plain(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(self.utf8.push(bytes).as_bytes());
    }

    /// Bytes in which markers are spelled out.
    pub(super) fn spelled(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        self.held.push_str(&self.utf8.push(bytes));
        let mut rest = self.held.as_str();
        // All begin with one of these.
        while let Some(at) = rest.find(['<', '｜']) {
            out.extend_from_slice(&rest.as_bytes()[..at]);
            rest = &rest[at..];
            if let Some((unit, marker)) = INLINE.iter().find(|(_, m)| rest.starts_with(m.text())) {
                out.push(*unit);
                rest = &rest[marker.text().len()..];
            } else if INLINE.iter().any(|(_, m)| m.text().starts_with(rest)) {
                self.held = rest.to_owned();
                return;
            } else {
                let one = rest.chars().next().map_or(0, char::len_utf8);
                out.extend_from_slice(&rest.as_bytes()[..one]);
                rest = &rest[one..];
            }
        }
        out.extend_from_slice(rest.as_bytes());
        self.held.clear();
    }

    /// Bytes that wait to be a marker.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// What is left when no more comes.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(std::mem::take(&mut self.held).as_bytes());
        out.extend_from_slice(self.utf8.finish().as_bytes());
    }
}

/// Units as parts.
pub(super) fn to_parts(units: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    for chunk in units.chunk_by(|a, b| !is_marker(*a) && !is_marker(*b)) {
        match INLINE.iter().find(|(unit, _)| chunk[0] == *unit) {
            Some((_, marker)) => parts.push(Part::Marker(*marker)),
            None => parts.push(Part::Text(String::from_utf8_lossy(chunk).into_owned())),
        }
    }
    parts
}

/// Units as text, markers spelled out.
pub(super) fn to_text(units: &[u8]) -> String {
    crate::prompt::to_text(&to_parts(units))
}
