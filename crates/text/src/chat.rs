//! Conversations as prompts (`prompt.md` sections 3 and 4).
//!
//! A prompt is a list of parts, markers and text. Only what the renderer writes is a marker; client text is
//! tokenized plain, so that marker text in it stays text.

use crate::tokenizer::{BOS, EOS};
use crate::{Error, Mode, Tokenizer};

const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";
const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

/// What the strongest effort puts before everything else.
const MAX_EFFORT: &str = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n\
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n\
Explicitly write out your entire deliberation process, documenting every intermediate step, considered \
alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// A turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The model's reasoning before it.
    pub reasoning: String,
    /// The model's turn goes on where this ends: no end marker is written.
    pub open: bool,
}

impl Message {
    /// A turn without reasoning.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Message { role, content: content.into(), reasoning: String::new(), open: false }
    }
}

/// Whether and how hard the model thinks before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// It answers directly.
    Off,
    /// It thinks first.
    On,
    /// It thinks first and is told to be thorough.
    Max,
}

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// One marker token.
    Marker(&'static str),
    /// Text without markers, whatever it contains.
    Text(String),
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    parts: Vec<Part>,
}

impl Prompt {
    fn marker(&mut self, marker: &'static str) {
        self.parts.push(Part::Marker(marker));
    }

    fn text(&mut self, text: &str) {
        if let Some(Part::Text(last)) = self.parts.last_mut() {
            last.push_str(text);
        } else if !text.is_empty() {
            self.parts.push(Part::Text(text.into()));
        }
    }

    /// Its pieces.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The prompt as text, for people.
    pub fn to_text(&self) -> String {
        let text = |p: &Part| match p {
            Part::Marker(m) => (*m).to_owned(),
            Part::Text(t) => t.clone(),
        };
        self.parts.iter().map(text).collect()
    }

    /// Token ids.
    pub fn to_tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        for part in &self.parts {
            match part {
                Part::Marker(marker) => ids.push(tokenizer.marker(marker)?),
                Part::Text(text) => tokenizer.encode_into(text, Mode::Plain, &mut ids),
            }
        }
        Ok(ids)
    }

    /// Whether generation starts inside the model's thinking.
    pub fn starts_thinking(&self) -> bool {
        self.parts.last() == Some(&Part::Marker(THINK))
    }
}

/// Renders a conversation up to the point where the model speaks.
///
/// `keep_reasoning` keeps the reasoning of earlier turns; by default it is dropped once the person speaks
/// again, as the model was trained.
pub fn render(messages: &[Message], thinking: Thinking, keep_reasoning: bool) -> Prompt {
    let turns = merge(messages);
    // Reasoning before the last user turn is old.
    let last_user = turns.iter().rposition(|t| t.role == Role::User);
    let keeps = |i: usize| keep_reasoning || last_user.is_none_or(|last| i > last);
    let thinks = thinking != Thinking::Off;
    let mut prompt = Prompt::default();
    prompt.marker(BOS);
    if thinking == Thinking::Max && !turns.is_empty() {
        prompt.text(MAX_EFFORT);
    }
    for (i, turn) in turns.iter().enumerate() {
        match turn.role {
            Role::System => prompt.text(&turn.content),
            Role::User => {
                prompt.marker(USER);
                prompt.text(&turn.content);
            }
            Role::Assistant => {
                if thinks && keeps(i) {
                    prompt.text(&turn.reasoning);
                    prompt.marker(THINK_END);
                }
                prompt.text(&turn.content);
                if !turn.open {
                    prompt.marker(EOS);
                }
            }
        }
        let speaks_next = turns.get(i + 1).is_none_or(|t| t.role == Role::Assistant);
        if turn.role == Role::User && speaks_next {
            let opens = thinks && (keep_reasoning || last_user.is_none_or(|last| i >= last));
            prompt.marker(ASSISTANT);
            prompt.marker(if opens { THINK } else { THINK_END });
        }
    }
    prompt
}

/// Joins consecutive user turns by a blank line.
fn merge(messages: &[Message]) -> Vec<Message> {
    let mut turns: Vec<Message> = Vec::with_capacity(messages.len());
    for message in messages {
        match turns.last_mut() {
            Some(last) if last.role == Role::User && message.role == Role::User => {
                last.content.push_str("\n\n");
                last.content.push_str(&message.content);
            }
            _ => turns.push(message.clone()),
        }
    }
    turns
}
