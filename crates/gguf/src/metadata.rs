//! Typed metadata.

use crate::Error;
use std::collections::HashMap;

/// A metadata value. Arrays are typed as a whole.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    ArrayU8(Vec<u8>),
    ArrayI8(Vec<i8>),
    ArrayU16(Vec<u16>),
    ArrayI16(Vec<i16>),
    ArrayU32(Vec<u32>),
    ArrayI32(Vec<i32>),
    ArrayF32(Vec<f32>),
    ArrayBool(Vec<bool>),
    ArrayString(Vec<String>),
    ArrayU64(Vec<u64>),
    ArrayI64(Vec<i64>),
    ArrayF64(Vec<f64>),
    /// An array of arrays.
    Nested(Vec<Value>),
}

impl Value {
    /// Name of the type, for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
            Value::ArrayU8(_) => "array of u8",
            Value::ArrayI8(_) => "array of i8",
            Value::ArrayU16(_) => "array of u16",
            Value::ArrayI16(_) => "array of i16",
            Value::ArrayU32(_) => "array of u32",
            Value::ArrayI32(_) => "array of i32",
            Value::ArrayF32(_) => "array of f32",
            Value::ArrayBool(_) => "array of bool",
            Value::ArrayString(_) => "array of string",
            Value::ArrayU64(_) => "array of u64",
            Value::ArrayI64(_) => "array of i64",
            Value::ArrayF64(_) => "array of f64",
            Value::Nested(_) => "array of arrays",
        }
    }

    /// Whether it is an array of any kind.
    pub(crate) fn is_array(&self) -> bool {
        self.type_name().starts_with("array")
    }

    /// Any integer type, as i128.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// Any numeric type.
    fn float(&self) -> Option<f32> {
        match *self {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => self.integer().map(|v| v as f32),
        }
    }

    /// Elements of any integer array.
    fn integers(&self) -> Option<Vec<i128>> {
        fn wide<T: Copy + Into<i128>>(v: &[T]) -> Option<Vec<i128>> {
            Some(v.iter().map(|&v| v.into()).collect())
        }
        match self {
            Value::ArrayU8(v) => wide(v),
            Value::ArrayI8(v) => wide(v),
            Value::ArrayU16(v) => wide(v),
            Value::ArrayI16(v) => wide(v),
            Value::ArrayU32(v) => wide(v),
            Value::ArrayI32(v) => wide(v),
            Value::ArrayU64(v) => wide(v),
            Value::ArrayI64(v) => wide(v),
            _ => None,
        }
    }
}

/// Metadata in file order, with typed getters whose errors name the key.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $opt:ident -> $ty:ty, $expected:literal, $convert:expr;)*) => {$(
        $(#[$doc])*
        pub fn $name(&self, key: &str) -> Result<$ty, Error> {
            self.$opt(key)?.ok_or_else(|| Error::MissingKey { key: key.into() })
        }

        /// The same; `None` where the key is absent.
        pub fn $opt(&self, key: &str) -> Result<Option<$ty>, Error> {
            let convert: fn(&Value) -> Option<$ty> = $convert;
            let Some(value) = self.get(key) else { return Ok(None) };
            match convert(value) {
                Some(v) => Ok(Some(v)),
                None => Err(mistyped(key, value, $expected)),
            }
        }
    )*};
}

fn mistyped(key: &str, value: &Value, expected: &'static str) -> Error {
    let found = match value.integer() {
        Some(v) => format!("{} {v}", value.type_name()),
        None => value.type_name().to_string(),
    };
    Error::KeyType { key: key.into(), found, expected }
}

impl Metadata {
    /// Adds or replaces a value.
    pub fn set(&mut self, key: &str, value: Value) {
        match self.index.get(key) {
            Some(&i) => self.entries[i].1 = value,
            None => {
                self.index.insert(key.into(), self.entries.len());
                self.entries.push((key.into(), value));
            }
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// All entries in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    getters! {
        /// An unsigned 32-bit number, from any integer type it fits.
        u32, opt_u32 -> u32, "an integer from 0 to 4294967295", |v| v.integer()?.try_into().ok();
        /// An unsigned 64-bit number, from any integer type it fits.
        u64, opt_u64 -> u64, "a non-negative integer", |v| v.integer()?.try_into().ok();
        /// A number, from any numeric type.
        f32, opt_f32 -> f32, "a number", |v| v.float();
        /// A truth value.
        bool, opt_bool -> bool, "a bool", |v| match v { Value::Bool(b) => Some(*b), _ => None };
        /// Numbers from any integer array that fits.
        u32_array, opt_u32_array -> Vec<u32>, "an array of integers from 0 to 4294967295",
            |v| v.integers()?.into_iter().map(|v| v.try_into().ok()).collect();
        /// Numbers from any integer array that fits.
        i32_array, opt_i32_array -> Vec<i32>, "an array of 32-bit integers",
            |v| v.integers()?.into_iter().map(|v| v.try_into().ok()).collect();
        /// Numbers from any numeric array.
        f32_array, opt_f32_array -> Vec<f32>, "an array of numbers", |v| match v {
            Value::ArrayF32(v) => Some(v.clone()),
            Value::ArrayF64(v) => Some(v.iter().map(|&v| v as f32).collect()),
            v => Some(v.integers()?.into_iter().map(|v| v as f32).collect()),
        };
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        self.opt_str(key)?.ok_or_else(|| Error::MissingKey { key: key.into() })
    }

    /// The same; `None` where the key is absent.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => Err(mistyped(key, v, "a string")),
        }
    }

    /// Strings.
    pub fn str_array(&self, key: &str) -> Result<&[String], Error> {
        match self.get(key) {
            None => Err(Error::MissingKey { key: key.into() }),
            Some(Value::ArrayString(v)) => Ok(v),
            Some(v) => Err(mistyped(key, v, "an array of strings")),
        }
    }
}
