//! `.npy` files of float32 and int32.

use npyz::WriterBuilder;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};

/// Why an array could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NpyError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Not a little-endian C-order array of float32, int32 or int64.
    #[error("{path}: {message}")]
    Format {
        /// File.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// An array in memory, slowest dimension first.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Values, row-major; integers as floats (ids fit 24 bits).
    pub values: Vec<f32>,
}

impl Array {
    /// Row `i` of the first dimension.
    pub fn row(&self, i: usize) -> &[f32] {
        let width = self.values.len() / self.shape[0];
        &self.values[i * width..(i + 1) * width]
    }

    /// The values as ids.
    pub fn ids(&self) -> Vec<usize> {
        self.values.iter().map(|&v| v as usize).collect()
    }
}

/// Reads an array.
pub fn read_npy(path: &Path) -> Result<Array, NpyError> {
    let file = File::open(path).map_err(|source| NpyError::Io { path: path.into(), source })?;
    parse_npy(path, BufReader::new(file))
}

/// Reads an array from its bytes; `path` is for messages.
pub(crate) fn parse_npy(path: &Path, bytes: impl Read) -> Result<Array, NpyError> {
    let io = |source| NpyError::Io { path: path.into(), source };
    let format = |message: String| NpyError::Format { path: path.into(), message };
    let npy = npyz::NpyFile::new(bytes).map_err(io)?;
    if npy.order() != npyz::Order::C {
        return Err(format("Fortran order, expected C order".into()));
    }
    let shape = npy.shape().iter().map(|&n| n as usize).collect();
    let values = match npy.dtype().descr().as_str() {
        "'<f4'" => values::<f32, _>(npy, |v| v),
        "'<i4'" => values::<i32, _>(npy, |v| v as f32),
        "'<i8'" => values::<i64, _>(npy, |v| v as f32),
        other => return Err(format(format!("type {other}, expected float32, int32 or int64"))),
    };
    Ok(Array { shape, values: values.map_err(io)? })
}

fn values<T: npyz::Deserialize, R: Read>(
    npy: npyz::NpyFile<R>,
    f: impl Fn(T) -> f32,
) -> std::io::Result<Vec<f32>> {
    npy.data::<T>().map_err(|e| std::io::Error::other(e.to_string()))?.map(|v| v.map(&f)).collect()
}

/// Writes a float32 array of known shape row by row.
pub struct NpyWriter {
    path: PathBuf,
    inner: npyz::NpyWriter<f32, BufWriter<File>>,
}

impl NpyWriter {
    /// Creates the file.
    pub fn create(path: &Path, shape: &[u64]) -> Result<Self, NpyError> {
        let io = |source| NpyError::Io { path: path.into(), source };
        let file = BufWriter::new(File::create(path).map_err(io)?);
        let inner =
            npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd().map_err(io)?;
        Ok(NpyWriter { path: path.into(), inner })
    }

    /// Appends values.
    pub fn write(&mut self, values: &[f32]) -> Result<(), NpyError> {
        let io = |source| NpyError::Io { path: self.path.clone(), source };
        values.iter().try_for_each(|v| self.inner.push(v)).map_err(io)
    }

    /// Flushes; fails if fewer values were written than the shape holds.
    pub fn finish(self) -> Result<(), NpyError> {
        let path = self.path;
        self.inner.finish().map_err(|source| NpyError::Io { path, source })
    }
}
