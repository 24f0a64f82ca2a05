//! What proofs are made with: `.npy` arrays, fixtures measured on other implementations, models of random
//! weights, the comparison of named tensors, and the checks that every backend must pass.
#![forbid(unsafe_code)]

mod compare;
pub mod conformance;
mod fixture;
mod idle;
mod npy;
mod synthetic;
mod taps;

pub use compare::{Difference, compare};
pub use fixture::Fixture;
pub use idle::Idle;
pub use npy::{Array, NpyError, NpyWriter, read_npy};
pub use synthetic::{Random, Synthetic};
pub use taps::{NpyTaps, Taps};
