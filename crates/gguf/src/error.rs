use std::path::PathBuf;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The bytes are not a GGUF file this engine reads.
    #[error("{file}: {field} at byte {offset}: {problem}")]
    Format {
        /// File or label.
        file: String,
        /// Field, such as `tensor blk.0.attn_kv.weight offset`.
        field: String,
        /// Where it is.
        offset: u64,
        /// What is wrong with it, and what was expected.
        problem: String,
    },
    /// A metadata key that is needed is not there.
    #[error("metadata key {key} is missing")]
    MissingKey {
        /// Full key.
        key: String,
    },
    /// A metadata value is of another type.
    #[error("metadata key {key} is {found}, expected {expected}")]
    KeyType {
        /// Full key.
        key: String,
        /// Type or value in the file.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// What was given to the writer contradicts itself.
    #[error("cannot write: {0}")]
    Write(String),
}
