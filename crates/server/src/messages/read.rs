//! A request of the Messages dialect (`api.md` section 7.1).

use crate::app::App;
use crate::ask::{Ask, Choice, Format, Input, Tool, ToolKind, effort, thinking_by_name};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::parts::{model, result_parts, schema, shown_json, stop, tool_name, wishes};
use crate::read::{Bad, Object, Read, array, boolean, count, list, one_of, string};
use ds4_text::{Assistant, Effort, ResultPart, Thinking, ToolCall, ToolResult};
use serde_json::{Value, json};

/// Reads a request; one that only counts needs no limit.
pub(crate) fn read(app: &App, body: &Value, counts_only: bool) -> Result<Ask, ApiError> {
    let body = Object::of(body)?;
    let max_tokens = body.opt("max_tokens", count(1))?;
    if max_tokens.is_none() && !counts_only {
        return Err(Bad::at("max_tokens", "is required").into());
    }
    if body.get("thread").is_some() {
        let message = "threads are not supported: send the whole conversation";
        return Err(ApiError {
            code: Some("thread_unsupported_request"),
            ..Bad::at("thread", message).into()
        });
    }
    let model = model(app, &body)?;
    let output = body.opt("output_config", Object::of)?;
    let thinking = thinking(app, &body, output, &model)?;
    let tools = body.opt("tools", list(tool))?.unwrap_or_default().into_iter().flatten().collect();
    let mut reader = Reader { conversation: Conversation::default(), tools };
    if let Some(system) = body.get("system") {
        reader.system(system).map_err(|bad| bad.under("system"))?;
    }
    body.req("messages", |v| reader.messages(v))?;
    let (choice, one) = body.opt("tool_choice", choice)?.unwrap_or((Choice::Auto, false));
    let format = match output
        .map(|o| o.opt("format", format))
        .transpose()
        .map_err(|bad| bad.under("output_config"))?
    {
        Some(Some(format)) => format,
        _ => body.opt("output_format", format)?.unwrap_or_default(),
    };
    Ok(Ask {
        model,
        input: Input::Conversation(reader.conversation),
        tools: reader.tools,
        choice,
        parallel: !one,
        format,
        thinking,
        sampling: wishes(&body)?.sampling(thinking)?,
        stop: body.opt("stop_sequences", stop)?.unwrap_or_default(),
        max_tokens,
        logprobs: None,
        stream: body.opt("stream", boolean)?.unwrap_or(false),
        call_prefix: "toolu_",
    })
}

/// Off unless asked for.
fn thinking(app: &App, body: &Object<'_>, output: Option<Object<'_>>, model: &str) -> Read<Thinking> {
    let level = output.map(|o| o.opt("effort", |v| effort(app, string(v)?))).transpose();
    let level = level.map_err(|bad| bad.under("output_config"))?.flatten();
    let words = &["enabled", "adaptive", "between_tools", "disabled"];
    Ok(match body.opt("thinking", |v| Object::of(v)?.req("type", one_of(words)))? {
        Some("disabled") => Thinking::Off,
        Some(_) => match level {
            Some(Thinking::On(effort)) => Thinking::On(effort),
            _ => Thinking::On(Effort::High),
        },
        None => thinking_by_name(model, Thinking::Off),
    })
}

/// A tool; none where it is one that the maker of the dialect runs itself.
fn tool(value: &Value) -> Read<Option<Tool>> {
    let tool = Object::of(value)?;
    if tool.opt("type", string)?.is_some_and(|kind| kind != "custom") {
        return Ok(None);
    }
    let name = tool_name(&tool)?;
    let schema = tool.opt("input_schema", |v| Object::of(v).map(|_| v.clone()))?;
    let mut shown = json!({"name": name});
    if let Some(description) = tool.opt("description", string)? {
        shown["description"] = description.into();
    }
    shown["parameters"] = schema.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}));
    Ok(Some(Tool {
        name,
        shown: shown_json(&shown)?,
        schema,
        strict: tool.opt("strict", boolean)?.unwrap_or(false),
        deferred: tool.opt("defer_loading", boolean)?.unwrap_or(false),
        kind: ToolKind::Function,
    }))
}

/// The choice, and whether only one tool may be called at once.
fn choice(value: &Value) -> Read<(Choice, bool)> {
    let choice = Object::of(value)?;
    let one = choice.opt("disable_parallel_tool_use", boolean)?.unwrap_or(false);
    let which = match choice.kind()? {
        "auto" => Choice::Auto,
        "none" => Choice::None,
        "any" => Choice::Required,
        "tool" => Choice::Named(choice.req("name", string)?.to_owned()),
        kind => return Err(Bad::at("type", format!("must be auto, none, any or tool, is {kind:?}"))),
    };
    Ok((which, one))
}

fn format(value: &Value) -> Read<Format> {
    let format = Object::of(value)?;
    match format.kind()? {
        "text" => Ok(Format::Text),
        "json_schema" => format.req("schema", schema),
        kind => Err(Bad::at("type", format!("must be json_schema, is {kind:?}"))),
    }
}

struct Reader {
    conversation: Conversation,
    tools: Vec<Tool>,
}

impl Reader {
    fn messages(&mut self, value: &Value) -> Read<()> {
        let messages = array(value)?;
        if messages.is_empty() {
            return Err(Bad::new("must not be empty"));
        }
        let is_user = |m: &Value| m["role"] == "user";
        for (i, message) in messages.iter().enumerate() {
            let is_past = message["clear_at"] == "next_user_message" && messages[i + 1..].iter().any(is_user);
            if !is_past {
                self.message(message).map_err(|bad| bad.under(i))?;
            }
        }
        if self.conversation.ends_with_calls() {
            return Err(Bad::new("must end with the results of the tool_use blocks"));
        }
        Ok(())
    }

    fn message(&mut self, value: &Value) -> Read<()> {
        let message = Object::of(value)?;
        match message.req("role", string)? {
            "user" | "ctx" | "msg" => message.req("content", |v| self.user(v)),
            "assistant" => message.req("content", |v| self.assistant(v)),
            "system" => message.req("content", |v| self.system(v)),
            role => Err(Bad::at("role", format!("{role:?} is none of user, assistant, system"))),
        }
    }

    /// Instructions, and changes of what tools there are.
    fn system(&mut self, value: &Value) -> Read<()> {
        let mut block = |v| {
            let block = Object::of(v)?;
            let text = match block.kind()? {
                "text" => block.req("text", string)?.to_owned(),
                "tool_addition" => block.req("tool", |v| self.addition(v))?,
                "tool_removal" => {
                    let name = block.opt("tool", |v| Ok(reference(&Object::of(v)?)))?.flatten();
                    format!("The tool {} is not available any more.", name.unwrap_or_default())
                }
                kind => return Err(Bad::at("type", format!("{kind:?} is not supported"))),
            };
            self.conversation.system(&text);
            Ok(())
        };
        match value {
            Value::String(text) => self.conversation.system(text),
            Value::Array(blocks) => {
                for (i, b) in blocks.iter().enumerate() {
                    block(b).map_err(|bad| bad.under(i))?;
                }
            }
            _ => return Err(Bad::new("must be a string or an array of blocks")),
        }
        Ok(())
    }

    fn addition(&mut self, value: &Value) -> Read<String> {
        let added = Object::of(value)?;
        if let Some(definition) = added.opt("definition", tool)?.flatten() {
            let text = format!("A tool that is available now:\n{}", definition.shown.as_str());
            self.tools.push(Tool { deferred: true, ..definition });
            return Ok(text);
        }
        Ok(format!("A tool that is available now:\n{}", self.shown(&reference(&added).unwrap_or_default())))
    }

    /// What the model reads of a tool that was found.
    fn shown(&self, name: &str) -> String {
        let tool = self.tools.iter().find(|t| t.name == name);
        tool.map_or_else(|| name.to_owned(), |t| t.shown.as_str().to_owned())
    }

    fn user(&mut self, value: &Value) -> Read<()> {
        match value {
            Value::String(text) => self.conversation.user(text),
            Value::Array(blocks) => {
                for (i, block) in blocks.iter().enumerate() {
                    self.user_block(block).map_err(|bad| bad.under(i))?;
                }
            }
            _ => return Err(Bad::new("must be a string or an array of blocks")),
        }
        Ok(())
    }

    fn user_block(&mut self, value: &Value) -> Read<()> {
        let block = Object::of(value)?;
        match block.kind()? {
            "text" => self.conversation.user(block.req("text", string)?),
            "tool_result" => {
                let call = block.req("tool_use_id", string)?.to_owned();
                let parts = block.opt("content", |v| self.result(v))?.unwrap_or_default();
                self.conversation.result(ToolResult { call, parts });
            }
            kind => {
                return Err(Bad::at("type", format!("{kind:?} is not supported: the model reads text only")));
            }
        }
        Ok(())
    }

    fn result(&self, value: &Value) -> Read<Vec<ResultPart>> {
        let Value::Array(blocks) = value else { return result_parts(value) };
        let part = |v: &Value| -> Read<ResultPart> {
            let block = Object::of(v)?;
            match (block.kind()?, reference(&block)) {
                ("tool_reference", Some(name)) => Ok(ResultPart::Text(self.shown(&name))),
                ("text", _) => Ok(ResultPart::Text(block.req("text", string)?.to_owned())),
                (kind, _) => Ok(ResultPart::Unsupported(kind.to_owned())),
            }
        };
        blocks.iter().enumerate().map(|(i, v)| part(v).map_err(|bad| bad.under(i))).collect()
    }

    fn assistant(&mut self, value: &Value) -> Read<()> {
        let mut turn = Assistant::default();
        match value {
            Value::String(text) => turn.content.clone_from(text),
            Value::Array(blocks) => {
                for (i, block) in blocks.iter().enumerate() {
                    assistant_block(&mut turn, block).map_err(|bad| bad.under(i))?;
                }
            }
            _ => return Err(Bad::new("must be a string or an array of blocks")),
        }
        self.conversation.assistant(turn);
        Ok(())
    }
}

/// The name in a block that refers to a tool.
fn reference(block: &Object<'_>) -> Option<String> {
    let name = block.get("tool_name").or(block.get("name"))?;
    Some(name.as_str()?.to_owned())
}

fn assistant_block(turn: &mut Assistant, value: &Value) -> Read<()> {
    let block = Object::of(value)?;
    match block.kind()? {
        "text" => turn.content.push_str(block.req("text", string)?),
        "thinking" => turn.reasoning.push_str(block.req("thinking", string)?),
        "tool_use" => turn.calls.push(ToolCall {
            id: Some(block.req("id", string)?.to_owned()),
            name: block.req("name", string)?.to_owned(),
            arguments: block.opt("input", |v| Ok(v.to_string()))?.unwrap_or_else(|| "{}".into()),
        }),
        // What others have hidden, and what others ran, is nothing that this model could read.
        "redacted_thinking" | "server_tool_use" | "web_search_tool_result" | "fallback" => {}
        kind => return Err(Bad::at("type", format!("{kind:?} is not supported"))),
    }
    Ok(())
}
