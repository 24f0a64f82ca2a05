//! GGUF, version 3 (`gguf.md` section 1): a memory-mapped reader with typed metadata, and a writer.
//!
//! Files are hostile until shown otherwise: every count, length, offset and string is checked against the
//! bytes that are left before it is used, so that a truncated or lying file gives an [`Error`] naming the
//! field, never a panic. Header and directory must end within 256 MiB, which bounds what they can make us allocate.

mod error;
mod map;
mod metadata;
mod read;
mod resume;
mod tensor_type;
mod write;

pub use error::Error;
pub use map::MappedFile;
pub use metadata::{Metadata, Value};
pub use read::{Gguf, Part, Tensor, TensorInfo};
pub use resume::Resume;
pub use tensor_type::TensorType;
pub use write::{Data, Writer};

/// `GGUF`, little endian.
pub(crate) const MAGIC: u32 = 0x4655_4747;
/// The only version read and written.
pub(crate) const VERSION: u32 = 3;
/// Alignment of tensor data where the file does not say.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// Metadata key of the alignment.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
