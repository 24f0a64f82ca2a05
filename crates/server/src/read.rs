//! Reading JSON whose shape nobody promised: every error says where in the body it is.

use serde_json::{Map, Value};
use std::fmt::Display;

/// What is wrong with a body, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bad {
    /// Keys and indexes with dots between them, as `messages.0.content`; empty for the body itself.
    pub(crate) path: String,
    pub(crate) message: String,
}

pub(crate) type Read<T> = Result<T, Bad>;

impl Bad {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Bad { path: String::new(), message: message.into() }
    }

    /// The same error seen from one level above.
    pub(crate) fn under(mut self, key: impl Display) -> Self {
        self.path = if self.path.is_empty() { key.to_string() } else { format!("{key}.{}", self.path) };
        self
    }

    /// An error of a member.
    pub(crate) fn at(key: impl Display, message: impl Into<String>) -> Self {
        Bad::new(message).under(key)
    }
}

/// The members of an object. A member that is null counts as one that is not there.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Object<'a> {
    pub(crate) fn of(value: &'a Value) -> Read<Self> {
        value.as_object().map(Object).ok_or_else(|| expected("an object", value))
    }

    /// A member as it is.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// A member that may be missing.
    pub(crate) fn opt<T>(&self, key: &str, read: impl FnOnce(&'a Value) -> Read<T>) -> Read<Option<T>> {
        self.get(key).map(read).transpose().map_err(|bad| bad.under(key))
    }

    /// A member that must be there.
    pub(crate) fn req<T>(&self, key: &str, read: impl FnOnce(&'a Value) -> Read<T>) -> Read<T> {
        self.opt(key, read)?.ok_or_else(|| Bad::at(key, "is required"))
    }

    /// The member `type`, by which objects of a union differ.
    pub(crate) fn kind(&self) -> Read<&'a str> {
        self.req("type", string)
    }
}

pub(crate) fn string(value: &Value) -> Read<&str> {
    value.as_str().ok_or_else(|| expected("a string", value))
}

pub(crate) fn boolean(value: &Value) -> Read<bool> {
    value.as_bool().ok_or_else(|| expected("true or false", value))
}

pub(crate) fn number(value: &Value) -> Read<f64> {
    value.as_f64().ok_or_else(|| expected("a number", value))
}

/// A number in a range, as f32.
pub(crate) fn within(least: f64, most: f64) -> impl Fn(&Value) -> Read<f32> {
    move |value| match number(value)? {
        n if (least..=most).contains(&n) => Ok(n as f32),
        n => Err(Bad::new(format!("must be from {least} to {most}, is {n}"))),
    }
}

/// A count that is at least `least`.
pub(crate) fn count(least: u64) -> impl Fn(&Value) -> Read<usize> {
    move |value| {
        // 5.0 is what some languages write for 5.
        let whole = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0).map(|n| n as u64));
        match whole {
            Some(n) if n >= least => Ok(usize::try_from(n).unwrap_or(usize::MAX)),
            Some(n) => Err(Bad::new(format!("must be at least {least}, is {n}"))),
            None if value.is_number() => {
                Err(Bad::new(format!("must be a whole number of at least {least}, is {value}")))
            }
            None => Err(expected("a whole number", value)),
        }
    }
}

pub(crate) fn array(value: &Value) -> Read<&[Value]> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| expected("an array", value))
}

/// An array, element by element.
pub(crate) fn list<'a, T>(
    mut read: impl FnMut(&'a Value) -> Read<T>,
) -> impl FnMut(&'a Value) -> Read<Vec<T>> {
    move |value| {
        let each = array(value)?.iter().enumerate();
        each.map(|(i, v)| read(v).map_err(|bad| bad.under(i))).collect()
    }
}

/// One of some words.
pub(crate) fn one_of<'a>(words: &'static [&'static str]) -> impl Fn(&'a Value) -> Read<&'static str> {
    move |value| {
        let text = string(value)?;
        let word = words.iter().find(|w| **w == text);
        word.copied().ok_or_else(|| Bad::new(format!("must be one of {}, is {text:?}", words.join(", "))))
    }
}

fn expected(what: &str, value: &Value) -> Bad {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    Bad::new(format!("must be {what}, is {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_say_where() {
        let body = json!({"messages": [{"content": "a"}, {"content": 5}], "n": 1.5, "top": null, "t": 3});
        let object = Object::of(&body).unwrap();
        let content = |v| Object::of(v)?.req("content", string);
        let bad = object.req("messages", list(content)).unwrap_err();
        assert_eq!(
            (bad.path.as_str(), bad.message.as_str()),
            ("messages.1.content", "must be a string, is a number")
        );
        assert_eq!(object.req("model", string).unwrap_err(), Bad::at("model", "is required"));
        assert_eq!(object.opt("top", string), Ok(None));
        assert_eq!(object.req("n", count(0)).unwrap_err().path, "n");
        assert_eq!(object.req("t", count(4)).unwrap_err().message, "must be at least 4, is 3");
        assert_eq!(object.req("t", within(0.0, 2.0)).unwrap_err().message, "must be from 0 to 2, is 3");
        assert!(object.req("t", one_of(&["a"])).is_err());
    }
}
