//! Answers that are known beforehand, so that clients can be tested without a model (`api.md` section 14).

use crate::TokenSet;
use ds4_text::{Marker, Mode, Start, Tokenizer};
use serde::Deserialize;

/// Which answer to give to which prompt.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(rename = "name")]
    _name: String,
    /// Texts that the prompt must contain.
    #[serde(default)]
    all: Vec<String>,
    /// Texts that it must not contain.
    #[serde(default)]
    none: Vec<String>,
    /// The same for what stands behind the last marker of a user turn.
    #[serde(default)]
    tail_all: Vec<String>,
    #[serde(default)]
    tail_none: Vec<String>,
    #[serde(default)]
    think: String,
    text: String,
}

impl Script {
    /// Reads the JSON `{"rules": [...]}`.
    ///
    /// # Errors
    /// Other JSON.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// The answer to a prompt: that of the first rule that applies.
    pub(crate) fn answer(&self, prompt: &str, start: Start, tokenizer: &Tokenizer) -> Scripted {
        let tail = prompt.rsplit(Marker::User.text()).next().unwrap_or(prompt);
        let has = |text: &str, parts: &[String]| parts.iter().all(|p| text.contains(p.as_str()));
        let lacks = |text: &str, parts: &[String]| !parts.iter().any(|p| text.contains(p.as_str()));
        let rule = self.rules.iter().find(|r| {
            has(prompt, &r.all)
                && lacks(prompt, &r.none)
                && has(tail, &r.tail_all)
                && lacks(tail, &r.tail_none)
        });
        let (think, text) = rule.map_or(("…", "OK."), |r| (r.think.as_str(), r.text.as_str()));
        let whole = match start {
            Start::Reasoning => format!("{think}{}{text}", Marker::ThinkEnd.text()),
            Start::Content | Start::Calls => text.to_owned(),
        };
        let mut tokens = tokenizer.encode(&whole, Mode::Special);
        tokens.push(tokenizer.eos());
        Scripted { tokens, at: 0, eos: tokenizer.eos() }
    }
}

/// One answer, token by token.
pub struct Scripted {
    tokens: Vec<u32>,
    at: usize,
    eos: u32,
}

impl Scripted {
    /// The next token; where it is not allowed, the next one that is, so that the script bends to a grammar. A script that
    /// cannot ends, whatever is allowed.
    pub(crate) fn next(&mut self, allowed: Option<&TokenSet>) -> u32 {
        let rest = self.tokens.get(self.at..).unwrap_or_default();
        let Some(allowed) = allowed else {
            self.at += 1;
            return rest.first().copied().unwrap_or(self.eos);
        };
        match rest.iter().position(|&t| allowed.get(t as usize)) {
            Some(i) => {
                self.at += i + 1;
                rest[i]
            }
            None => {
                self.at = self.tokens.len();
                self.eos
            }
        }
    }

    /// A token was put in by force: goes on behind it, if the script has it.
    pub(crate) fn pass(&mut self, token: u32) {
        let rest = self.tokens.get(self.at..).unwrap_or_default();
        if let Some(i) = rest.iter().position(|&t| t == token) {
            self.at += i + 1;
        }
    }
}
