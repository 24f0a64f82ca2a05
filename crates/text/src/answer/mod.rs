//! What the model generates, read as it comes: thinking, text and tool calls (`prompt.md` section 10).
//!
//! [`Parser`] takes tokens, or bytes, and gives [`Delta`]s as soon as they are certain. Whatever the cuts, the deltas
//! put together are the same, and [`Answer`] is just that.

mod attributes;
mod calls;
mod parser;
mod stops;
mod tags;
mod units;

pub use parser::{Options, Parser};

use crate::prompt::ToolCall;
use crate::{Assistant, Json, Part};

/// Where the model goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Inside its reasoning.
    Reasoning,
    /// In what it says.
    #[default]
    Content,
    /// Inside a block of tool calls that the prompt has opened.
    Calls,
}

/// Which spellings of tool calls count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spelling {
    /// Tags with the marker, as the model was trained.
    #[default]
    Marker,
    /// Also `<DSML｜tool_calls>`, the marker's first bar lost, and plain `<tool_calls>`.
    Loose,
}

/// A piece of an answer that is certain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// More reasoning.
    Reasoning(String),
    /// More of what the model says.
    Content(String),
    /// A tool call begins.
    Call {
        /// Name of the tool.
        name: String,
    },
    /// More of its arguments, JSON.
    Arguments(String),
    /// The call is whole.
    CallEnd,
    /// The call is broken and does not count: what was read of it follows as content.
    CallDropped,
    /// Text behind the tool calls, where there should be none.
    Trailing(String),
}

/// How an answer differs from the format that the model was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// The answer ended inside the reasoning.
    #[error("the reasoning is not closed")]
    OpenReasoning,
    /// A marker that has no meaning where it stands, and so is text.
    #[error("a stray marker")]
    StrayMarker,
    /// The block of tool calls does not begin behind a blank line.
    #[error("no blank line before the tool calls")]
    NoBlankLine,
    /// A tag whose attributes are spelled or ordered differently, or lack one.
    #[error("a tag is spelled loosely")]
    LooseTag,
    /// Something that is no tag between the tags of a block: what follows is text.
    #[error("text between the tags of the tool calls")]
    TextInBlock,
    /// A tag without a name: what follows is text.
    #[error("a tag without a name")]
    NoName,
    /// A parameter is given twice; both are in the arguments.
    #[error("a parameter is given twice")]
    Duplicate,
    /// The answer ended inside a tool call: what there is of it is text.
    #[error("a tool call is not closed")]
    OpenCall,
    /// The answer ended inside the block, behind a whole call or before the first.
    #[error("the block of tool calls is not closed")]
    OpenBlock,
    /// Text behind the tool calls.
    #[error("text behind the tool calls")]
    Trailing,
}

/// How the generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model ended its turn.
    Turn,
    /// It was cut off: by a limit of tokens, or because nobody listens any more.
    Cut,
}

/// An answer, as far as it is certain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// What the model thought.
    pub reasoning: String,
    /// What it says.
    pub content: String,
    /// Tools that it calls; the last one may still be coming.
    pub calls: Vec<ToolCall>,
    /// Text behind the calls.
    pub trailing: String,
}

impl Answer {
    /// Adds a piece.
    pub fn apply(&mut self, delta: &Delta) {
        match delta {
            Delta::Reasoning(text) => self.reasoning.push_str(text),
            Delta::Content(text) => self.content.push_str(text),
            Delta::Call { name } => self.calls.push(ToolCall { name: name.clone(), ..ToolCall::default() }),
            Delta::Arguments(text) => {
                if let Some(call) = self.calls.last_mut() {
                    call.arguments.push_str(text);
                }
            }
            Delta::CallEnd => {}
            Delta::CallDropped => drop(self.calls.pop()),
            Delta::Trailing(text) => self.trailing.push_str(text),
        }
    }
}

impl From<Answer> for Assistant {
    /// The turn that this answer is in a conversation.
    fn from(answer: Answer) -> Self {
        Assistant { reasoning: answer.reasoning, content: answer.content, calls: answer.calls, open: false }
    }
}

impl ToolCall {
    /// Whether the arguments are a JSON object, so that the call can be made. The model may write anything where it says
    /// that it writes JSON.
    pub fn is_valid(&self) -> bool {
        self.arguments.trim_start().starts_with('{') && Json::parse(&self.arguments).is_ok()
    }
}

/// A part of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// What the model thinks.
    Reasoning,
    /// What it says.
    Content,
    /// A block of tool calls, behind the tag that opens it.
    Calls,
}

/// What a sampler should do at some point of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Inside the syntax of a tool call: the most probable token is the right one.
    Syntax,
    /// In text, or in a value: as the client wishes.
    Free,
}

/// The block of tool calls as it was sampled, from the white space before it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its calls.
    pub calls: Vec<ToolCall>,
    /// Its very text, and the markers in it.
    pub parts: Vec<Part>,
}
