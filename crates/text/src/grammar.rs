//! Grammars that answers can be held to, in Lark's notation as `llguidance` reads it: blocks of tool calls whose arguments
//! follow the tools' schemas, and JSON. Markers are single tokens, which are written by number.

use crate::{Marker, Tokenizer};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// A tool that may be called.
#[derive(Clone, Copy, Debug)]
pub struct Callable<'a> {
    /// Its name.
    pub name: &'a str,
    /// Schema of its arguments; none where nothing is known of them.
    pub schema: Option<&'a Value>,
    /// Whether a schema that cannot be followed is an error; if not, such a tool's arguments are free.
    pub strict: bool,
}

/// What an answer must be.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Tools of a block of calls; none if there may be no block.
    pub calls: &'a [Callable<'a>],
    /// Only one call in it.
    pub one_call: bool,
    /// Schema of the JSON that may stand in place of a block. Without one the text is that which follows the tag that
    /// opens a block.
    pub json: Option<&'a Value>,
}

/// Why there is no grammar.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// A schema asks for what cannot be held to.
    #[error("the schema of tool {tool:?} cannot be enforced: {why}")]
    Schema {
        /// The tool.
        tool: String,
        /// What is in the way.
        why: String,
    },
    /// The vocabulary lacks a marker.
    #[error("{0}")]
    Vocabulary(String),
}

/// White space that JSON may have in one place: a model that makes more of it never ends.
const JSON_SPACE: &str = "[\\x20\\x0A\\x0D\\x09]{1,32}";
/// Longest string whose length is counted.
const MOST_COUNTED: u64 = 4000;
/// What a schema of arguments may say besides its properties.
const KNOWN: [&str; 11] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "title",
    "description",
    "examples",
    "default",
];

/// The grammar of what is wanted.
///
/// # Errors
/// A strict tool's schema that cannot be followed, a vocabulary without the marker of tool calls.
pub fn grammar(wanted: &Wanted<'_>, tokenizer: &Tokenizer) -> Result<String, GrammarError> {
    let dsml = tokenizer.marker(Marker::Dsml).map_err(|e| GrammarError::Vocabulary(e.to_string()))?;
    let mut writer = Writer { dsml: format!("<[{dsml}]>"), rules: String::new() };
    let block = writer.block(wanted)?;
    let start = match wanted.json {
        None => format!("SPACE? {block}"),
        Some(schema) => {
            let json = writer.json("json", schema.clone());
            let opening = format!("\"\\n\\n<\" {} \"tool_calls>\" SPACE? {block}", writer.dsml);
            if wanted.calls.is_empty() { json } else { format!("{json} | {opening}") }
        }
    };
    Ok(format!(
        "start: {start}\nSPACE: /[ \\n]{{1,4}}/\nRAW: /(?s:.*)<\\//\nKEY: /[^\"\\n<>]{{1,200}}/\n{}",
        writer.rules
    ))
}

struct Writer {
    dsml: String,
    rules: String,
}

impl Writer {
    fn rule(&mut self, name: &str, body: &str) {
        let _ = writeln!(self.rules, "{name}: {body}");
    }

    /// A rule for JSON of a schema; its name.
    fn json(&mut self, name: &str, mut schema: Value) -> String {
        if schema == Value::Bool(true) {
            schema = json!({});
        }
        if let Value::Object(members) = &mut schema {
            members.insert("x-guidance".into(), json!({"whitespace_pattern": JSON_SPACE}));
        }
        self.rule(name, &format!("%json {schema}"));
        name.to_owned()
    }

    /// What follows the tag that opens a block.
    fn block(&mut self, wanted: &Wanted<'_>) -> Result<String, GrammarError> {
        let mut names = Vec::new();
        for (i, tool) in wanted.calls.iter().enumerate() {
            self.tool(i, tool)?;
            names.push(format!("tool{i}"));
        }
        if names.is_empty() {
            return Ok(String::new());
        }
        let names = names.join(" | ");
        self.rule("call", &names);
        let calls = if wanted.one_call { "call" } else { "call+" };
        Ok(format!("{calls} \"</\" {} \"tool_calls>\"", self.dsml))
    }

    fn tool(&mut self, i: usize, tool: &Callable<'_>) -> Result<(), GrammarError> {
        let before = self.rules.len();
        let parameters = match tool.schema.map(|schema| self.parameters(i, schema)) {
            Some(Ok(parameters)) => parameters,
            Some(Err(why)) if tool.strict => {
                return Err(GrammarError::Schema { tool: tool.name.to_owned(), why });
            }
            _ => {
                self.rules.truncate(before);
                self.free_parameters(i)
            }
        };
        let (dsml, name) = (&self.dsml, literal(&format!("invoke name=\"{}\">\n", tool.name)));
        let body = format!("\"<\" {dsml} {name} {parameters} \"\\n\"? \"</\" {dsml} \"invoke>\\n\"");
        self.rule(&format!("tool{i}"), &body);
        Ok(())
    }

    /// Parameters of any name.
    fn free_parameters(&mut self, i: usize) -> String {
        let any = self.json(&format!("any{i}"), json!({}));
        let dsml = &self.dsml;
        let body = format!(
            "\"<\" {dsml} \"parameter name=\\\"\" KEY \"\\\" string=\\\"\" (\"true\\\">\" RAW | \"false\\\">\" {any} \"</\") \
             {dsml} \"parameter>\\n\""
        );
        let name = format!("free{i}");
        self.rule(&name, &body);
        format!("{name}*")
    }

    /// The parameters of a schema, in its order: the required ones, and any of the others.
    fn parameters(&mut self, i: usize, schema: &Value) -> Result<String, String> {
        let Value::Object(members) = schema else { return Err("it is no object".into()) };
        if let Some(key) = members.keys().find(|k| !KNOWN.contains(&k.as_str())) {
            return Err(format!("{key:?} beside the properties"));
        }
        if members.get("type").is_some_and(|t| t != "object") {
            return Err("its type is not \"object\"".into());
        }
        let empty = Map::new();
        let properties = match members.get("properties") {
            None => &empty,
            Some(Value::Object(properties)) => properties,
            Some(_) => return Err("\"properties\" is no object".into()),
        };
        let required: Vec<&str> = match members.get("required") {
            None => Vec::new(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            Some(_) => return Err("\"required\" is no array".into()),
        };
        if let Some(name) = required.iter().find(|name| !properties.contains_key(**name)) {
            return Err(format!("it requires {name:?}, which is none of its properties"));
        }
        if properties.is_empty() && members.get("additionalProperties") != Some(&Value::Bool(false)) {
            return Ok(self.free_parameters(i));
        }
        let mut parameters = Vec::new();
        for (n, (key, property)) in properties.iter().enumerate() {
            let name = format!("p{i}x{n}");
            self.parameter(&name, key, property, members)?;
            parameters.push(if required.contains(&key.as_str()) { name } else { format!("{name}?") });
        }
        Ok(parameters.join(" "))
    }

    fn parameter(
        &mut self,
        name: &str,
        key: &str,
        schema: &Value,
        root: &Map<String, Value>,
    ) -> Result<(), String> {
        if key.is_empty() || key.contains(['"', '\n', '<', '>']) {
            return Err(format!("no property can have the name {key:?}"));
        }
        let is_string = raw_string(schema);
        let value = match &is_string {
            Some(raw) => raw.clone(),
            None => {
                let mut schema = schema.clone();
                if let Value::Object(members) = &mut schema {
                    // What it refers to stands beside the properties.
                    for key in ["$defs", "definitions"] {
                        if let Some(defs) = root.get(key) {
                            members.entry(key).or_insert_with(|| defs.clone());
                        }
                    }
                }
                format!("{} \"</\"", self.json(&format!("{name}v"), schema))
            }
        };
        let opening = literal(&format!("parameter name=\"{key}\" string=\"{}\">", is_string.is_some()));
        let dsml = &self.dsml;
        let body = format!("\"<\" {dsml} {opening} {value} {dsml} \"parameter>\\n\"");
        self.rule(name, &body);
        Ok(())
    }
}

/// The text of a parameter that is a string, with the beginning of its closing tag, if it can be written as it is; others
/// are written as JSON.
fn raw_string(schema: &Value) -> Option<String> {
    let members = schema.as_object()?;
    let choices = match (members.get("enum"), members.get("const")) {
        (Some(Value::Array(values)), None) => Some(values.iter().collect::<Vec<_>>()),
        (None, Some(value)) => Some(vec![value]),
        (None, None) => None,
        _ => return None,
    };
    if members.get("type").map_or(choices.is_none(), |t| t != "string") {
        return None;
    }
    let allowed =
        ["type", "enum", "const", "minLength", "maxLength", "title", "description", "default", "examples"];
    if members.keys().any(|k| !allowed.contains(&k.as_str())) {
        return None;
    }
    if let Some(choices) = choices {
        let texts: Option<Vec<String>> =
            choices.iter().map(|v| Some(literal(&format!("{}</", v.as_str()?)))).collect();
        return texts.filter(|t| !t.is_empty()).map(|texts| format!("({})", texts.join(" | ")));
    }
    let length = |key| members.get(key).map(|v| v.as_u64().filter(|n| *n <= MOST_COUNTED));
    match (length("minLength"), length("maxLength")) {
        (None, None) => Some("RAW".into()),
        (Some(None), _) | (_, Some(None)) => None,
        (least, most) => {
            let least = least.flatten().unwrap_or(0);
            let most = most.flatten().map(|n| n.to_string()).unwrap_or_default();
            Some(format!("/(?s:.{{{least},{most}}})<\\//"))
        }
    }
}

/// Text as a literal of the grammar.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
