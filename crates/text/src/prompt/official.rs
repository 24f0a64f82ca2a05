//! The official encoder's own input: messages as JSON objects and its call parameters (`prompt.md` section 2).

use super::{
    Assistant, Body, Effort, Instructions, Json, Message, Options, Profile, Prompt, RenderError,
    ResponseFormat, ResultPart, Task, Thinking, ToolCall, ToolResult, render_after,
};
use crate::Replay;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// What the encoder is called with.
#[derive(Deserialize)]
pub struct Input<'a> {
    #[serde(borrow)]
    messages: Vec<Entry<'a>>,
    #[serde(borrow, default)]
    context: Vec<Entry<'a>>,
    #[serde(borrow)]
    thinking_mode: Cow<'a, str>,
    #[serde(borrow, default)]
    reasoning_effort: Option<Cow<'a, str>>,
    #[serde(default = "yes")]
    drop_thinking: bool,
    #[serde(default = "yes")]
    add_default_bos_token: bool,
}

fn yes() -> bool {
    true
}

/// A message. Values are kept as text: prompts show numbers to the digit.
#[derive(Deserialize)]
struct Entry<'a> {
    role: String,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(borrow, default)]
    tool_calls: Option<Vec<Call<'a>>>,
    #[serde(default)]
    tool_call_id: Option<String>,
    #[serde(default)]
    wo_eos: Option<bool>,
    #[serde(borrow, default)]
    tools: Option<Vec<Tool<'a>>>,
    #[serde(borrow, default)]
    response_format: Option<&'a RawValue>,
    #[serde(default)]
    task: Option<String>,
}

#[derive(Deserialize)]
struct Tool<'a> {
    #[serde(borrow)]
    function: &'a RawValue,
}

#[derive(Deserialize)]
struct Call<'a> {
    #[serde(default)]
    id: Option<String>,
    #[serde(borrow)]
    function: Function<'a>,
}

#[derive(Deserialize)]
struct Function<'a> {
    #[serde(default)]
    id: Option<String>,
    name: String,
    #[serde(borrow)]
    arguments: &'a RawValue,
}

#[derive(Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

/// Why an input cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// It is not JSON of the right form.
    #[error("input: {0}")]
    Json(#[from] serde_json::Error),
    /// A field's value means nothing.
    #[error("{field} {value:?}: expected {expected}")]
    Value {
        /// Field.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it could hold.
        expected: &'static str,
    },
    /// The conversation cannot be rendered.
    #[error(transparent)]
    Render(#[from] RenderError),
}

/// Renders an input. The profile decides which levels of effort there are.
///
/// # Errors
/// See [`InputError`].
pub fn render_input(json: &str, profile: Profile) -> Result<Prompt, InputError> {
    let input: Input<'_> = serde_json::from_str(json)?;
    let effort = match input.reasoning_effort.as_deref() {
        None => Effort::High,
        Some(name) => profile.effort(name).ok_or_else(|| {
            invalid(
                "reasoning_effort",
                name,
                if profile == Profile::July { "low, high, max" } else { "high, max" },
            )
        })?,
    };
    let thinking = match &*input.thinking_mode {
        "chat" => Thinking::Off,
        "thinking" => Thinking::On(effort),
        other => return Err(invalid("thinking_mode", other, "chat, thinking")),
    };
    let options =
        Options { thinking, profile, drop_reasoning: input.drop_thinking, bos: input.add_default_bos_token };
    let read = |entries: Vec<Entry<'_>>| entries.into_iter().map(message).collect::<Result<Vec<_>, _>>();
    let (context, messages) = (read(input.context)?, read(input.messages)?);
    Ok(render_after(&context, &messages, &options, &mut Replay::default())?)
}

fn invalid(field: &'static str, value: &str, expected: &'static str) -> InputError {
    InputError::Value { field, value: value.into(), expected }
}

fn message(entry: Entry<'_>) -> Result<Message, InputError> {
    let task = match entry.task.as_deref() {
        None => None,
        Some(name) => {
            let expected = "action, query, authority, domain, title, read_url";
            Some(Task::named(name).ok_or_else(|| invalid("task", name, expected))?)
        }
    };
    let body = match entry.role.as_str() {
        "system" => Body::System(instructions(&entry)?),
        "developer" => Body::Developer(instructions(&entry)?),
        "latest_reminder" => Body::Reminder(text(entry.content)?.unwrap_or_default()),
        "user" => match text(entry.content)? {
            Some(text) => Body::User(text),
            None => return Err(invalid("content of a user message", "null", "text")),
        },
        "assistant" => Body::Assistant(Assistant {
            reasoning: entry.reasoning_content.unwrap_or_default(),
            content: text(entry.content)?.unwrap_or_default(),
            calls: entry.tool_calls.unwrap_or_default().into_iter().map(call).collect::<Result<_, _>>()?,
            open: entry.wo_eos.unwrap_or(false),
        }),
        "tool" => Body::ToolResult(ToolResult {
            call: entry.tool_call_id.unwrap_or_default(),
            parts: result_parts(entry.content)?,
        }),
        other => {
            let expected = "system, developer, latest_reminder, user, assistant, tool";
            return Err(invalid("role", other, expected));
        }
    };
    Ok(Message { body, task })
}

/// Text or nothing.
fn text(content: Option<&RawValue>) -> Result<Option<String>, InputError> {
    Ok(content.map_or(Ok(None), |raw| serde_json::from_str(raw.get()))?)
}

fn instructions(entry: &Entry<'_>) -> Result<Instructions, InputError> {
    let tools = entry.tools.iter().flatten().map(|tool| Json::parse(tool.function.get()));
    // An empty value counts as none, as everywhere in Python.
    let format =
        entry.response_format.filter(|f| !matches!(f.get(), "null" | "{}" | "[]" | "\"\"" | "false" | "0"));
    Ok(Instructions {
        text: text(entry.content)?.unwrap_or_default(),
        tools: tools.collect::<Result<_, _>>()?,
        response_format: format.map(|f| Json::parse(f.get()).map(ResponseFormat::Schema)).transpose()?,
    })
}

fn call(call: Call<'_>) -> Result<ToolCall, InputError> {
    let raw = call.function.arguments.get();
    // Arguments are JSON inside a JSON string; some clients leave out the string.
    let arguments: String = if raw.starts_with('"') { serde_json::from_str(raw)? } else { raw.into() };
    // The encoder fails on JSON that is no object; what is no JSON at all it takes as it is.
    if !arguments.trim_start().starts_with('{') && Json::parse(&arguments).is_ok() {
        return Err(invalid("arguments", &arguments, "a JSON object"));
    }
    Ok(ToolCall { id: call.id.or(call.function.id), name: call.function.name, arguments })
}

fn result_parts(content: Option<&RawValue>) -> Result<Vec<ResultPart>, InputError> {
    let Some(raw) = content else { return Ok(Vec::new()) };
    if !raw.get().starts_with('[') {
        return Ok(text(content)?.into_iter().map(ResultPart::Text).collect());
    }
    let parts: Vec<ContentPart> = serde_json::from_str(raw.get())?;
    Ok(parts
        .into_iter()
        .map(|part| match part.kind.as_str() {
            "text" => ResultPart::Text(part.text.unwrap_or_default()),
            _ => ResultPart::Unsupported(part.kind),
        })
        .collect())
}
