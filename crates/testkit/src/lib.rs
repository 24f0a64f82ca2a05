//! What proofs are made with: `.npy` arrays, fixtures measured on other implementations, and the comparison
//! of named tensors.
#![forbid(unsafe_code)]

mod compare;
mod fixture;
mod npy;
mod taps;

pub use compare::{Difference, compare};
pub use fixture::Fixture;
pub use npy::{Array, NpyError, NpyWriter, read_npy};
pub use taps::{NpyTaps, Taps};
