//! JSON as the model reads it (`prompt.md` section 7): a space behind every comma and colon, no line breaks, few
//! escapes, numbers of any size to the digit.

use indexmap::IndexMap;
use serde::de::{Error as _, IgnoredAny};
use std::fmt;

/// A JSON value in the form in which prompts show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Json(String);

impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Json {
    /// Reads JSON text.
    ///
    /// # Errors
    /// Text that is not JSON, or is nested deeper than 128.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        // Its form is checked here; what follows relies on that.
        serde_json::from_str::<IgnoredAny>(text)?;
        Reader { text, at: 0, depth: 0 }.value().map(Json)
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The members of an object; `None` for text that is no JSON object. Of equal keys the last counts, at the place of
    /// the first.
    pub(crate) fn members(text: &str) -> Option<IndexMap<String, Value>> {
        serde_json::from_str::<IgnoredAny>(text).ok()?;
        let mut reader = Reader { text, at: 0, depth: 0 };
        (reader.peek() == b'{').then(|| reader.members().ok()).flatten()
    }
}

/// A member's value.
pub(crate) enum Value {
    String(String),
    Other(String),
}

impl Value {
    fn write(&self, out: &mut String) {
        match self {
            Value::String(text) => write_string(out, text),
            Value::Other(json) => out.push_str(json),
        }
    }
}

/// Reads JSON that is known to be well formed.
struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

/// Arrays and objects in each other.
const MOST_DEEP: usize = 128;

impl<'a> Reader<'a> {
    /// The next byte that is not white space; 0 at the end.
    fn peek(&mut self) -> u8 {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_ascii_start().len();
        self.text.as_bytes().get(self.at).copied().unwrap_or(0)
    }

    /// Passes a byte if it comes next.
    fn passes(&mut self, byte: u8) -> bool {
        let comes = self.peek() == byte;
        self.at += usize::from(comes);
        comes
    }

    fn value(&mut self) -> Result<String, serde_json::Error> {
        if self.depth == MOST_DEEP {
            return Err(serde_json::Error::custom(format!("nested deeper than {MOST_DEEP}")));
        }
        self.depth += 1;
        let mut out = String::new();
        match self.peek() {
            b'{' => {
                out.push('{');
                for (i, (key, value)) in self.members()?.iter().enumerate() {
                    out.push_str(if i > 0 { ", " } else { "" });
                    write_string(&mut out, key);
                    out.push_str(": ");
                    value.write(&mut out);
                }
                out.push('}');
            }
            b'[' => {
                self.at += 1;
                out.push('[');
                while !self.passes(b']') {
                    out.push_str(if self.passes(b',') { ", " } else { "" });
                    out.push_str(&self.value()?);
                }
                out.push(']');
            }
            b'"' => write_string(&mut out, &self.string()?),
            b'-' | b'0'..=b'9' => out.push_str(&number(self.word())),
            _ => out.push_str(self.word()),
        }
        self.depth -= 1;
        Ok(out)
    }

    fn members(&mut self) -> Result<IndexMap<String, Value>, serde_json::Error> {
        let mut members = IndexMap::new();
        self.at += 1;
        while !self.passes(b'}') {
            self.passes(b',');
            self.peek();
            let key = self.string()?;
            self.passes(b':');
            let value = match self.peek() {
                b'"' => Value::String(self.string()?),
                _ => Value::Other(self.value()?),
            };
            members.insert(key, value);
        }
        Ok(members)
    }

    /// A number or a name.
    fn word(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| !matches!(c, '-' | '+' | '.') && !c.is_ascii_alphanumeric());
        let word = &rest[..end.unwrap_or(rest.len())];
        self.at += word.len();
        word
    }

    /// # Errors
    /// Half of a character in an escape, which no text can hold.
    fn string(&mut self) -> Result<String, serde_json::Error> {
        let rest = &self.text[self.at..];
        let mut bytes = rest.bytes().enumerate().skip(1);
        let mut end = rest.len();
        while let Some((i, byte)) = bytes.next() {
            match byte {
                b'\\' => drop(bytes.next()),
                b'"' => {
                    end = i + 1;
                    break;
                }
                _ => {}
            }
        }
        self.at += end;
        serde_json::from_str(&rest[..end])
    }
}

/// Writes text as JSON: no more is escaped than must be.
pub(crate) fn write_string(out: &mut String, text: &str) {
    out.push('"');
    write_escaped(out, text);
    out.push('"');
}

/// The same without the quotes.
pub(crate) fn write_escaped(out: &mut String, text: &str) {
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c < ' ' || c == '"' || c == '\\') {
        out.push_str(&rest[..at]);
        let c = rest.as_bytes()[at];
        match c {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            0x08 => out.push_str("\\b"),
            0x0c => out.push_str("\\f"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            _ => out.push_str(&format!("\\u{c:04x}")),
        }
        rest = &rest[at + 1..];
    }
    out.push_str(rest);
}

/// A number as Python writes it: integers keep their digits, the rest is the shortest that reads as the same double.
fn number(text: &str) -> String {
    if !text.contains(['.', 'e', 'E']) {
        return if text == "-0" { "0".into() } else { text.into() };
    }
    let value: f64 = text.parse().unwrap_or(f64::NAN);
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return format!("{value:?}");
    }
    let scientific = format!("{value:e}");
    match scientific.split_once('e').and_then(|(m, e)| Some((m, e.parse::<i32>().ok()?))) {
        Some((mantissa, exponent)) => {
            format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        None => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json(text: &str) -> String {
        Json::parse(text).unwrap().0
    }

    #[test]
    fn as_python_writes_it() {
        assert_eq!(
            json(" {\"a\" :1,\"b\":[ ] ,\"c\":{ }, \"d\":[1 ,2]} "),
            r#"{"a": 1, "b": [], "c": {}, "d": [1, 2]}"#
        );
        assert_eq!(json(r#""\u4f60\/\u0007\ud83d\ude00\u007f\"\\\t""#), "\"你/\\u0007😀\u{7f}\\\"\\\\\\t\"");
        let numbers = "[1.50,1e5,1E-7,1e20,-0.0,-0,1e400,-1e400,123456789012345678901234567890,0.0001,1e16,1.25e-5,123456789.125]";
        let written = "[1.5, 100000.0, 1e-07, 1e+20, -0.0, 0, Infinity, -Infinity, 123456789012345678901234567890, \
            0.0001, 1e+16, 1.25e-05, 123456789.125]";
        assert_eq!(json(numbers), written);
        assert_eq!(json(r#"[true,false,null,{"k":[null]}]"#), r#"[true, false, null, {"k": [null]}]"#);
        // The last value, at the first place.
        assert_eq!(json(r#"{"a":1,"b":2,"a":{"x":1,"x":2}}"#), r#"{"a": {"x": 2}, "b": 2}"#);
    }

    #[test]
    fn what_is_not_json() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for bad in [
            "",
            "{",
            "[1,]",
            "{\"a\" 1}",
            "NaN",
            "01",
            "\"\\ud800\"",
            "[\"\\ud800\"]",
            "1 2",
            "\"\n\"",
            &deep,
        ] {
            assert!(Json::parse(bad).is_err(), "{bad}");
        }
        for other in ["[]", "1", "\"{}\"", "{\"\\ud800\":1}", ""] {
            assert!(Json::members(other).is_none(), "{other}");
        }
    }

    proptest! {
        /// What it writes means the same, and is written the same again.
        #[test]
        fn keeps_the_value(value in crate::prompt::tests::json_value()) {
            let text = value.to_string();
            let written = json(&text);
            prop_assert_eq!(&json(&written), &written);
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), value);
        }

        #[test]
        fn never_panics(text in "[\\[\\]{}\",:0-9eE.+\\-\\\\u a-c\n]{0,40}") {
            let _ = Json::parse(&text);
            let _ = Json::members(&text);
        }
    }
}
