//! The GPU backend. Kernels are written once, in Rust with CubeCL, and compiled on the user's machine for CUDA,
//! Vulkan or Metal.

mod attention;
mod backend;
mod bandwidth;
mod buffer;
mod device;
mod experts;
mod graph;
mod hyper;
mod keep;
// Kernels generate types of their own, which nobody outside sees; and their language is not all of Rust's.
#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    clippy::assign_op_pattern,
    clippy::collapsible_if,
    clippy::explicit_auto_deref,
    clippy::manual_div_ceil,
    clippy::manual_is_multiple_of,
    clippy::too_many_arguments
)]
mod kernels;
mod layout;
mod logits;
mod output;
mod project;
mod rows;
mod stage;
mod staging;
mod store;
mod timer;

pub use backend::{Gpu, Options};
pub use device::{Api, DeviceInfo, devices};
pub use keep::keep_kernels;
pub use layout::tensor_bytes;
pub use rows::{Experts, Matrix, Routes, Rows, Selection, Table, Vector};
pub use store::Store;
