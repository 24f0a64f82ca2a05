use std::path::PathBuf;

/// Why a checkpoint could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Not valid JSON, or a field is missing or of another type.
    #[error("{path}: {source}")]
    Json {
        /// File.
        path: PathBuf,
        /// Cause.
        source: serde_json::Error,
    },
    /// Not a valid safetensors file.
    #[error("{path}: {source}")]
    Safetensors {
        /// File.
        path: PathBuf,
        /// Cause.
        source: safetensors::SafeTensorError,
    },
    /// The folder holds no weights.
    #[error("{0}: no .safetensors file in this folder")]
    NoWeights(PathBuf),
    /// The configuration contradicts itself.
    #[error("config.json: {0}")]
    Config(String),
    /// A tensor the configuration calls for is missing.
    #[error("tensor {0} is in none of the checkpoint's files")]
    MissingTensor(String),
    /// A tensor has another shape or type than the configuration says.
    #[error("tensor {name}: found {found}, expected {expected}")]
    Tensor {
        /// Name in the checkpoint.
        name: String,
        /// Shape or type in the file.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// A file that should be an importance matrix is none, or one of another model.
    #[error("{path}: {what}")]
    Imatrix {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// What was asked for cannot be done with this checkpoint.
    #[error("{0}")]
    Plan(String),
    /// Reading or writing GGUF, or mapping a file.
    #[error(transparent)]
    Gguf(#[from] ds4_gguf::Error),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] ds4_text::Error),
}
