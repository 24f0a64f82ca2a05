//! Tool calls in a finished answer, by the strict grammar (`prompt.md` section 10.1).

use serde_json::{Map, Value};

/// A tool call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Tool name.
    pub name: String,
    /// Arguments, a JSON object.
    pub arguments: Map<String, Value>,
}

const OPEN: &str = "\n\n<｜DSML｜tool_calls>\n";
const CLOSE: &str = "</｜DSML｜tool_calls>";

/// Splits an answer into its text and its calls; `None` if there is a block that is not well formed.
pub fn parse_answer(text: &str) -> Option<(&str, Vec<ToolCall>)> {
    let Some((content, block)) = text.split_once(OPEN) else {
        return (!text.contains("｜DSML｜")).then_some((text, Vec::new()));
    };
    let mut calls = Vec::new();
    let mut rest = block;
    loop {
        if let Some(after) = rest.strip_prefix(CLOSE) {
            return after.is_empty().then_some((content, calls));
        }
        let (call, after) = invoke(rest)?;
        calls.push(call);
        rest = after;
    }
}

fn invoke(text: &str) -> Option<(ToolCall, &str)> {
    let (name, mut rest) = text.strip_prefix("<｜DSML｜invoke name=\"")?.split_once("\">\n")?;
    let mut arguments = Map::new();
    while let Some(parameter) = rest.strip_prefix("<｜DSML｜parameter name=\"") {
        let (key, after) = parameter.split_once("\" string=\"")?;
        let (kind, after) = after.split_once("\">")?;
        let (value, after) = after.split_once("</｜DSML｜parameter>\n")?;
        let value = match kind {
            "true" => Value::String(value.into()),
            "false" => serde_json::from_str(value).ok()?,
            _ => return None,
        };
        if arguments.insert(key.into(), value).is_some() {
            return None;
        }
        rest = after;
    }
    // A call without arguments may have an empty line.
    let rest = rest.strip_prefix('\n').unwrap_or(rest).strip_prefix("</｜DSML｜invoke>\n")?;
    Some((ToolCall { name: name.into(), arguments }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: &str = "Let me look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n\
        <｜DSML｜parameter name=\"city\" string=\"true\">Lima</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
        <｜DSML｜invoke name=\"now\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

    #[test]
    fn calls() {
        let (content, calls) = parse_answer(CALL).unwrap();
        assert_eq!(content, "Let me look.");
        assert_eq!(calls[0].name, "weather");
        assert_eq!(Value::from(calls[0].arguments.clone()), serde_json::json!({"city": "Lima", "days": 3}));
        assert_eq!((calls[1].name.as_str(), calls[1].arguments.len()), ("now", 0));
        assert_eq!(parse_answer("plain").unwrap(), ("plain", vec![]));
    }

    #[test]
    fn malformed() {
        // Cut anywhere behind the first marker: a block that is not closed.
        let marker = "｜DSML｜";
        let first = CALL.find(marker).unwrap() + marker.len();
        for end in (first..CALL.len()).filter(|&i| CALL.is_char_boundary(i)) {
            assert_eq!(parse_answer(&CALL[..end]), None, "{:?}", &CALL[..end]);
        }
        assert_eq!(parse_answer(&format!("{CALL} and more")), None);
        assert_eq!(parse_answer(&CALL.replace(">3<", ">three<")), None);
        assert_eq!(parse_answer(&CALL.replace("days", "city")), None);
    }
}
