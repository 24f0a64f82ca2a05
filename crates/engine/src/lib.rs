//! The engine: a loaded model, sessions, and the sampler.
//!
//! An [`Engine`] is the loaded model on a backend; it computes. A [`Session`] is one mutable timeline of
//! tokens with its cache. Callers hand over the whole prefix they want; the engine reuses, extends or rewinds
//! the session to get there. [`Generation`] samples from a session until something stops it.
#![forbid(unsafe_code)]

mod constraint;
mod disk;
mod engine;
mod generate;
mod repetition;
mod sampler;
pub mod scheduler;
mod script;
mod session;

pub use constraint::{Constraint, Grammars, TokenSet};
pub use disk::{Disk, fingerprint};
pub use engine::{Engine, EngineOptions, Error, Progress, SessionSnapshot, Synced, Work};
pub use generate::{Chooser, Event, Finish, Generation, Guide};
pub use sampler::{Bounds, Logprob, Sampler, Sampling, log_probabilities};
pub use script::{Script, Scripted};
pub use session::Session;
