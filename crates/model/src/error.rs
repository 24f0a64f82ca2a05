use crate::BackendError;
use ds4_gguf::TensorType;

/// Why a file is not a model this engine can run, or a pass could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A metadata key is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] ds4_gguf::Error),
    /// A metadata value contradicts the architecture or another value.
    #[error("metadata key {key}: found {found}, expected {expected}")]
    Shape {
        /// Full key, with its prefix.
        key: String,
        /// Value in the file.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// A tensor the shape calls for is not in the file.
    #[error("tensor {name} is missing from {file}: the file is incomplete or of another architecture")]
    MissingTensor {
        /// Tensor name.
        name: String,
        /// File searched.
        file: String,
    },
    /// A tensor has other dimensions than the metadata say.
    #[error(
        "tensor {name} has dimensions {found:?} (fastest first), expected {expected:?} from the metadata"
    )]
    TensorDims {
        /// Tensor name.
        name: String,
        /// In the file.
        found: Vec<u64>,
        /// From the shape.
        expected: Vec<u64>,
    },
    /// A tensor is stored in a type this engine does not compute with.
    #[error("tensor {name} has type {found:?}, expected {expected}")]
    TensorType {
        /// Tensor name.
        name: String,
        /// In the file.
        found: TensorType,
        /// What is accepted.
        expected: &'static str,
    },
    /// An integer table points outside its range.
    #[error("tensor {name} contains {value}, expected 0..{limit}")]
    TableValue {
        /// Tensor name.
        name: String,
        /// Offending value.
        value: i64,
        /// Exclusive upper bound.
        limit: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    Token {
        /// Offending id.
        token: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// More rows in one pass than its buffers hold.
    #[error("a pass of {rows} rows was asked for, its buffers hold {capacity}")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
        /// Rows allocated.
        capacity: usize,
    },
    /// A run would go past the session's context.
    #[error("position {end} is beyond the session's context of {context} tokens")]
    ContextFull {
        /// First position after the run.
        end: usize,
        /// Capacity of the session.
        context: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
