//! The CPU backend: the model's steps on threads and SIMD kernels.
//!
//! The kernels' level is picked once, when the backend is made. In the default numeric mode, activations are
//! quantized to int8 before they meet quantized weights; in exact mode they stay f32 and the weights are
//! decoded. After the buffers have grown to their size in the first passes, a step allocates nothing.

mod attention;
mod backend;
mod bandwidth;
mod compress;
mod experts;
mod hyper;
pub mod kernels;
mod matrix;
mod numa;
mod pool;
mod rows;
mod select;
mod store;
#[cfg(test)]
mod threads_test;

pub use backend::{Cpu, Options};
pub use bandwidth::{in_huge_pages, read_bandwidth, read_once};
pub use matrix::{Experts, Matrix};
pub use rows::{Routes, Rows, Selection, Table};
pub use store::Store;
