//! The renderer (`prompt.md` sections 3 to 9), equal to the official encoder.

use super::{
    Assistant, Body, Effort, Instructions, Json, Message, Profile, Prompt, ResponseFormat, ResultPart, Task,
    Thinking, ToolCall, ToolResult, Value,
};
use crate::{Marker, Replay};
use std::collections::HashMap;

const BEFORE_SCHEMAS: &str = "\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a \"<｜DSML｜tool_calls>\" block like the following:\n\n\
<｜DSML｜tool_calls>\n\
<｜DSML｜invoke name=\"$TOOL_NAME\">\n\
<｜DSML｜parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n\
...\n\
</｜DSML｜invoke>\n\
<｜DSML｜invoke name=\"$TOOL_NAME2\">\n\
...\n\
</｜DSML｜invoke>\n\
</｜DSML｜tool_calls>\n\n\
String parameters should be specified as is and set `string=\"true\"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string=\"false\"`.\n\n\
If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.\n\n\
Otherwise, output directly after </think> with tool calls or final response.\n\n\
### Available Tool Schemas\n\n";
const AFTER_SCHEMAS: &str = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to \
invoke tool calls.\n";
const BEFORE_FORMAT: &str =
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";
const JSON_OBJECT: &str = "\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply \
with JSON object ONLY.";

/// How a conversation is rendered.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether and how hard the model is to think.
    pub thinking: Thinking,
    /// What the weights were trained on.
    pub profile: Profile,
    /// Leave out the reasoning of turns before the person spoke last, as the model was trained; where there are tools
    /// it is kept all the same.
    pub drop_reasoning: bool,
    /// Begin with the marker of a conversation's begin.
    pub bos: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { thinking: Thinking::Off, profile: Profile::default(), drop_reasoning: true, bos: true }
    }
}

/// Why a conversation cannot be rendered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// A developer message without text.
    #[error("message {0}: a developer message needs text")]
    EmptyDeveloper(usize),
    /// A level of effort that the weights do not have.
    #[error("these weights know no reasoning effort {0:?}; levels are high and max")]
    Effort(Effort),
}

/// Renders a conversation up to the point where the model speaks.
///
/// Tool calls of which `replay` knows the sampled text are written as they were sampled.
///
/// # Errors
/// See [`RenderError`].
pub fn render(messages: &[Message], options: &Options, replay: &mut Replay) -> Result<Prompt, RenderError> {
    render_after(&[], messages, options, replay)
}

/// Renders what `messages` add to a conversation whose first messages, `context`, have been rendered before.
///
/// # Errors
/// See [`RenderError`].
pub fn render_after(
    context: &[Message],
    messages: &[Message],
    options: &Options,
    replay: &mut Replay,
) -> Result<Prompt, RenderError> {
    if let (Thinking::On(Effort::Low), Profile::April) = (options.thinking, options.profile) {
        return Err(RenderError::Effort(Effort::Low));
    }
    let mut turns = merge(context);
    let mut first = turns.len();
    turns.extend(merge(messages));
    sort_results(&mut turns);
    let thinks = options.thinking != Thinking::Off;
    let drops = options.drop_reasoning && !turns.iter().any(Turn::has_tools);
    if thinks && drops {
        // Turns of the context that fall away had fallen away when only the context was there.
        let last = last_user(&turns[..first]);
        first = turns[..first].iter().enumerate().filter(|(i, turn)| stays(turn, *i, last)).count();
        let last = last_user(&turns);
        let mut i = 0;
        turns.retain(|turn| {
            i += 1;
            stays(turn, i - 1, last)
        });
    }
    let last_user = last_user(&turns);
    let keeps = |i: usize, from: Option<usize>| thinks && (!drops || from.is_none_or(|from| i >= from));
    let mut prompt = Prompt::default();
    if options.bos && context.is_empty() {
        prompt.marker(Marker::Bos);
    }
    for (i, turn) in turns.iter().enumerate().skip(first) {
        if let (0, Thinking::On(effort)) = (i, options.thinking) {
            prompt.text(options.profile.prefix(effort));
        }
        let after_task = i > 0 && turns[i - 1].task.is_some();
        let reasons = keeps(i, last_user.map(|last| last + 1)) && !after_task;
        body(&mut prompt, turn, reasons, replay)?;
        if turns.get(i + 1).is_none_or(|next| matches!(next.body, Said::Assistant(_) | Said::Reminder(_))) {
            header(&mut prompt, turn, thinks, keeps(i, last_user));
        }
    }
    Ok(prompt)
}

/// A message, or several that are one turn.
struct Turn<'a> {
    body: Said<'a>,
    task: Option<Task>,
    /// Place of its first message.
    message: usize,
}

enum Said<'a> {
    System(&'a Instructions),
    Developer(&'a Instructions),
    Reminder(&'a str),
    User(Vec<Block<'a>>),
    Assistant(&'a Assistant),
}

/// A piece of a user turn.
enum Block<'a> {
    Text(&'a str),
    Result(&'a ToolResult),
}

impl Turn<'_> {
    fn has_tools(&self) -> bool {
        matches!(self.body, Said::System(i) | Said::Developer(i) if !i.tools.is_empty())
    }

    fn is_user(&self) -> bool {
        matches!(self.body, Said::User(_) | Said::Developer(_))
    }
}

fn last_user(turns: &[Turn<'_>]) -> Option<usize> {
    turns.iter().rposition(Turn::is_user)
}

/// Whether a turn is still there where old reasoning is left out: developer turns go with it.
fn stays(turn: &Turn<'_>, i: usize, last_user: Option<usize>) -> bool {
    !matches!(turn.body, Said::Developer(_)) || last_user.is_none_or(|last| i >= last)
}

/// Joins what the person says and what tools give to user turns (section 3, step 1).
fn merge(messages: &[Message]) -> Vec<Turn<'_>> {
    let mut turns: Vec<Turn<'_>> = Vec::with_capacity(messages.len());
    for (at, message) in messages.iter().enumerate() {
        let block = match &message.body {
            Body::User(text) => Block::Text(text),
            Body::ToolResult(result) => Block::Result(result),
            body => {
                let body = match body {
                    Body::System(i) => Said::System(i),
                    Body::Developer(i) => Said::Developer(i),
                    Body::Reminder(text) => Said::Reminder(text),
                    Body::Assistant(a) => Said::Assistant(a),
                    Body::User(_) | Body::ToolResult(_) => continue,
                };
                turns.push(Turn { body, task: message.task, message: at });
                continue;
            }
        };
        let is_text = matches!(block, Block::Text(_));
        match turns.last_mut() {
            // A text opens a new turn behind a task; the task of a text that joins a turn is lost.
            Some(Turn { body: Said::User(blocks), task, .. }) if !(is_text && task.is_some()) => {
                blocks.push(block);
            }
            _ => {
                let task = message.task.filter(|_| is_text);
                turns.push(Turn { body: Said::User(vec![block]), task, message: at });
            }
        }
    }
    turns
}

/// Puts the results of each turn in the order of the calls (section 3, step 2).
fn sort_results(turns: &mut [Turn<'_>]) {
    let mut order: HashMap<&str, usize> = HashMap::new();
    for turn in turns {
        match &mut turn.body {
            Said::Assistant(a) if !a.calls.is_empty() => {
                let ids = a.calls.iter().enumerate().filter_map(|(i, call)| Some((call.id.as_deref()?, i)));
                order = ids.collect();
            }
            Said::User(blocks) if !order.is_empty() => {
                let slots = blocks.iter().enumerate().filter_map(|(slot, block)| match block {
                    Block::Result(result) => Some((slot, *result)),
                    Block::Text(_) => None,
                });
                let (slots, mut results): (Vec<usize>, Vec<&ToolResult>) = slots.unzip();
                results.sort_by_key(|result| order.get(result.call.as_str()).copied().unwrap_or(0));
                for (slot, result) in slots.into_iter().zip(results) {
                    blocks[slot] = Block::Result(result);
                }
            }
            _ => {}
        }
    }
}

fn body(prompt: &mut Prompt, turn: &Turn<'_>, reasons: bool, replay: &mut Replay) -> Result<(), RenderError> {
    match &turn.body {
        Said::System(system) => instructions(prompt, system),
        Said::Developer(developer) => {
            if developer.text.is_empty() {
                return Err(RenderError::EmptyDeveloper(turn.message));
            }
            prompt.marker(Marker::User);
            instructions(prompt, developer);
        }
        Said::Reminder(text) => {
            prompt.marker(Marker::Reminder);
            prompt.text(text);
        }
        Said::User(blocks) => {
            prompt.marker(Marker::User);
            for (i, block) in blocks.iter().enumerate() {
                prompt.text(if i > 0 { "\n\n" } else { "" });
                match block {
                    Block::Text(text) => prompt.text(text),
                    Block::Result(result) => tool_result(prompt, result),
                }
            }
        }
        Said::Assistant(assistant) => {
            if reasons {
                prompt.text(&assistant.reasoning);
                prompt.marker(Marker::ThinkEnd);
            }
            prompt.text(&assistant.content);
            if !assistant.calls.is_empty() {
                tool_calls(prompt, &assistant.calls, replay);
            }
            if !assistant.open {
                prompt.marker(Marker::Eos);
            }
        }
    }
    Ok(())
}

/// What stands between a turn and the model's (section 4, step 3).
fn header(prompt: &mut Prompt, turn: &Turn<'_>, thinks: bool, keeps: bool) {
    let opening = |thinks| if thinks { Marker::Think } else { Marker::ThinkEnd };
    match turn.task {
        Some(Task::Action) => {
            prompt.marker(Marker::Assistant);
            prompt.marker(opening(thinks));
            prompt.marker(Task::Action.marker());
        }
        Some(task) => prompt.marker(task.marker()),
        None if turn.is_user() => {
            prompt.marker(Marker::Assistant);
            prompt.marker(opening(keeps));
        }
        None => {}
    }
}

fn instructions(prompt: &mut Prompt, instructions: &Instructions) {
    prompt.text(&instructions.text);
    if !instructions.tools.is_empty() {
        prompt.template(BEFORE_SCHEMAS);
        let schemas: Vec<&str> = instructions.tools.iter().map(Json::as_str).collect();
        prompt.text(&schemas.join("\n"));
        prompt.text(AFTER_SCHEMAS);
    }
    match &instructions.response_format {
        Some(ResponseFormat::Schema(schema)) => {
            prompt.text(BEFORE_FORMAT);
            prompt.text(schema.as_str());
        }
        Some(ResponseFormat::JsonObject) => prompt.text(JSON_OBJECT),
        None => {}
    }
}

fn tool_result(prompt: &mut Prompt, result: &ToolResult) {
    prompt.text("<tool_result>");
    for (i, part) in result.parts.iter().enumerate() {
        prompt.text(if i > 0 { "\n\n" } else { "" });
        match part {
            ResultPart::Text(text) => prompt.text(text),
            ResultPart::Unsupported(kind) => {
                prompt.text("[Unsupported ");
                prompt.text(kind);
                prompt.text("]");
            }
        }
    }
    prompt.text("</tool_result>");
}

/// As sampled where that is known, else in the form of section 6.
fn tool_calls(prompt: &mut Prompt, calls: &[ToolCall], replay: &mut Replay) {
    if let Some(parts) = replay.find(calls) {
        parts.iter().for_each(|part| prompt.part(part));
        return;
    }
    prompt.template("\n\n<｜DSML｜tool_calls>\n");
    for call in calls {
        prompt.template("<｜DSML｜invoke name=\"");
        prompt.text(&call.name);
        prompt.text("\">\n");
        let arguments = Json::members(&call.arguments).unwrap_or_else(|| {
            // No JSON object: the text itself, so that nothing is lost.
            [("arguments".to_owned(), Value::String(call.arguments.clone()))].into()
        });
        for (i, (key, value)) in arguments.iter().enumerate() {
            prompt.text(if i > 0 { "\n" } else { "" });
            parameter(prompt, key, value);
        }
        // A call without arguments has an empty line here.
        prompt.template("\n</｜DSML｜invoke>\n");
    }
    prompt.template("</｜DSML｜tool_calls>");
}

fn parameter(prompt: &mut Prompt, key: &str, value: &Value) {
    let (kind, text) = match value {
        Value::String(text) => ("true", text),
        Value::Other(json) => ("false", json),
    };
    prompt.template("<｜DSML｜parameter name=\"");
    prompt.text(key);
    prompt.text("\" string=\"");
    prompt.text(kind);
    prompt.text("\">");
    prompt.text(text);
    prompt.template("</｜DSML｜parameter>");
}
