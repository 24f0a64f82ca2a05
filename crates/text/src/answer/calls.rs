//! Inside a block of tool calls.

use super::attributes::{Attributes, attributes, exact};
use super::parser::{Call, JsonText, Parser, State};
use super::tags::{Found, closing, tag};
use super::units::{to_parts, to_text};
use super::{Block, Delta, Flaw};
use crate::prompt::{write_escaped, write_string};

/// Angle brackets that are tried as the end of a tag: a key may hold some, but reading must stay linear.
const TRIES: usize = 16;
impl Parser {
    pub(super) fn calls(&mut self) -> bool {
        match self.next_tag(b"invoke", b"tool_calls") {
            Some((true, units)) => {
                self.at += units;
                self.state = State::Tag { of_call: true, from: self.at, seen: self.at, tries: 0 };
                true
            }
            Some((false, units)) => {
                self.at += units;
                let rest = self.buffer.split_off(self.at);
                self.block = Some(Block { calls: self.answer.calls.clone(), parts: to_parts(&self.buffer) });
                self.buffer = rest;
                self.at = 0;
                self.state = State::Done;
                true
            }
            None => false,
        }
    }

    pub(super) fn parameters(&mut self) -> bool {
        match self.next_tag(b"parameter", b"invoke") {
            Some((true, units)) => {
                self.at += units;
                self.state = State::Tag { of_call: false, from: self.at, seen: self.at, tries: 0 };
                true
            }
            Some((false, units)) => {
                self.at += units;
                self.end_call();
                true
            }
            None => false,
        }
    }

    pub(super) fn end_call(&mut self) {
        let rest = if self.call.keys.is_empty() { "{}" } else { "}" };
        self.give(Delta::Arguments(rest.into()));
        self.give(Delta::CallEnd);
        self.call = Call { from: self.at, ..Call::default() };
        self.state = State::Calls;
    }

    /// The tag that comes next: one that opens `inner` (true) or closes `outer` (false), and its units. Anything else
    /// breaks the block.
    fn next_tag(&mut self, inner: &[u8], outer: &[u8]) -> Option<(bool, usize)> {
        let space = self.buffer[self.at..].iter().take_while(|u| u.is_ascii_whitespace()).count();
        self.at += space;
        let rest = &self.buffer[self.at..];
        match (tag(rest, b"<", self.mark, inner), closing(rest, self.mark, outer)) {
            (Found::Whole(units), _) => return Some((true, units)),
            (_, Found::Whole(units)) => return Some((false, units)),
            (Found::No, Found::No) => self.give_up(Flaw::TextInBlock),
            _ => {}
        }
        None
    }

    pub(super) fn tag(&mut self) -> bool {
        let State::Tag { of_call, from, seen, tries } = self.state else { return false };
        if self.buffer.get(from).is_some_and(|&u| !u.is_ascii_whitespace() && u != b'>') {
            self.give_up(Flaw::TextInBlock);
            return true;
        }
        let Some(end) = self.buffer[seen..].iter().position(|&u| u == b'>').map(|i| seen + i) else {
            self.state = State::Tag { of_call, from, seen: self.buffer.len(), tries };
            return false;
        };
        match attributes(&self.buffer[from..end]) {
            Some(found) => {
                self.at = end + 1;
                self.begin(of_call, from, found);
            }
            None if tries == TRIES => self.give_up(Flaw::LooseTag),
            None => self.state = State::Tag { of_call, from, seen: end + 1, tries: tries + 1 },
        }
        true
    }

    /// Behind a whole tag whose attributes begin at `tag`.
    fn begin(&mut self, of_call: bool, tag: usize, found: Attributes) {
        let Some(name) = found.name else {
            self.give_up(Flaw::NoName);
            return;
        };
        if found.loose || (!of_call && found.is_string.is_none()) {
            self.note(Flaw::LooseTag);
        }
        if of_call {
            self.call.open = true;
            self.give(Delta::Call { name });
            self.state = State::Parameters;
            return;
        }
        match found.is_string {
            Some(is_string) => self.begin_value(name, is_string),
            None => {
                let from = self.at;
                self.state = State::Untyped { tag, from, seen: from, tries: 0 };
            }
        }
    }

    fn begin_value(&mut self, key: String, is_string: bool) {
        let mut text = String::from(if self.call.keys.is_empty() { "{" } else { ", " });
        write_string(&mut text, &key);
        text.push_str(if is_string { ": \"" } else { ": " });
        self.give(Delta::Arguments(text));
        if !self.call.keys.insert(key) {
            self.note(Flaw::Duplicate);
        }
        self.state = State::Value { is_string, json: JsonText::default() };
    }

    pub(super) fn value(&mut self) -> bool {
        let (from, is_string) = (self.at, matches!(self.state, State::Value { is_string: true, .. }));
        let (end, close) = self.end_of_value(from);
        let units = &self.buffer[from..end];
        let mut text = String::new();
        if is_string {
            write_escaped(&mut text, &to_text(units));
        } else {
            text = to_text(units);
        }
        if let State::Value { json, .. } = &mut self.state {
            json.pass(units);
        }
        self.give(Delta::Arguments(text));
        self.at = end;
        if let Some(units) = close {
            self.give(Delta::Arguments(if is_string { "\"" } else { "" }.into()));
            self.at += units;
            self.state = State::Parameters;
        }
        close.is_some()
    }

    /// Where the value that goes on at `from` ends for certain, and the units of the tag that closes it.
    fn end_of_value(&self, mut from: usize) -> (usize, Option<usize>) {
        while let Some(i) = self.buffer[from..].iter().position(|&u| u == b'<').map(|i| from + i) {
            match closing(&self.buffer[i..], self.mark, b"parameter") {
                Found::Whole(units) => return (i, Some(units)),
                Found::Begun => return (i, None),
                Found::No => from = i + 1,
            }
        }
        (self.buffer.len(), None)
    }

    /// The value is text. But where another tag's kind comes before anything closes, the official grammar takes all
    /// before it for the key.
    pub(super) fn untyped(&mut self) -> bool {
        let State::Untyped { tag, from, seen, tries } = self.state else { return false };
        let (end, close) = self.end_of_value(seen);
        let bracket = self.buffer[seen..end].iter().position(|&u| u == b'>').map(|i| seen + i);
        if let Some(bracket) = bracket.filter(|_| tries < TRIES) {
            match exact(&self.buffer[tag..bracket]) {
                Some(Attributes { name: Some(key), is_string: Some(is_string), .. }) => {
                    self.at = bracket + 1;
                    self.begin_value(key, is_string);
                }
                _ => self.state = State::Untyped { tag, from, seen: bracket + 1, tries: tries + 1 },
            }
            return true;
        }
        if close.is_some() {
            let key = attributes(&self.buffer[tag..from - 1]).and_then(|a| a.name).unwrap_or_default();
            self.at = from;
            self.begin_value(key, true);
            return true;
        }
        self.state = State::Untyped { tag, from, seen: end, tries };
        false
    }

    /// From the call that is being read on, all is text.
    pub(super) fn give_up(&mut self, flaw: Flaw) {
        self.note(flaw);
        if self.call.open {
            self.give(Delta::CallDropped);
        }
        self.buffer.drain(..self.call.from);
        self.at = 0;
        self.call = Call::default();
        self.state = State::Text;
        self.say(self.buffer.len());
    }
}
