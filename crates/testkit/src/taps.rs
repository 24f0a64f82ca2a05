//! Taps that keep what they see.

use crate::npy::{NpyError, NpyWriter};
use ds4_model::Tap;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Keeps every named result in memory, the rows of later passes behind those of earlier ones.
#[derive(Debug, Default)]
pub struct Taps {
    /// Names in the order of computation.
    pub order: Vec<String>,
    /// Width and values by name.
    pub seen: BTreeMap<String, (usize, Vec<f32>)>,
}

impl Taps {
    /// Row `i` of a result; empty if there is none.
    pub fn row(&self, name: &str, i: usize) -> &[f32] {
        self.seen.get(name).and_then(|(width, v)| v.get(i * width..(i + 1) * width)).unwrap_or(&[])
    }
}

impl Tap for Taps {
    fn rows(&mut self, name: &str, width: usize, values: &[f32]) {
        if let Some((_, all)) = self.seen.get_mut(name) {
            all.extend_from_slice(values);
        } else {
            self.order.push(name.into());
            self.seen.insert(name.into(), (width, values.to_vec()));
        }
    }
}

/// [`Taps`] that end as one `.npy` file per name, `[rows, width]`.
pub struct NpyTaps {
    dir: PathBuf,
    taps: Taps,
}

impl NpyTaps {
    /// Results go to `dir`, which is created.
    pub fn create(dir: &Path) -> Result<Self, NpyError> {
        std::fs::create_dir_all(dir).map_err(|source| NpyError::Io { path: dir.into(), source })?;
        Ok(NpyTaps { dir: dir.into(), taps: Taps::default() })
    }

    /// Writes the files, and `order.txt` with their names in the order of computation.
    pub fn finish(self) -> Result<(), NpyError> {
        let path = self.dir.join("order.txt");
        let order = self.taps.order.join("\n");
        std::fs::write(&path, order).map_err(|source| NpyError::Io { path, source })?;
        for (name, (width, values)) in &self.taps.seen {
            let rows = values.len() / (*width).max(1);
            let mut file =
                NpyWriter::create(&self.dir.join(format!("{name}.npy")), &[rows as u64, *width as u64])?;
            file.write(values)?;
            file.finish()?;
        }
        Ok(())
    }
}

impl Tap for NpyTaps {
    fn rows(&mut self, name: &str, width: usize, values: &[f32]) {
        self.taps.rows(name, width, values);
    }
}
