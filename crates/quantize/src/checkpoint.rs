//! Reads tensors of the official checkpoint form.

use crate::{Config, Error};
use ds4_gguf::MappedFile;
use ds4_quant::{fp4, fp8};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Rows and columns that share one scale of a dense FP8 matrix.
const FP8_BLOCK: usize = 128;

#[derive(Clone)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte in the shard.
    start: usize,
    len: usize,
}

/// An open checkpoint: its configuration and mapped shards.
pub struct Checkpoint {
    folder: PathBuf,
    config: Config,
    shards: Vec<MappedFile>,
    /// Path, size and time of each.
    files: Vec<String>,
    entries: HashMap<String, Entry>,
}

/// A matrix of the checkpoint, whose rows are decoded on demand.
pub struct Matrix<'a> {
    data: &'a [u8],
    dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
    scales: Scales<'a>,
}

enum Scales<'a> {
    None,
    /// Per 128x128, `[ceil(rows / 128), per_row]`.
    Blocks {
        scales: &'a [u8],
        per_row: usize,
    },
    /// Per 32 inputs, `[rows, width / 32]`.
    Inputs(&'a [u8]),
}

impl Checkpoint {
    /// Opens a folder.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let config: Config = json(&folder.join("config.json"))?;
        config.check()?;
        let io = |source| Error::Io { path: folder.into(), source };
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            return Err(Error::NoWeights(folder.into()));
        }
        let (mut shards, mut files, mut entries) = (Vec::new(), Vec::new(), HashMap::new());
        for (shard, path) in paths.iter().enumerate() {
            let map = MappedFile::open(path)?;
            directory(&map, path, shard, &mut entries)?;
            files.push(format!(
                "{} {} {:?}",
                path.display(),
                map.len(),
                path.metadata().and_then(|m| m.modified()).ok()
            ));
            shards.push(map);
        }
        Ok(Checkpoint { folder: folder.into(), config, shards, files, entries })
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of a file of the folder.
    pub fn file(&self, name: &str) -> Result<Vec<u8>, Error> {
        let path = self.folder.join(name);
        std::fs::read(&path).map_err(|source| Error::Io { path, source })
    }

    /// What tells this checkpoint from another one: its files with their sizes and times.
    pub(crate) fn identity(&self) -> Vec<u8> {
        self.files.iter().flat_map(|f| f.as_bytes().iter().copied().chain([0])).collect()
    }

    fn entry(&self, name: &str) -> Result<(&Entry, &[u8]), Error> {
        let entry = self.entries.get(name).ok_or_else(|| Error::MissingTensor(name.into()))?;
        Ok((entry, &self.shards[entry.shard][entry.start..entry.start + entry.len]))
    }

    /// A matrix or vector of any type, checked against the shape that the configuration calls for.
    pub fn matrix(&self, name: &str, shape: &[usize]) -> Result<Matrix<'_>, Error> {
        let (entry, data) = self.entry(name)?;
        let width = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<usize>() / width.max(1);
        // FP4 is stored two values a byte, under the name of a byte type.
        let packed = matches!(entry.dtype, Dtype::I8 | Dtype::U8);
        let mut stored = shape.to_vec();
        if let (true, Some(last)) = (packed, stored.last_mut()) {
            *last /= 2;
        }
        expect(name, &entry.shape, &stored)?;
        let scales = match entry.dtype {
            Dtype::F8_E4M3 => {
                let per_row = width.div_ceil(FP8_BLOCK);
                let scales = self.scales(name, &[rows.div_ceil(FP8_BLOCK), per_row])?;
                Scales::Blocks { scales, per_row }
            }
            Dtype::I8 | Dtype::U8 if width.is_multiple_of(fp4::BLOCK) => {
                Scales::Inputs(self.scales(name, &[rows, width / fp4::BLOCK])?)
            }
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Scales::None,
            other => {
                return Err(wrong(name, format!("{other:?}"), "F32, F16, BF16, FP8 E4M3, or FP4 as bytes"));
            }
        };
        Ok(Matrix { data, dtype: entry.dtype, rows, width, scales })
    }

    fn scales(&self, name: &str, shape: &[usize]) -> Result<&[u8], Error> {
        let scale = format!("{}.scale", name.strip_suffix(".weight").unwrap_or(name));
        let (entry, data) = self.entry(&scale)?;
        expect(&scale, &entry.shape, shape)?;
        match entry.dtype {
            Dtype::F8_E8M0 | Dtype::U8 => Ok(data),
            other => Err(wrong(&scale, format!("{other:?}"), "E8M0 bytes")),
        }
    }

    /// A table of integers, each below `limit`.
    pub fn table(&self, name: &str, shape: &[usize], limit: u32) -> Result<Vec<i32>, Error> {
        let (entry, data) = self.entry(name)?;
        expect(name, &entry.shape, shape)?;
        let values: Vec<i64> = match entry.dtype {
            Dtype::I64 => data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            Dtype::I32 => data.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
            other => return Err(wrong(name, format!("{other:?}"), "I64 or I32")),
        };
        let bad = values.iter().find(|v| **v < 0 || **v >= i64::from(limit));
        match bad {
            Some(v) => Err(wrong(name, format!("value {v}"), &format!("0 to {}", limit - 1))),
            None => Ok(values.into_iter().map(|v| v as i32).collect()),
        }
    }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.into(), source })
}

/// Adds a shard's tensors.
fn directory(
    map: &MappedFile,
    path: &Path,
    shard: usize,
    entries: &mut HashMap<String, Entry>,
) -> Result<(), Error> {
    let failed = |source| Error::Safetensors { path: path.into(), source };
    let (header, metadata) = SafeTensors::read_metadata(map).map_err(failed)?;
    // Behind the length of the header and the header.
    let base = 8 + header;
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let entry = Entry {
            shard,
            dtype: info.dtype,
            shape: info.shape.clone(),
            start: base + start,
            len: end - start,
        };
        if base + end > map.len() {
            return Err(wrong(
                &name,
                format!("data up to byte {}", base + end),
                &format!("a file of {} bytes is shorter", map.len()),
            ));
        }
        if entries.insert(name.clone(), entry).is_some() {
            return Err(wrong(&name, "the tensor in two files".into(), "one"));
        }
    }
    Ok(())
}

fn expect(name: &str, found: &[usize], expected: &[usize]) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(wrong(name, format!("shape {found:?}"), &format!("{expected:?}")))
}

fn wrong(name: &str, found: String, expected: &str) -> Error {
    Error::Tensor { name: name.into(), found, expected: expected.into() }
}

impl Matrix<'_> {
    /// Bytes in the checkpoint, scales included.
    pub fn bytes(&self) -> u64 {
        let scales = match &self.scales {
            Scales::None => 0,
            Scales::Blocks { scales, .. } | Scales::Inputs(scales) => scales.len(),
        };
        (self.data.len() + scales) as u64
    }

    /// Decodes row `r` into `out`, `width` values.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let bytes = self.data.len() / self.rows;
        let row = &self.data[r * bytes..(r + 1) * bytes];
        match (&self.scales, self.dtype) {
            (Scales::Blocks { scales, per_row }, _) => {
                let scales = &scales[r / FP8_BLOCK * per_row..][..*per_row];
                let blocks = out.chunks_mut(FP8_BLOCK).zip(row.chunks(FP8_BLOCK));
                blocks.zip(scales).for_each(|((out, codes), &scale)| fp8::unpack_block(codes, scale, out));
            }
            (Scales::Inputs(scales), _) => {
                let per_row = self.width / fp4::BLOCK;
                let scales = &scales[r * per_row..(r + 1) * per_row];
                let blocks = out.chunks_mut(fp4::BLOCK).zip(row.chunks(fp4::BLOCK / 2));
                blocks.zip(scales).for_each(|((out, codes), &scale)| fp4::unpack_block(codes, scale, out));
            }
            (Scales::None, Dtype::F32) => {
                let values = row.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
            (Scales::None, Dtype::F16) => {
                let values = row.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32());
                out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
            (Scales::None, _) => {
                let values = row.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32());
                out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
            }
        }
    }
}
