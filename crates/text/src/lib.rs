//! Text of DeepSeek V4: tokenizer, chat rendering, incremental UTF-8.
//!
//! # Why the tokenizer is our own
//! Two modes are needed on one vocabulary: template text, in which markers are recognised, and client text, in
//! which nothing is ([`Mode`]). General tokenizer libraries recognise added tokens in every text; their switch
//! for this covers only those flagged special, which excludes the turn, thinking and tool-call markers. They
//! also take several times longer than [`Tokenizer::from_gguf`] to build the 128,000 entries. The algorithm is small
//! and its behaviour is pinned by the official fixtures.
#![forbid(unsafe_code)]

mod bpe;
mod chat;
mod dsml;
mod json;
mod metadata;
mod split;
mod tokenizer;
mod unicode;
mod utf8;

pub use chat::{Message, Part, Prompt, RenderError, Role, Thinking, render};
pub use dsml::{ToolCall, parse_answer};
pub use metadata::gguf_metadata;
pub use tokenizer::{Error, Mode, Tokenizer};
pub use utf8::Utf8Stream;
