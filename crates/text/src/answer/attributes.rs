//! The attributes of a tag, which a model wrote: keys may hold quotes and angle brackets, attributes may come in any
//! order and with any spaces.

use super::units::to_text;

/// What the text between a tag's name and its end says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) name: Option<String>,
    /// Whether the value is text or JSON; `None` if it is not said.
    pub(super) is_string: Option<bool>,
    /// Spelled differently from what the model was trained on.
    pub(super) loose: bool,
}

/// Reads attributes; `None` if the text does not end here but goes on inside a quoted value.
pub(super) fn attributes(units: &[u8]) -> Option<Attributes> {
    listed(units).or_else(|| exact(units))
}

/// Any attributes whose values have no quotes.
fn listed(units: &[u8]) -> Option<Attributes> {
    let mut found = Attributes::default();
    let mut order = 0;
    let mut pieces = units.split(|&u| u == b'"');
    loop {
        let before = pieces.next()?;
        let Some(value) = pieces.next() else {
            found.loose |= !before.is_empty();
            return before.iter().all(u8::is_ascii_whitespace).then_some(found);
        };
        let name = before.strip_suffix(b"=").filter(|n| n.first().is_some_and(u8::is_ascii_whitespace))?;
        match name.trim_ascii() {
            b"name" => {
                found.name = Some(to_text(value));
                // The official grammar allows any white space before the name of an invocation.
                found.loose |= order > 0;
            }
            b"string" => {
                found.is_string = Some(value != b"false");
                found.loose |= order != 1 || name != b" string" || !matches!(value, b"true" | b"false");
            }
            name if !name.is_empty() && name.iter().all(u8::is_ascii_alphanumeric) => found.loose = true,
            _ => return None,
        }
        order += 1;
    }
}

/// ` name="KEY" string="true|false"`, or without the second, where the key may be anything.
pub(super) fn exact(units: &[u8]) -> Option<Attributes> {
    let rest = units.trim_ascii_start().strip_prefix(b"name=\"")?;
    let kinds =
        [(&b"\" string=\"true\""[..], Some(true)), (b"\" string=\"false\"", Some(false)), (b"\"", None)];
    let (key, is_string) = kinds.iter().find_map(|(end, kind)| Some((rest.strip_suffix(*end)?, *kind)))?;
    Some(Attributes { name: Some(to_text(key)), is_string, loose: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        let read = |text: &str| {
            let a = attributes(text.as_bytes())?;
            Some((a.name.unwrap_or_default(), a.is_string, a.loose))
        };
        let found = |name: &str, is_string, loose| Some((name.to_owned(), is_string, loose));
        assert_eq!(read(" name=\"a\" string=\"true\""), found("a", Some(true), false));
        assert_eq!(read(" name=\"a b > è\" string=\"false\""), found("a b > è", Some(false), false));
        assert_eq!(read("  name=\"a\""), found("a", None, false));
        assert_eq!(read(" string=\"true\" name=\"a\""), found("a", Some(true), true));
        assert_eq!(read("\n name=\"a\"   string=\"false\" "), found("a", Some(false), true));
        assert_eq!(read(" name=\"a\" string=\"yes\""), found("a", Some(true), true));
        assert_eq!(read(" tool=\"a\""), found("", None, true));
        assert_eq!(read(""), found("", None, false));
        // Quotes in a key.
        assert_eq!(read(" name=\"a\"b\" string=\"true\""), found("a\"b", Some(true), false));
        // Not the end of the tag.
        assert_eq!(read(" name=\"a"), None);
        assert_eq!(read(" name=a"), None);
    }
}
