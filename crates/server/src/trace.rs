//! Requests and answers in a file, for whoever looks for what a client does. No headers: they hold keys.

use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A file of lines of JSON.
pub(crate) struct Trace {
    file: Mutex<File>,
}

impl Trace {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        // Conversations are nobody else's business.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Trace { file: Mutex::new(file) })
    }

    /// Adds a line.
    pub(crate) fn write(&self, line: &Value) {
        let mut text = line.to_string();
        text.push('\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = file.write_all(text.as_bytes()) {
            tracing::warn!("the trace cannot be written: {e}");
        }
    }
}
