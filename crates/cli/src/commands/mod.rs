//! One module per command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod quantize;
pub(crate) mod tokenize;
