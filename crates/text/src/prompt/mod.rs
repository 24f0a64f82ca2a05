//! Conversations as prompts: text, and the tokens of it.

mod conversation;
mod json;
pub mod official;
mod profile;
mod render;

pub use conversation::{
    Assistant, Body, Instructions, Message, ResponseFormat, ResultPart, Task, ToolCall, ToolResult,
};
pub use json::Json;
pub(crate) use json::{Value, write_escaped, write_string};
pub use profile::{Effort, Profile, Thinking};
pub use render::{Options, RenderError, render, render_after};

use crate::{Error, Marker, Mode, Start, Tokenizer};
use serde::{Deserialize, Serialize};

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// One marker token.
    Marker(Marker),
    /// Text without markers, whatever it contains.
    Text(String),
}

/// A rendered conversation: markers, and text that is never read as markers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    parts: Vec<Part>,
}

impl Prompt {
    /// Text that is continued as it is.
    pub fn raw(text: String) -> Self {
        Prompt { parts: vec![Part::Text(text)] }
    }

    fn marker(&mut self, marker: Marker) {
        self.parts.push(Part::Marker(marker));
    }

    /// Adjacent texts are one: where tokens end depends on what follows.
    fn text(&mut self, text: &str) {
        if let Some(Part::Text(last)) = self.parts.last_mut() {
            last.push_str(text);
        } else if !text.is_empty() {
            self.parts.push(Part::Text(text.into()));
        }
    }

    /// Text of our own, in which these markers are spelled out.
    fn template(&mut self, text: &str) {
        let mut rest = text;
        while let Some((at, marker)) = first_marker(rest) {
            self.text(&rest[..at]);
            self.marker(marker);
            rest = &rest[at + marker.text().len()..];
        }
        self.text(rest);
    }

    fn part(&mut self, part: &Part) {
        match part {
            Part::Marker(marker) => self.marker(*marker),
            Part::Text(text) => self.text(text),
        }
    }

    /// Its pieces.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The prompt as text, for people.
    pub fn to_text(&self) -> String {
        to_text(&self.parts)
    }

    /// Token ids.
    ///
    /// # Errors
    /// A vocabulary without one of the markers.
    pub fn to_tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        encode(&self.parts, tokenizer, &mut ids)?;
        Ok(ids)
    }

    /// Token ids that begin with those of a conversation which this prompt goes on from, though its text may be cut into
    /// tokens otherwise: what a model sampled need not be cut as the tokenizer cuts. `None` unless the prompt's text
    /// begins with that conversation's, and goes on with a marker.
    pub fn to_tokens_after(&self, history: &[u32], tokenizer: &Tokenizer) -> Option<Vec<u32>> {
        let mut parts = self.parts.iter();
        let mut text: &[u8] = &[];
        for &id in history {
            match tokenizer.marker_of(id) {
                Some(marker) if text.is_empty() => {
                    (parts.next()? == &Part::Marker(marker)).then_some(())?;
                }
                Some(_) => return None,
                None => {
                    if text.is_empty() {
                        let Part::Text(next) = parts.next()? else { return None };
                        text = next.as_bytes();
                    }
                    text = text.strip_prefix(tokenizer.token_bytes(id))?;
                }
            }
        }
        if !text.is_empty() {
            return None;
        }
        let mut ids = history.to_vec();
        encode(parts.as_slice(), tokenizer, &mut ids).ok()?;
        Some(ids)
    }

    /// Lengths of a prompt's tokens at which another prompt is likely to go another way: behind the system text, with which
    /// every conversation of an agent begins, and before the marker that has the model think, because what it thought is
    /// left out of the next prompt.
    pub fn forks(tokens: &[u32], tokenizer: &Tokenizer) -> Vec<usize> {
        let is = |id: &u32, marker| tokenizer.marker_of(*id) == Some(marker);
        let system = tokens.iter().position(|id| is(id, Marker::User)).filter(|&at| at > 1);
        let thought = tokens.last().filter(|id| is(id, Marker::Think)).map(|_| tokens.len() - 1);
        system.into_iter().chain(thought).collect()
    }

    /// Where the model goes on from here.
    pub fn start(&self) -> Start {
        if self.parts.last() == Some(&Part::Marker(Marker::Think)) {
            Start::Reasoning
        } else {
            Start::Content
        }
    }
}

fn encode(parts: &[Part], tokenizer: &Tokenizer, ids: &mut Vec<u32>) -> Result<(), Error> {
    for part in parts {
        match part {
            Part::Marker(marker) => ids.push(tokenizer.marker(*marker)?),
            Part::Text(text) => tokenizer.encode_into(text, Mode::Plain, ids),
        }
    }
    Ok(())
}

/// Parts as text.
pub(crate) fn to_text(parts: &[Part]) -> String {
    let text = |p: &Part| match p {
        Part::Marker(m) => m.text().to_owned(),
        Part::Text(t) => t.clone(),
    };
    parts.iter().map(text).collect()
}

/// Where the first marker of those that text of the model or of a template contains is.
fn first_marker(text: &str) -> Option<(usize, Marker)> {
    let inline = [Marker::Dsml, Marker::Think, Marker::ThinkEnd];
    inline.into_iter().filter_map(|m| text.find(m.text()).map(|at| (at, m))).min_by_key(|(at, _)| *at)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    /// Any JSON of moderate size.
    pub(crate) fn json_value() -> impl Strategy<Value = Value> {
        // The test's own reader of decimals is off by a bit for some; these are exact.
        let fraction = any::<i32>().prop_map(|n| f64::from(n / 1024) / 8.0);
        let number = prop_oneof![any::<i64>().prop_map(Value::from), fraction.prop_map(Value::from)];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            number,
            "\\PC{0,8}|[\"\\\\\n\t\u{1}<>/&｜]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("\\PC{0,4}", inner), 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }
}
