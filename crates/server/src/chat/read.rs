//! A request of the chat dialect (`api.md` section 4).

use crate::app::App;
use crate::ask::{Ask, Choice, Format, Input, Tool, effort, thinking_by_name};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::parts::{
    arguments, choice_word, function_tool, json_format, model, penalties, result_parts, schema, stop, text,
    wishes,
};
use crate::read::{Bad, Object, Read, array, boolean, count, list, one_of, string};
use ds4_text::{Assistant, Effort, Thinking, ToolCall, ToolResult};
use serde_json::Value;

/// Most alternatives to a token.
const MOST_LOGPROBS: usize = 20;

/// Reads a request.
pub(crate) fn read(app: &App, body: &Value) -> Result<Ask, ApiError> {
    let body = Object::of(body)?;
    let model = model(app, &body)?;
    let mut conversation = Conversation::default();
    body.req("messages", |v| messages(&mut conversation, v))?;
    let thinking = thinking(app, &body, &model)?;
    refuse(&body)?;
    let max_tokens = body.opt("max_completion_tokens", count(1))?.or(body.opt("max_tokens", count(1))?);
    let mut sampling = wishes(&body)?.sampling(thinking)?;
    penalties(&body, &mut sampling)?;
    let logprobs = match body.opt("logprobs", boolean)? {
        Some(true) => Some(body.opt("top_logprobs", count(0))?.unwrap_or(0)),
        _ if body.opt("top_logprobs", count(0))?.is_some_and(|n| n > 0) => {
            return Err(Bad::at("top_logprobs", "needs logprobs to be true").into());
        }
        _ => None,
    };
    if logprobs.is_some_and(|n| n > MOST_LOGPROBS) {
        return Err(Bad::at("top_logprobs", format!("must be at most {MOST_LOGPROBS}")).into());
    }
    Ok(Ask {
        model,
        input: Input::Conversation(conversation),
        tools: body.opt("tools", list(tool))?.unwrap_or_default(),
        choice: body.opt("tool_choice", choice)?.unwrap_or(Choice::Auto),
        parallel: body.opt("parallel_tool_calls", boolean)?.unwrap_or(true),
        format: body.opt("response_format", format)?.unwrap_or_default(),
        thinking,
        sampling,
        stop: body.opt("stop", stop)?.unwrap_or_default(),
        max_tokens,
        logprobs,
        stream: body.opt("stream", boolean)?.unwrap_or(false),
        call_prefix: "call_",
    })
}

/// What would change the answer's meaning and cannot be had.
fn refuse(body: &Object<'_>) -> Read<()> {
    if body.opt("n", count(1))?.is_some_and(|n| n != 1) {
        return Err(Bad::at("n", "must be 1: send several requests for several answers"));
    }
    for (key, instead) in [("functions", "tools"), ("function_call", "tool_choice"), ("audio", "text")] {
        if body.get(key).is_some() {
            return Err(Bad::at(key, format!("is not supported: use {instead}")));
        }
    }
    let modalities = body.opt("modalities", list(string))?.unwrap_or_default();
    match modalities.iter().position(|m| *m != "text") {
        Some(i) => Err(Bad::at(i, "must be text").under("modalities")),
        None => Ok(()),
    }
}

fn thinking(app: &App, body: &Object<'_>, model: &str) -> Read<Thinking> {
    let level = body.opt("reasoning_effort", |v| effort(app, string(v)?))?;
    let switch = match body
        .opt("thinking", |v| Object::of(v)?.req("type", one_of(&["enabled", "disabled", "adaptive"])))?
    {
        Some(word) => Some(word != "disabled"),
        None => body.opt("think", boolean)?,
    };
    Ok(match (switch, level) {
        (Some(false), _) => Thinking::Off,
        (Some(true), Some(Thinking::On(effort))) => Thinking::On(effort),
        (Some(true), _) => Thinking::On(Effort::High),
        (None, Some(level)) => level,
        (None, None) => thinking_by_name(model, Thinking::On(Effort::High)),
    })
}

fn messages(conversation: &mut Conversation, value: &Value) -> Read<()> {
    let messages = array(value)?;
    if messages.is_empty() {
        return Err(Bad::new("must not be empty"));
    }
    for (i, m) in messages.iter().enumerate() {
        message(conversation, m).map_err(|bad| bad.under(i))?;
    }
    if conversation.ends_with_calls() {
        return Err(Bad::new("must end with the results of the tool calls"));
    }
    Ok(())
}

fn message(conversation: &mut Conversation, value: &Value) -> Read<()> {
    let m = Object::of(value)?;
    let content = |m: &Object<'_>| m.opt("content", text);
    match m.req("role", string)? {
        "system" | "developer" => conversation.system(&content(&m)?.unwrap_or_default()),
        // What others call people and their contexts.
        "user" | "ctx" | "msg" => match m.0.get("content") {
            None => return Err(Bad::at("content", "is required")),
            Some(_) => conversation.user(&content(&m)?.unwrap_or_default()),
        },
        "assistant" => {
            let reasoning = m.opt("reasoning_content", string)?.or(m.opt("reasoning", string)?);
            conversation.assistant(Assistant {
                reasoning: reasoning.unwrap_or_default().to_owned(),
                content: content(&m)?.unwrap_or_default(),
                calls: m.opt("tool_calls", list(tool_call))?.unwrap_or_default(),
                open: false,
            });
        }
        "tool" | "function" => {
            let call = m.opt("tool_call_id", string)?.unwrap_or_default().to_owned();
            let parts = m.opt("content", result_parts)?.unwrap_or_default();
            conversation.result(ToolResult { call, parts });
        }
        role => {
            return Err(Bad::at(
                "role",
                format!("{role:?} is none of system, developer, user, assistant, tool"),
            ));
        }
    }
    Ok(())
}

fn tool_call(value: &Value) -> Read<ToolCall> {
    let call = Object::of(value)?;
    let function = |v| {
        let function = Object::of(v)?;
        let arguments = function.opt("arguments", arguments)?.unwrap_or_default();
        Ok((function.req("name", string)?.to_owned(), arguments))
    };
    let (name, arguments) = call.req("function", function)?;
    Ok(ToolCall { id: call.opt("id", string)?.map(str::to_owned), name, arguments })
}

/// A tool, which may also come without the object around it.
fn tool(value: &Value) -> Read<Tool> {
    let tool = Object::of(value)?;
    match tool.get("function") {
        Some(function) => function_tool(function).map_err(|bad| bad.under("function")),
        None if tool.get("name").is_some() => function_tool(value),
        None => Err(Bad::at("function", "is required")),
    }
}

fn choice(value: &Value) -> Read<Choice> {
    if let Value::String(word) = value {
        return choice_word(word);
    }
    let choice = Object::of(value)?;
    let name = |o: &Object<'_>| Ok(o.req("name", string)?.to_owned());
    match choice.kind()? {
        "function" => Ok(Choice::Named(match choice.get("function") {
            Some(function) => {
                Object::of(function).and_then(|f| name(&f)).map_err(|bad| bad.under("function"))?
            }
            None => name(&choice)?,
        })),
        "custom" => Ok(Choice::Named(name(&choice)?)),
        "allowed_tools" => {
            let inner = choice.opt("allowed_tools", Object::of)?.unwrap_or(choice);
            let names = |v| {
                let tool = Object::of(v)?;
                match tool.get("function") {
                    Some(function) => name(&Object::of(function)?),
                    None => name(&tool),
                }
            };
            let must = inner.opt("mode", one_of(&["auto", "required"]))? == Some("required");
            Ok(Choice::Among(inner.req("tools", list(names))?, must))
        }
        kind => Err(Bad::at("type", format!("{kind:?} is not supported"))),
    }
}

fn format(value: &Value) -> Read<Format> {
    json_format(value, |format| format.req("json_schema", |v| Object::of(v)?.req("schema", schema)))
}
