//! The states of an answer, and how deltas come of them.

use super::stops::Stops;
use super::tags::{Found, line_ends, tag};
use super::units::{DSML, THINK, THINK_END, Units, is_marker, to_text};
use super::{Answer, Block, Delta, End, Flaw, Hint, Phase, Spelling, Start};
use crate::Tokenizer;
use std::collections::HashSet;

/// How an answer is read.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where it begins: [`crate::Prompt::start`].
    pub start: Start,
    /// Whether there are tools; if not, tool calls are text.
    pub tools: bool,
    /// Which tags count.
    pub spelling: Spelling,
    /// Strings that end the answer where they occur in what the model says: not in reasoning, not in tool calls.
    pub stop: Vec<String>,
}

/// Reads an answer as it is generated.
pub struct Parser {
    options: Options,
    units: Units,
    /// Units that are not done with. In a block of calls all of it, so that it can be given back as text.
    pub(super) buffer: Vec<u8>,
    /// First unit of the buffer that is still to be read.
    pub(super) at: usize,
    pub(super) state: State,
    stops: Stops,
    stopped: Option<String>,
    pub(super) call: Call,
    /// What tags of this block have between the angle bracket and their name.
    pub(super) mark: &'static [u8],
    pub(super) answer: Answer,
    pub(super) block: Option<Block>,
    flaw: Option<Flaw>,
    /// Units since the last that was not syntax.
    syntax: usize,
    out: Vec<Delta>,
}

#[derive(Clone, Debug)]
pub(super) enum State {
    /// Nothing has come yet if `fresh`.
    Reasoning {
        fresh: bool,
    },
    Content {
        fresh: bool,
    },
    /// In a block, between calls.
    Calls,
    /// Inside a call, between parameters.
    Parameters,
    /// In a tag whose attributes begin at `from`; looked for its end up to `seen`.
    Tag {
        of_call: bool,
        from: usize,
        seen: usize,
        tries: usize,
    },
    Value {
        is_string: bool,
        json: JsonText,
    },
    /// In the value of a tag that does not say whether it is text.
    Untyped {
        tag: usize,
        from: usize,
        seen: usize,
        tries: usize,
    },
    /// Behind a block that was broken: all is text.
    Text,
    /// Behind the block.
    Done,
    Stopped,
}

/// Where in JSON text the generation is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JsonText {
    in_string: bool,
    escaped: bool,
}

impl JsonText {
    pub(super) fn pass(&mut self, units: &[u8]) {
        for &unit in units {
            match unit {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ => {}
            }
        }
    }
}

/// The call that is being read.
#[derive(Default)]
pub(super) struct Call {
    /// Where it begins in the buffer: right behind the one before.
    pub(super) from: usize,
    pub(super) open: bool,
    pub(super) keys: HashSet<String>,
}

/// Units of syntax after which the sampler is free again, so that it never loops there.
const MOST_SYNTAX: usize = 1024;
/// Most units of line ends that may belong to a block that follows.
const MOST_BLANK: usize = 4;
/// What opens a block, as units.
const OPENING: &[u8] = b"\n\n<\xfftool_calls>\n";

impl Parser {
    /// A parser at the beginning of an answer.
    pub fn new(options: Options) -> Self {
        let state = match options.start {
            Start::Reasoning => State::Reasoning { fresh: true },
            Start::Content => State::Content { fresh: true },
            Start::Calls => State::Calls,
        };
        // A block that the prompt has opened is replayed with its opening.
        let buffer = if options.start == Start::Calls { OPENING.to_vec() } else { Vec::new() };
        Parser {
            units: Units::default(),
            at: buffer.len(),
            call: Call { from: buffer.len(), ..Call::default() },
            buffer,
            state,
            stops: Stops::new(options.stop.clone()),
            stopped: None,
            mark: &[DSML],
            answer: Answer::default(),
            block: None,
            flaw: None,
            syntax: 0,
            out: Vec::new(),
            options,
        }
    }

    /// Takes a token. Only marker tokens are markers: the same characters in other tokens are text.
    pub fn push_token(&mut self, id: u32, tokenizer: &Tokenizer) -> Vec<Delta> {
        let before = self.buffer.len();
        match tokenizer.marker_of(id) {
            Some(marker) => self.units.marker(marker, &mut self.buffer),
            None => self.units.plain(tokenizer.token_bytes(id), &mut self.buffer),
        }
        self.read(before)
    }

    /// Takes bytes in which markers are spelled out, where tokens are not known.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> Vec<Delta> {
        let before = self.buffer.len();
        self.units.spelled(bytes, &mut self.buffer);
        self.read(before)
    }

    /// No more comes. Nothing may be pushed after this.
    pub fn finish(&mut self, end: End) -> Vec<Delta> {
        let before = self.buffer.len();
        self.units.finish(&mut self.buffer);
        let mut deltas = self.read(before);
        self.close(end);
        let held = self.stops.finish();
        self.give(Delta::Content(held));
        deltas.append(&mut self.out);
        deltas
    }

    /// What has come so far.
    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    /// The same, and no more.
    pub fn into_answer(self) -> Answer {
        self.answer
    }

    /// Whether the answer is over, whatever the model would still say: behind the tool calls, or at a stop string.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done | State::Stopped)
    }

    /// The stop string that ended the answer.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// The first thing about the answer that is not as it should be.
    pub fn flaw(&self) -> Option<Flaw> {
        self.flaw
    }

    /// The block of tool calls as it was sampled, once it is closed.
    pub fn block(&self) -> Option<&Block> {
        self.block.as_ref()
    }

    /// Which part of the answer comes next.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Reasoning { .. } => Phase::Reasoning,
            State::Content { .. } | State::Text | State::Done | State::Stopped => Phase::Content,
            State::Calls
            | State::Parameters
            | State::Tag { .. }
            | State::Value { .. }
            | State::Untyped { .. } => Phase::Calls,
        }
    }

    /// What the sampler should do next.
    pub fn hint(&self) -> Hint {
        if self.in_syntax() && self.syntax <= MOST_SYNTAX { Hint::Syntax } else { Hint::Free }
    }

    fn in_syntax(&self) -> bool {
        let pending = &self.buffer[self.at..];
        match &self.state {
            State::Calls | State::Parameters | State::Tag { .. } => true,
            // Two units that may close the value are more than an accident.
            State::Value { is_string, json } => {
                pending.len() + self.units.held() >= 2 || !is_string && !json.in_string
            }
            State::Content { .. } => {
                pending.ends_with(&[DSML]) || pending.windows(2).any(|w| w == [b'<', DSML])
            }
            _ => false,
        }
    }

    fn read(&mut self, before: usize) -> Vec<Delta> {
        let came = self.buffer.len() - before;
        while self.step() {}
        self.syntax = if self.in_syntax() { self.syntax + came } else { 0 };
        std::mem::take(&mut self.out)
    }

    pub(super) fn note(&mut self, flaw: Flaw) {
        self.flaw.get_or_insert(flaw);
    }

    pub(super) fn give(&mut self, delta: Delta) {
        match &delta {
            Delta::Reasoning(t) | Delta::Content(t) | Delta::Arguments(t) | Delta::Trailing(t)
                if t.is_empty() =>
            {
                return;
            }
            _ => self.answer.apply(&delta),
        }
        match (self.out.last_mut(), delta) {
            (Some(Delta::Reasoning(last)), Delta::Reasoning(more))
            | (Some(Delta::Content(last)), Delta::Content(more))
            | (Some(Delta::Arguments(last)), Delta::Arguments(more))
            | (Some(Delta::Trailing(last)), Delta::Trailing(more)) => last.push_str(&more),
            (_, delta) => self.out.push(delta),
        }
    }

    /// Takes the first units out of the buffer, as text.
    fn take(&mut self, n: usize) -> String {
        let units: Vec<u8> = self.buffer.drain(..n).collect();
        self.note_markers(&units);
        to_text(&units)
    }

    fn note_markers(&mut self, units: &[u8]) {
        if units.iter().any(|&u| is_marker(u)) {
            self.note(Flaw::StrayMarker);
        }
    }

    /// The first units of the buffer are what the model says, up to a stop string.
    pub(super) fn say(&mut self, n: usize) {
        let units: Vec<u8> = self.buffer.drain(..n).collect();
        for units in units.chunk_by(|a, b| !is_marker(*a) && !is_marker(*b)) {
            self.note_markers(units);
            let (text, stop) = self.stops.push(&to_text(units));
            self.give(Delta::Content(text));
            if stop.is_some() {
                self.stopped = stop;
                self.state = State::Stopped;
                return;
            }
        }
    }

    /// Reads on; false if more must come first.
    fn step(&mut self) -> bool {
        match self.state {
            State::Reasoning { fresh } => self.reasoning(fresh),
            State::Content { fresh } => self.content(fresh),
            State::Calls => self.calls(),
            State::Parameters => self.parameters(),
            State::Tag { .. } => self.tag(),
            State::Value { .. } => self.value(),
            State::Untyped { .. } => self.untyped(),
            State::Text => {
                self.say(self.buffer.len());
                false
            }
            State::Done => {
                if !self.buffer.is_empty() {
                    self.note(Flaw::Trailing);
                }
                let text = self.take(self.buffer.len());
                self.give(Delta::Trailing(text));
                false
            }
            State::Stopped => {
                self.buffer.clear();
                self.at = 0;
                false
            }
        }
    }

    fn reasoning(&mut self, fresh: bool) -> bool {
        let Some(&first) = self.buffer.first() else { return false };
        self.state = State::Reasoning { fresh: false };
        if fresh && first == THINK {
            // It is open already.
            self.take(1);
            return true;
        }
        let end = self.buffer.iter().position(|&u| u == THINK_END);
        let text = self.take(end.unwrap_or(self.buffer.len()));
        self.give(Delta::Reasoning(text));
        if end.is_some() {
            self.buffer.remove(0);
            self.state = State::Content { fresh: true };
        }
        end.is_some()
    }

    fn content(&mut self, fresh: bool) -> bool {
        let Some(&first) = self.buffer.first() else { return false };
        self.state = State::Content { fresh: false };
        // The model thinks although it was told not to, or says once more that it does not.
        if fresh && self.answer.reasoning.is_empty() && matches!(first, THINK | THINK_END) {
            self.take(1);
            self.state = if first == THINK {
                State::Reasoning { fresh: false }
            } else {
                State::Content { fresh: false }
            };
            return true;
        }
        if !self.options.tools {
            self.say(self.buffer.len());
            return false;
        }
        let mut end = self.buffer.len();
        let mut from = 0;
        while let Some(i) = self.buffer[from..].iter().position(|&u| u == b'<').map(|i| from + i) {
            match self.opening(i) {
                Found::Whole(units) => {
                    self.open_block(i, units);
                    return true;
                }
                Found::Begun => {
                    end = i;
                    break;
                }
                Found::No => from = i + 1,
            }
        }
        // Line ends may belong to a block that comes.
        let held = self.buffer[..end]
            .iter()
            .rev()
            .take(MOST_BLANK)
            .take_while(|u| matches!(u, b'\r' | b'\n'))
            .count();
        self.say(end - held);
        false
    }

    /// Whether a block opens at `i`.
    fn opening(&mut self, i: usize) -> Found {
        let marks: &[&'static [u8]] = match self.options.spelling {
            Spelling::Marker => &[&[DSML]],
            Spelling::Loose => &[&[DSML], "DSML｜".as_bytes(), b""],
        };
        let mut begun = false;
        for mark in marks {
            match tag(&self.buffer[i..], b"<", mark, b"tool_calls>") {
                Found::Whole(units) => {
                    self.mark = mark;
                    return Found::Whole(units);
                }
                Found::Begun => begun = true,
                Found::No => {}
            }
        }
        if begun { Found::Begun } else { Found::No }
    }

    /// The block that opens at `i` with so many units; the blank line before it is part of it.
    fn open_block(&mut self, i: usize, units: usize) {
        let blank = self.buffer[..i].ends_with(b"\n\n");
        let before = if blank { 2 } else { line_ends(&self.buffer[..i]) };
        self.say(i - before);
        if self.stopped.is_some() {
            return;
        }
        if !blank {
            self.note(Flaw::NoBlankLine);
        }
        let held = self.stops.finish();
        self.give(Delta::Content(held));
        self.state = State::Calls;
        self.at = before + units;
        self.call = Call::default();
    }

    /// Ends what is open.
    fn close(&mut self, end: End) {
        match self.state {
            State::Reasoning { .. } if end == End::Turn => self.note(Flaw::OpenReasoning),
            State::Content { .. } => self.say(self.buffer.len()),
            State::Calls => {
                self.note(Flaw::OpenBlock);
                let rest = &self.buffer[self.call.from..];
                if self.answer.calls.is_empty() || !rest.trim_ascii().is_empty() {
                    self.give_up(Flaw::OpenBlock);
                }
            }
            // The official grammar takes a call whose last parameter's line is whole for a whole call. One that was
            // cut off may lack parameters.
            State::Parameters
                if end == End::Turn
                    && !self.call.keys.is_empty()
                    && self.at == self.buffer.len()
                    && self.buffer.ends_with(b"\n") =>
            {
                self.note(Flaw::OpenCall);
                self.end_call();
            }
            State::Parameters | State::Tag { .. } | State::Value { .. } | State::Untyped { .. } => {
                self.give_up(Flaw::OpenCall);
            }
            _ => {}
        }
    }
}
