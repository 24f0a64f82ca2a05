//! One module per command.

pub(crate) mod agents;
pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod chat;
pub(crate) mod compare;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod imatrix;
pub(crate) mod inspect;
pub(crate) mod lines;
pub(crate) mod logits;
pub(crate) mod parse;
pub(crate) mod perplexity;
pub(crate) mod quantize;
pub(crate) mod render;
pub(crate) mod serve;
pub(crate) mod tokenize;
