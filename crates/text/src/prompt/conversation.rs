//! Conversations as this engine understands them, whatever protocol they came by.

use super::Json;
use crate::Marker;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who says what.
    pub body: Body,
    /// A single-shot job for the model right behind this message, instead of a reply.
    pub task: Option<Task>,
}

/// Who says what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Instructions of whoever runs the conversation.
    System(Instructions),
    /// Instructions in the place of a user turn.
    Developer(Instructions),
    /// A note on the present state of things, to be placed before the user turn it belongs to.
    Reminder(String),
    /// The person.
    User(String),
    /// The model.
    Assistant(Assistant),
    /// What a tool call gave.
    ToolResult(ToolResult),
}

impl Message {
    /// System text.
    pub fn system(text: impl Into<String>) -> Self {
        Body::System(Instructions { text: text.into(), ..Instructions::default() }).into()
    }

    /// What the person says.
    pub fn user(text: impl Into<String>) -> Self {
        Body::User(text.into()).into()
    }
}

impl From<Body> for Message {
    fn from(body: Body) -> Self {
        Message { body, task: None }
    }
}

impl From<Assistant> for Message {
    fn from(assistant: Assistant) -> Self {
        Body::Assistant(assistant).into()
    }
}

/// Instructions, and what the model may do and must keep to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instructions {
    /// Text.
    pub text: String,
    /// Tools that the model may call: each the JSON object `{name, description, parameters, ...}`, written as given.
    pub tools: Vec<Json>,
    /// What replies must look like.
    pub response_format: Option<ResponseFormat>,
}

/// What replies must look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResponseFormat {
    /// JSON of this schema.
    Schema(Json),
    /// Some JSON object.
    JsonObject,
}

/// A turn of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assistant {
    /// What it thought before.
    pub reasoning: String,
    /// What it says.
    pub content: String,
    /// Tools that it calls.
    pub calls: Vec<ToolCall>,
    /// The turn goes on where this ends: no end marker is written.
    pub open: bool,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// Name of the call, by which its result and the sampled text are found.
    pub id: Option<String>,
    /// Name of the tool.
    pub name: String,
    /// Arguments: a JSON object, or whatever was given in its place.
    pub arguments: String,
}

/// What a tool call gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolResult {
    /// Name of the call; empty if unknown.
    pub call: String,
    /// The pieces of the result, between which blank lines are written.
    pub parts: Vec<ResultPart>,
}

/// A piece of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResultPart {
    /// Text.
    Text(String),
    /// Something of this type that the model cannot read.
    Unsupported(String),
}

/// A single-shot job: the model's reply is one short answer without reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Whether to act.
    Action,
    /// Search queries.
    Query,
    /// Whether sources must be authoritative.
    Authority,
    /// The domain of the question.
    Domain,
    /// A title of the conversation.
    Title,
    /// Whether to read an address.
    ReadUrl,
}

impl Task {
    /// All, by name.
    const ALL: [(&'static str, Task, Marker); 6] = [
        ("action", Task::Action, Marker::Action),
        ("query", Task::Query, Marker::Query),
        ("authority", Task::Authority, Marker::Authority),
        ("domain", Task::Domain, Marker::Domain),
        ("title", Task::Title, Marker::Title),
        ("read_url", Task::ReadUrl, Marker::ReadUrl),
    ];

    /// The task of a name.
    pub fn named(name: &str) -> Option<Self> {
        Task::ALL.into_iter().find(|(n, ..)| *n == name).map(|(_, task, _)| task)
    }

    pub(super) fn marker(self) -> Marker {
        Task::ALL[self as usize].2
    }
}
