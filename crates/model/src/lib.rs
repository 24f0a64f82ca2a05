//! DeepSeek V4, described once.
//!
//! [`Shape`] is every dimension, read from a file's metadata and validated once. [`Weights`] are the tensors,
//! bound by name and checked once. [`Pass::forward`] is the model: it exists once, generic over a
//! [`Backend`], for one token or many, of one session or many. The section numbers in comments (A.1 ...)
//! are those of the architecture specification.
#![forbid(unsafe_code)]

mod backend;
pub mod cache;
mod error;
mod forward;
mod logits;
pub mod memory;
mod plan;
mod rope;
mod shape;
mod tap;
mod weights;

pub use backend::{Backend, BackendError, PassForm, Steps};
pub use error::Error;
pub use forward::Pass;
pub use logits::{BEST_TOKENS, Best, Detail, Logits};
pub use plan::{Plan, Run, RunRows, Want};
pub use rope::{Rope, RopeTables};
pub use shape::{LayerKind, Shape};
pub use tap::{NoTap, Tap};
pub use weights::{
    Attention, Choice, Compressor, FeedForward, HeadMix, HyperConnection, Indexer, Layer, Model, Mtp, Role,
    SharedExpert, Weights,
};
