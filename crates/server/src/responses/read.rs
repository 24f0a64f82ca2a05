//! A request of the Responses dialect (`api.md` section 6).

use crate::app::App;
use crate::ask::{Ask, Choice, Format, Input, Tool, ToolKind, effort, thinking_by_name};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::parts::{
    arguments, choice_word, function_tool, json_format, model, result_parts, schema, shown_json, text,
    tool_name, wishes,
};
use crate::read::{Bad, Object, Read, array, boolean, count, list, one_of, string};
use ds4_text::{Assistant, Effort, ResultPart, Thinking, ToolCall, ToolResult};
use serde_json::{Value, json};

/// What stands between the name of a name space and that of a tool in it.
const SPACE: &str = "__";
/// Most alternatives to a token.
const MOST_LOGPROBS: usize = 20;

/// Reads a request.
pub(crate) fn read(app: &App, body: &Value) -> Result<Ask, ApiError> {
    let body = Object::of(body)?;
    refuse(&body)?;
    let model = model(app, &body)?;
    let usual = thinking_by_name(&model, Thinking::On(Effort::High));
    let thinking = body.opt("reasoning", |v| Object::of(v)?.opt("effort", |v| effort(app, string(v)?)))?;
    let thinking = thinking.flatten().unwrap_or(usual);
    let tools = body.opt("tools", list(tools))?.unwrap_or_default().into_iter().flatten().collect();
    let mut reader = Reader { app, conversation: Conversation::default(), tools };
    if let Some(instructions) = body.opt("instructions", text)? {
        reader.conversation.system(&instructions);
    }
    body.req("input", |v| reader.input(v))?;
    let wants_logprobs =
        body.opt("include", list(string))?.unwrap_or_default().contains(&"message.output_text.logprobs");
    let top = body.opt("top_logprobs", count(0))?.unwrap_or(0);
    if top > MOST_LOGPROBS {
        return Err(Bad::at("top_logprobs", format!("must be at most {MOST_LOGPROBS}")).into());
    }
    Ok(Ask {
        model,
        input: Input::Conversation(reader.conversation),
        tools: reader.tools,
        choice: body.opt("tool_choice", choice)?.unwrap_or(Choice::Auto),
        parallel: body.opt("parallel_tool_calls", boolean)?.unwrap_or(true),
        format: body.opt("text", |v| Object::of(v)?.opt("format", format))?.flatten().unwrap_or_default(),
        thinking,
        sampling: wishes(&body)?.sampling(thinking)?,
        stop: Vec::new(),
        max_tokens: body.opt("max_output_tokens", count(1))?,
        logprobs: (wants_logprobs || top > 0).then_some(top),
        stream: body.opt("stream", boolean)?.unwrap_or(false),
        call_prefix: "call_",
    })
}

/// What would change the answer's meaning and cannot be had.
fn refuse(body: &Object<'_>) -> Result<(), ApiError> {
    for key in ["previous_response_id", "conversation"] {
        if body.get(key).is_some() {
            let message = "nothing is stored here: replay the full input";
            return Err(ApiError {
                code: Some("previous_response_not_found"),
                ..Bad::at(key, message).into()
            });
        }
    }
    if body.opt("background", boolean)? == Some(true) {
        return Err(Bad::at("background", "is not supported: wait for the answer, or stream it").into());
    }
    Ok(())
}

/// The tools that an entry stands for; none where it is one that the maker of the dialect runs itself.
fn tools(value: &Value) -> Read<Vec<Tool>> {
    let tool = Object::of(value)?;
    match tool.kind()? {
        "function" => match tool.get("function") {
            // As in the other dialect.
            Some(function) => Ok(vec![function_tool(function).map_err(|bad| bad.under("function"))?]),
            None => Ok(vec![function_tool(value)?]),
        },
        "custom" => Ok(vec![custom_tool(&tool)?]),
        "namespace" => {
            let namespace = tool_name(&tool)?;
            let members = tool.opt("tools", list(tools))?.unwrap_or_default().into_iter().flatten();
            members.map(|member| member_tool(&namespace, member)).collect()
        }
        _ => Ok(Vec::new()),
    }
}

/// A tool in a name space: the model sees one name.
fn member_tool(namespace: &str, member: Tool) -> Read<Tool> {
    let full = format!("{namespace}{SPACE}{}", member.name);
    let mut shown: Value =
        serde_json::from_str(member.shown.as_str()).map_err(|e| Bad::new(e.to_string()))?;
    shown["name"] = full.clone().into();
    let kind = ToolKind::Member { namespace: namespace.to_owned(), name: member.name };
    Ok(Tool { name: full, shown: shown_json(&shown)?, kind, ..member })
}

/// A tool that takes text: the model sees a function with one parameter.
fn custom_tool(tool: &Object<'_>) -> Read<Tool> {
    let name = tool_name(tool)?;
    let schema = json!({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
        "additionalProperties": false});
    let mut shown =
        json!({"name": name, "description": tool.opt("description", string)?.unwrap_or_default()});
    if let Some(definition) = tool.opt("format", |v| Object::of(v)?.opt("definition", string))?.flatten() {
        let description = shown["description"].as_str().unwrap_or_default();
        shown["description"] = format!("{description}\nThe input follows this grammar:\n{definition}").into();
    }
    shown["parameters"] = schema.clone();
    Ok(Tool {
        name,
        shown: shown_json(&shown)?,
        schema: Some(schema),
        strict: true,
        deferred: false,
        kind: ToolKind::Custom,
    })
}

fn choice(value: &Value) -> Read<Choice> {
    if let Value::String(word) = value {
        return choice_word(word);
    }
    let choice = Object::of(value)?;
    let name = |o: Object<'_>| {
        let name = o.req("name", string)?;
        Ok(match o.opt("namespace", string)? {
            Some(namespace) => format!("{namespace}{SPACE}{name}"),
            None => name.to_owned(),
        })
    };
    match choice.kind()? {
        "function" | "custom" => Ok(Choice::Named(name(choice)?)),
        "allowed_tools" => {
            let must = choice.opt("mode", one_of(&["auto", "required"]))? == Some("required");
            Ok(Choice::Among(choice.req("tools", list(|v| name(Object::of(v)?)))?, must))
        }
        kind => Err(Bad::at("type", format!("{kind:?} is not supported"))),
    }
}

fn format(value: &Value) -> Read<Format> {
    json_format(value, |format| format.req("schema", schema))
}

struct Reader<'a> {
    app: &'a App,
    conversation: Conversation,
    tools: Vec<Tool>,
}

impl Reader<'_> {
    fn input(&mut self, value: &Value) -> Read<()> {
        if let Value::String(text) = value {
            self.conversation.user(text);
            return Ok(());
        }
        let items = array(value)?;
        if items.is_empty() {
            return Err(Bad::new("must not be empty"));
        }
        for (i, v) in items.iter().enumerate() {
            self.item(v).map_err(|bad| bad.under(i))?;
        }
        if self.conversation.ends_with_calls() {
            return Err(Bad::new("must end with the outputs of the calls"));
        }
        Ok(())
    }

    fn item(&mut self, value: &Value) -> Read<()> {
        let item = Object::of(value)?;
        let kind =
            item.opt("type", string)?.unwrap_or(if item.get("role").is_some() { "message" } else { "" });
        match kind {
            "message" => self.message(&item)?,
            "reasoning" => self.reasoning(&item)?,
            "function_call" => {
                let arguments = item.opt("arguments", arguments)?.unwrap_or_default();
                self.call(&item, arguments)?;
            }
            "custom_tool_call" => {
                let input = item.req("input", string)?;
                self.call(&item, json!({"input": input}).to_string())?;
            }
            "function_call_output" | "custom_tool_call_output" | "local_shell_call_output" => {
                self.output(&item)?;
            }
            "tool_search_call" | "local_shell_call" => self.named_call(kind, &item)?,
            "tool_search_output" => self.found_tools(&item)?,
            "additional_tools" => {
                let more = item.opt("tools", list(tools))?.unwrap_or_default().into_iter().flatten();
                self.tools.extend(more);
            }
            "item_reference" => {
                let id = item.req("id", string)?;
                let known = self.app.items().get(id).filter(|item| item["type"] != "item_reference");
                let unknown =
                    || Bad::at("id", format!("there is no item {id:?} any more: replay the full input"));
                self.item(&known.ok_or_else(unknown)?)?;
            }
            "web_search_call"
            | "image_generation_call"
            | "compaction"
            | "context_compaction"
            | "compaction_summary" => {}
            "" => return Err(Bad::at("type", "is required")),
            kind => return Err(Bad::at("type", format!("{kind:?} is not supported"))),
        }
        Ok(())
    }

    fn message(&mut self, item: &Object<'_>) -> Read<()> {
        let content = item.req("content", text)?;
        match item.req("role", string)? {
            "system" | "developer" => self.conversation.system(&content),
            "user" => self.conversation.user(&content),
            "assistant" => self.conversation.assistant(Assistant { content, ..Assistant::default() }),
            role => {
                return Err(Bad::at(
                    "role",
                    format!("{role:?} is none of system, developer, user, assistant"),
                ));
            }
        }
        Ok(())
    }

    /// The whole text where it is there, else its summary.
    fn reasoning(&mut self, item: &Object<'_>) -> Read<()> {
        let texts = |key| Ok(item.opt(key, text)?.filter(|t| !t.is_empty()));
        let reasoning = match texts("content")? {
            Some(text) => Some(text),
            None => texts("summary")?,
        };
        let reasoning = reasoning.unwrap_or_default();
        self.conversation.assistant(Assistant { reasoning, ..Assistant::default() });
        Ok(())
    }

    fn call(&mut self, item: &Object<'_>, arguments: String) -> Read<()> {
        let name = item.req("name", string)?;
        let name = match item.opt("namespace", string)? {
            Some(namespace) => format!("{namespace}{SPACE}{name}"),
            None => name.to_owned(),
        };
        let id = Some(item.req("call_id", string)?.to_owned());
        let calls = vec![ToolCall { id, name, arguments }];
        self.conversation.assistant(Assistant { calls, ..Assistant::default() });
        Ok(())
    }

    /// A call of a tool that has no name of its own.
    fn named_call(&mut self, kind: &str, item: &Object<'_>) -> Read<()> {
        let name = kind.trim_end_matches("_call").to_owned();
        let id = item.opt("call_id", string)?.or(item.opt("id", string)?).map(str::to_owned);
        let arguments = match item.get("arguments").or(item.get("action")) {
            Some(v) => arguments(v)?,
            None => "{}".into(),
        };
        let calls = vec![ToolCall { id, name, arguments }];
        self.conversation.assistant(Assistant { calls, ..Assistant::default() });
        Ok(())
    }

    fn output(&mut self, item: &Object<'_>) -> Read<()> {
        let call = item.req("call_id", string)?.to_owned();
        if !self.conversation.has_call(&call) {
            return Err(Bad::at(
                "call_id",
                format!("there is no call {call:?} in the input: replay the full input"),
            ));
        }
        let parts = item.opt("output", result_parts)?.unwrap_or_default();
        self.conversation.result(ToolResult { call, parts });
        Ok(())
    }

    /// Tools that were found: the model reads of them here, and may call them from now on.
    fn found_tools(&mut self, item: &Object<'_>) -> Read<()> {
        let found: Vec<Tool> =
            item.opt("tools", list(tools))?.unwrap_or_default().into_iter().flatten().collect();
        let call = item.opt("call_id", string)?.unwrap_or_default().to_owned();
        let parts = found.iter().map(|t| ResultPart::Text(t.shown.as_str().to_owned())).collect();
        self.conversation.result(ToolResult { call, parts });
        self.tools.extend(found.into_iter().map(|t| Tool { deferred: true, ..t }));
        Ok(())
    }
}
