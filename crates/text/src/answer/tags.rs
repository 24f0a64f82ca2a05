//! The tags of tool calls, as units.

/// Whether a tag is there.
pub(super) enum Found {
    /// So many units.
    Whole(usize),
    /// As far as the units go.
    Begun,
    No,
}

/// Units of the last line ends, at most two.
pub(super) fn line_ends(units: &[u8]) -> usize {
    let mut rest = units;
    for _ in 0..2 {
        rest = rest.strip_suffix(b"\r\n").or_else(|| rest.strip_suffix(b"\n")).unwrap_or(rest);
    }
    units.len() - rest.len()
}

/// Whether units begin with `open`, the block's mark and a name.
pub(super) fn tag(units: &[u8], open: &[u8], mark: &[u8], name: &[u8]) -> Found {
    let mut rest = units;
    for part in [open, mark, name] {
        let n = part.len().min(rest.len());
        if rest[..n] != part[..n] {
            return Found::No;
        }
        if n < part.len() {
            return Found::Begun;
        }
        rest = &rest[n..];
    }
    Found::Whole(units.len() - rest.len())
}

/// Whether units begin with the closing tag of a name.
pub(super) fn closing(units: &[u8], mark: &[u8], name: &[u8]) -> Found {
    let Found::Whole(n) = tag(units, b"</", mark, name) else { return tag(units, b"</", mark, name) };
    let space = units[n..].iter().take_while(|u| u.is_ascii_whitespace()).count();
    match units.get(n + space) {
        Some(b'>') => Found::Whole(n + space + 1),
        Some(_) => Found::No,
        None => Found::Begun,
    }
}
