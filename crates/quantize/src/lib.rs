//! Makes GGUF files from the official checkpoint form (`gguf.md` sections 2 and 3).
//!
//! A checkpoint is a folder of safetensors shards with `config.json` and `tokenizer.json`: dense weights in FP8
//! E4M3 with a power-of-two scale per 128x128 block, experts in packed FP4 E2M1 with a scale per 32 inputs,
//! the rest in BF16 or F32. Tensors are read one block of rows at a time from the mapped files, so that
//! memory does not grow with the model.
#![forbid(unsafe_code)]

mod checkpoint;
mod compare;
mod config;
mod convert;
mod error;
mod imatrix;
mod names;
mod plan;
pub mod quality;
mod recipe;

pub use checkpoint::{Checkpoint, Matrix};
pub use compare::{Compared, compare};
pub use config::Config;
pub use convert::{Progress, Tallies, Tally};
pub use error::Error;
pub use imatrix::{Collector, Imatrix, Moments};
pub use plan::{Content, Options, Plan, Planned};
pub use recipe::{Override, Recipe};
