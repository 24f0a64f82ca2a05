//! The KV cache on disk: content-addressed blocks, shared by sessions, processes and restarts.
//!
//! A [`Block`] is what a span of tokens added to a session's state, and what is needed to go on from its end. Its
//! [`Name`] is the SHA-1 of the model's [`Fingerprint`] and of all token ids up to its end, so equal prefixes are stored
//! once, and growth writes only what is new. `docs/kv-format.md` documents every byte.
#![forbid(unsafe_code)]

mod block;
mod evict;
mod name;
mod store;

pub use block::{Block, Meta, Section};
pub use name::{Fingerprint, Name, Names};
pub use store::{Found, Missing, Options, Store};

use std::path::PathBuf;

/// What is wrong with a block's file, or with the directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Its content.
    #[error("{0}")]
    Corrupt(&'static str),
    /// A file of a later ds4.
    #[error("version {version}, encoding {encoding}: written by another ds4")]
    Version {
        /// Of the format.
        version: u32,
        /// Of the sections.
        encoding: u32,
    },
}

/// Something that went wrong with a file. The store goes on without it.
#[derive(Debug, thiserror::Error)]
#[error("KV cache: {}: {error}; {outcome}", path.display())]
pub struct Problem {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong.
    pub error: Error,
    /// What was done about it.
    pub outcome: &'static str,
}
