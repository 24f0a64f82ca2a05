//! Compiled kernels on disk: compiling all of a model's takes tens of seconds, loading them a moment.

use cubecl_environment::config::RuntimeConfig as _;
use cubecl_environment::persistence::CacheConfig;
use cubecl_runtime::config::CubeClRuntimeConfig;
use std::path::Path;

/// Keeps compiled kernels in a directory from now on, or nowhere; to be said before any other use of GPUs, and only the
/// first time counts. A directory that cannot be written costs the compiling, no more. Without this call, files and
/// variables of the surroundings would decide.
pub fn keep_kernels(directory: Option<&Path>) {
    let mut config = CubeClRuntimeConfig::default();
    config.compilation.cache = directory.is_some();
    if let Some(directory) = directory {
        config.environment.path = CacheConfig::Directory(directory.to_owned());
    }
    CubeClRuntimeConfig::try_set(config);
}
