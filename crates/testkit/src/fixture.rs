//! Logits and activations measured on independent implementations, with the model files they belong to.

use crate::npy::{Array, NpyError, read_npy};
use std::path::{Path, PathBuf};

/// A fixture's folder.
pub struct Fixture {
    dir: PathBuf,
}

impl Fixture {
    /// A fixture that ships with the project.
    pub fn shipped(name: &str) -> Self {
        Fixture::at(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/logits").join(name))
    }

    /// A fixture elsewhere.
    pub fn at(dir: &Path) -> Self {
        Fixture { dir: dir.into() }
    }

    /// A file of the fixture.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An array of the fixture.
    pub fn array(&self, name: &str) -> Result<Array, NpyError> {
        read_npy(&self.path(&format!("{name}.npy")))
    }

    /// The input tokens.
    pub fn tokens(&self) -> Result<Vec<u32>, NpyError> {
        Ok(self.array("tokens")?.values.iter().map(|&v| v as u32).collect())
    }

    /// Compressed rows attended to: layer, position, rows.
    pub fn indexer_rows(&self) -> Result<Vec<(usize, usize, Vec<usize>)>, NpyError> {
        let path = self.path("indexer_rows.json");
        let format = |message: String| NpyError::Format { path: path.clone(), message };
        let text = std::fs::read(&path).map_err(|source| NpyError::Io { path: path.clone(), source })?;
        type ByLayer = std::collections::BTreeMap<String, std::collections::BTreeMap<String, Vec<usize>>>;
        let layers: ByLayer = serde_json::from_slice(&text).map_err(|e| format(e.to_string()))?;
        let number = |s: &str| s.parse::<usize>().map_err(|e| format(e.to_string()));
        let mut all = Vec::new();
        for (layer, positions) in layers {
            for (position, rows) in positions {
                all.push((number(&layer)?, number(&position)?, rows));
            }
        }
        Ok(all)
    }
}
