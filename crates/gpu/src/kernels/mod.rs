//! The kernels, written once; each module holds those of one part of the model.
pub mod attend;
pub mod bandwidth;
pub mod cache;
pub mod common;
pub mod dot;
pub mod experts;
pub mod flash;
pub mod grouped;
pub mod hyper;
pub mod join;
pub mod matmul;
pub mod project;
pub mod select;
pub mod tables;
pub mod units;
pub mod unpack;
