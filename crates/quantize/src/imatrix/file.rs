//! The common file form: GGUF with two F32 tensors for each weight tensor, `NAME.in_sum2 [width, matrices]` and
//! `NAME.counts [1, matrices]`.

use super::{Imatrix, Moments};
use crate::Error;
use ds4_gguf::{Gguf, TensorType, Value, Writer};
use std::collections::BTreeMap;
use std::path::Path;

const TYPE: &str = "general.type";
const DATASETS: &str = "imatrix.datasets";
const CHUNKS: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

impl Imatrix {
    /// Reads a file.
    ///
    /// # Errors
    /// If it is no importance matrix, or has values that are none (negative, infinite, not a number).
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = Gguf::open(path)?;
        let meta = file.metadata();
        let wrong = |what: String| Error::Imatrix { path: path.into(), what };
        match meta.opt_str(TYPE)? {
            Some("imatrix") => {}
            found => {
                let found = found.unwrap_or("nothing");
                return Err(wrong(format!(
                    "{TYPE} is {found}, expected imatrix: it is no importance matrix"
                )));
            }
        }
        let mut tensors = BTreeMap::new();
        for info in file.tensors() {
            let Some(name) = info.name.strip_suffix(SUMS) else { continue };
            let sums = values(&file, &info.name).map_err(wrong)?;
            let counts = values(&file, &format!("{name}{COUNTS}")).map_err(wrong)?;
            if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                let what = format!("tensor {name}: {} sums for {} counts", sums.len(), counts.len());
                return Err(wrong(what));
            }
            tensors.insert(name.to_owned(), Moments { sums, counts });
        }
        if tensors.is_empty() {
            return Err(wrong("there is no tensor NAME.in_sum2 in it".into()));
        }
        let datasets = match meta.get(DATASETS) {
            Some(Value::ArrayString(names)) => names.clone(),
            _ => Vec::new(),
        };
        let number = |key| meta.opt_u32(key).map(Option::unwrap_or_default);
        Ok(Imatrix { datasets, chunks: number(CHUNKS)?, chunk_size: number(CHUNK_SIZE)?, tensors })
    }

    /// Writes a file, which appears complete or not at all.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut writer = Writer::untyped();
        writer.set(TYPE, Value::String("imatrix".into()));
        writer.set(DATASETS, Value::ArrayString(self.datasets.clone()));
        writer.set(CHUNKS, Value::U32(self.chunks));
        writer.set(CHUNK_SIZE, Value::U32(self.chunk_size));
        let mut data: Vec<&[f32]> = Vec::new();
        for (name, m) in &self.tensors {
            let (width, matrices) = (m.width() as u64, m.counts.len() as u64);
            writer.tensor(&format!("{name}{SUMS}"), &[width, matrices], TensorType::F32)?;
            writer.tensor(&format!("{name}{COUNTS}"), &[1, matrices], TensorType::F32)?;
            data.extend([m.sums.as_slice(), &m.counts]);
        }
        writer.write_file(path, &mut |i, sink| {
            let bytes: Vec<u8> = data[i].iter().flat_map(|v| v.to_le_bytes()).collect();
            sink.write_all(&bytes).map_err(|source| ds4_gguf::Error::Io { path: path.into(), source })
        })?;
        Ok(())
    }
}

/// The values of a tensor, of which each must be a finite number that is not negative.
fn values(file: &Gguf, name: &str) -> Result<Vec<f32>, String> {
    let tensor = file.tensor(name).ok_or_else(|| format!("tensor {name} is missing"))?;
    if tensor.ty() != TensorType::F32 {
        return Err(format!("tensor {name} is {}, expected F32", tensor.ty()));
    }
    let values: Vec<f32> = tensor.bytes().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    match values.iter().find(|v| !v.is_finite() || **v < 0.0) {
        Some(v) => Err(format!("tensor {name} holds {v}, expected finite numbers from 0 up")),
        None => Ok(values),
    }
}
