//! What requests of several dialects have in common.

use crate::app::App;
use crate::ask::{Choice, Format, Tool, ToolKind, Wishes};
use crate::read::{Bad, Object, Read, boolean, count, list, string, within};
use ds4_text::{Json, ResultPart};
use serde_json::{Map, Value};

/// The model's name in the request; any will do, because there is only one model.
pub(crate) fn model(app: &App, body: &Object<'_>) -> Read<String> {
    Ok(body.opt("model", string)?.filter(|m| !m.is_empty()).unwrap_or(&app.options.model).to_owned())
}

/// What clients say of sampling, in the words of all dialects.
pub(crate) fn wishes(body: &Object<'_>) -> Read<Wishes> {
    Ok(Wishes {
        temperature: body.opt("temperature", within(0.0, 2.0))?,
        top_p: body.opt("top_p", within(0.0, 1.0))?,
        top_k: body.opt("top_k", |v| if v.as_i64() == Some(-1) { Ok(0) } else { count(0)(v) })?,
        min_p: body.opt("min_p", within(0.0, 1.0))?,
        seed: body.opt("seed", |v| match (v.as_u64(), v.as_i64()) {
            (Some(seed), _) => Ok(seed),
            (None, Some(seed)) => Ok(seed as u64),
            _ => Err(Bad::new("must be a whole number")),
        })?,
    })
}

pub(crate) fn penalties(body: &Object<'_>, sampling: &mut ds4_engine::Sampling) -> Read<()> {
    sampling.presence_penalty = body.opt("presence_penalty", within(-2.0, 2.0))?.unwrap_or(0.0);
    sampling.frequency_penalty = body.opt("frequency_penalty", within(-2.0, 2.0))?.unwrap_or(0.0);
    sampling.repetition_penalty = body.opt("repetition_penalty", within(0.1, 10.0))?.unwrap_or(1.0);
    let bias = body.opt("logit_bias", |v| {
        let each = Object::of(v)?.0.iter().map(|(token, bias)| {
            let id = token.parse::<u32>().map_err(|_| Bad::at(token, "is no number of a token"))?;
            Ok((id, within(-100.0, 100.0)(bias).map_err(|bad| bad.under(token))?))
        });
        each.collect::<Read<Vec<_>>>()
    })?;
    sampling.logit_bias = bias.unwrap_or_default();
    Ok(())
}

/// Strings that end the answer.
pub(crate) fn stop(value: &Value) -> Read<Vec<String>> {
    let texts = match value {
        Value::String(text) => vec![text.clone()],
        other => list(|v| string(v).map(str::to_owned))(other)?,
    };
    if texts.len() > 64 {
        return Err(Bad::new("must be at most 64 strings"));
    }
    match texts.iter().position(String::is_empty) {
        Some(i) => Err(Bad::at(i, "must not be empty")),
        None => Ok(texts),
    }
}

/// Text, or parts that are text.
pub(crate) fn text(value: &Value) -> Read<String> {
    if let Value::String(text) = value {
        return Ok(text.clone());
    }
    let part = |v| {
        let part = Object::of(v)?;
        match part.kind()? {
            "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text" => {
                part.req("text", string)
            }
            "refusal" => part.req("refusal", string),
            kind => Err(Bad::at("type", format!("{kind:?} is not supported: the model reads text only"))),
        }
    };
    match value {
        Value::Array(_) => Ok(list(part)(value)?.join("\n\n")),
        _ => Err(Bad::new("must be a string or an array of parts")),
    }
}

/// What a tool gave: text, or parts of which those that are no text are only mentioned.
pub(crate) fn result_parts(value: &Value) -> Read<Vec<ResultPart>> {
    let part = |v| {
        let part = Object::of(v)?;
        Ok(match part.kind()? {
            "text" | "input_text" | "output_text" => ResultPart::Text(part.req("text", string)?.to_owned()),
            kind => ResultPart::Unsupported(kind.to_owned()),
        })
    };
    match value {
        Value::String(text) => Ok(vec![ResultPart::Text(text.clone())]),
        Value::Array(_) => list(part)(value),
        other => Ok(vec![ResultPart::Text(other.to_string())]),
    }
}

/// Arguments as text, or as the object that they are.
pub(crate) fn arguments(value: &Value) -> Read<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    })
}

/// A tool that is a function, from the object that has its name.
pub(crate) fn function_tool(value: &Value) -> Read<Tool> {
    let function = Object::of(value)?;
    let name = tool_name(&function)?;
    let schema = function.opt("parameters", |v| Object::of(v).map(|_| v.clone()))?;
    let shown: Map<String, Value> =
        function.0.iter().filter(|(key, _)| *key != "type").map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(Tool {
        name,
        shown: shown_json(&Value::Object(shown))?,
        schema,
        strict: function.opt("strict", boolean)?.unwrap_or(false),
        deferred: function.opt("defer_loading", boolean)?.unwrap_or(false),
        kind: ToolKind::Function,
    })
}

pub(crate) fn tool_name(tool: &Object<'_>) -> Read<String> {
    let name = tool.req("name", string)?;
    if name.is_empty() || name.len() > 256 || name.contains(['"', '\n', '<', '>']) {
        return Err(Bad::at(
            "name",
            "must be 1 to 256 characters without quotes, angle brackets and line ends",
        ));
    }
    Ok(name.to_owned())
}

/// A tool's description as the model reads it.
pub(crate) fn shown_json(value: &Value) -> Read<Json> {
    Json::parse(&value.to_string()).map_err(|e| Bad::new(e.to_string()))
}

/// A choice of tools that is a word.
pub(crate) fn choice_word(word: &str) -> Read<Choice> {
    match word {
        "auto" => Ok(Choice::Auto),
        "none" => Ok(Choice::None),
        "required" => Ok(Choice::Required),
        _ => Err(Bad::new(format!("must be auto, none, required or a tool, is {word:?}"))),
    }
}

/// What an answer must look like, in OpenAI's dialects, which have the schema in different places.
pub(crate) fn json_format<'a>(
    value: &'a Value,
    with_schema: impl FnOnce(Object<'a>) -> Read<Format>,
) -> Read<Format> {
    let format = Object::of(value)?;
    match format.kind()? {
        "text" => Ok(Format::Text),
        "json_object" => Ok(Format::JsonObject),
        "json_schema" => with_schema(format),
        kind => Err(Bad::at("type", format!("must be text, json_object or json_schema, is {kind:?}"))),
    }
}

/// A format that is a schema.
pub(crate) fn schema(value: &Value) -> Read<Format> {
    Object::of(value).map(|_| Format::Schema(value.clone()))
}
