//! From a checkpoint to a file.

use crate::names::{Class, Item, items};
use crate::{Checkpoint, Error};
use ds4_gguf::{TensorType, Value, Writer};
use ds4_quant::encode_row;
use rayon::prelude::*;
use std::cmp::Ordering::{Equal, Less};
use std::io::Write;
use std::path::Path;

/// Which types the tensors get: experts as the recipe says, other large matrices Q8_0, the embedding and control matrices
/// F16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Experts' gate and up IQ2_XXS, down Q2_K: the published file.
    Q2,
    /// The same, but for the last seventh of the layers, whose experts are Q4_K.
    Q2Q4,
    /// Experts Q4_K.
    Q4,
    /// Experts Q8_0.
    Q8,
}

/// The part of the layers that the mixed recipe encodes better: 37 to 42 of 43.
const BETTER_LAYERS: usize = 7;

impl Recipe {
    fn ty(self, item: &Item, layers: usize) -> TensorType {
        match item.class {
            Class::Vector => TensorType::F32,
            Class::Offsets | Class::Control | Class::Embedding => TensorType::F16,
            Class::Dense => TensorType::Q8_0,
            Class::Experts => self.experts(&item.to, layers),
            Class::Table => TensorType::I32,
        }
    }

    fn experts(self, name: &str, layers: usize) -> TensorType {
        let layer = name.strip_prefix("blk.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
        // The draft block has no number and comes last.
        let is_last = layer.is_none_or(|layer| layer >= layers - layers / BETTER_LAYERS);
        match self {
            Recipe::Q8 => TensorType::Q8_0,
            Recipe::Q4 => TensorType::Q4K,
            Recipe::Q2Q4 if is_last => TensorType::Q4K,
            Recipe::Q2 | Recipe::Q2Q4 if name.contains("ffn_down") => TensorType::Q2K,
            Recipe::Q2 | Recipe::Q2Q4 => TensorType::Iq2Xxs,
        }
    }
}

/// What is reported while converting: tensors done, tensors in all, name of the next.
pub type Progress<'a> = dyn FnMut(usize, usize, &str) + 'a;

/// Writes `checkpoint` to the file `out`, which appears complete or not at all.
pub fn convert(
    checkpoint: &Checkpoint,
    out: &Path,
    name: &str,
    recipe: Recipe,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let config = checkpoint.config();
    let items = items(config);
    let mut writer = Writer::new("deepseek4");
    writer.set("general.name", Value::String(name.into()));
    writer.set("general.quantization_version", Value::U32(2));
    for (key, value) in config.metadata() {
        writer.set(&key, value);
    }
    for (key, value) in ds4_text::gguf_metadata(&checkpoint.file("tokenizer.json")?)? {
        writer.set(key, value);
    }
    for item in &items {
        let ty = recipe.ty(item, config.num_hidden_layers as usize);
        writer.tensor(&item.to, &dims(item, config.n_routed_experts), ty)?;
    }
    // The writer's callback has the container's error; ours is kept beside it.
    let mut failure = None;
    let written = writer.write_file(out, &mut |i, sink| {
        progress(i, items.len(), &items[i].to);
        put(checkpoint, &items[i], recipe, sink).map_err(|e| {
            let message = e.to_string();
            failure = Some(e);
            ds4_gguf::Error::Write(message)
        })
    });
    progress(items.len(), items.len(), "");
    match failure {
        Some(Error::Io { source, .. }) => Err(Error::Io { path: out.into(), source }),
        Some(e) => Err(e),
        None => Ok(written?),
    }
}

/// Dimensions in the file, fastest first.
fn dims(item: &Item, experts: u32) -> Vec<u64> {
    let own = item.shape.iter().rev().map(|&n| n as u64);
    own.chain((item.class == Class::Experts).then_some(u64::from(experts))).collect()
}

/// Writes one tensor.
fn put(checkpoint: &Checkpoint, item: &Item, recipe: Recipe, sink: &mut dyn Write) -> Result<(), Error> {
    let experts = checkpoint.config().n_routed_experts;
    let ty = recipe.ty(item, checkpoint.config().num_hidden_layers as usize);
    match item.class {
        Class::Table => {
            let table = checkpoint.table(&item.from, &item.shape, experts)?;
            let bytes: Vec<u8> = table.iter().flat_map(|v| v.to_le_bytes()).collect();
            write(sink, &bytes)
        }
        Class::Experts => (0..experts).try_for_each(|e| {
            let from = item.from.replace("{}", &e.to_string());
            rows(checkpoint, &from, &item.shape, ty, sink)
        }),
        _ => rows(checkpoint, &item.from, &item.shape, ty, sink),
    }
}

/// Rows that are encoded at the same time.
const ROWS: usize = 128;

/// Decodes and encodes rows, some at a time on all cores, so that memory does not grow with the matrix.
fn rows(
    checkpoint: &Checkpoint,
    from: &str,
    shape: &[usize],
    ty: TensorType,
    sink: &mut dyn Write,
) -> Result<(), Error> {
    let matrix = checkpoint.matrix(from, shape)?;
    let encode = |r: usize| {
        let (mut values, mut bytes) = (vec![0.0; matrix.width], Vec::new());
        matrix.row(r, &mut values);
        representable(from, r, &values, ty)?;
        encode_row(ty, &values, None, &mut bytes).map_err(|e| Error::Tensor {
            name: from.into(),
            found: format!("{e}"),
            expected: "a matrix that the recipe can encode".into(),
        })?;
        Ok(bytes)
    };
    for first in (0..matrix.rows).step_by(ROWS) {
        let last = (first + ROWS).min(matrix.rows);
        let encoded: Result<Vec<_>, Error> = (first..last).into_par_iter().map(encode).collect();
        for bytes in encoded? {
            write(sink, &bytes)?;
        }
    }
    Ok(())
}

/// A value that is no number, or too large for its type, would spoil every answer without a word.
fn representable(from: &str, row: usize, values: &[f32], ty: TensorType) -> Result<(), Error> {
    let f16 = half::f16::MAX.to_f32();
    let limit = match ty {
        TensorType::F16 => f16,
        // The scale is an F16, the largest value 127 of it.
        TensorType::Q8_0 => 127.0 * f16,
        // Of these the scale's scale, with room for what fitting makes of it.
        TensorType::Q2K | TensorType::Q4K | TensorType::Iq2Xxs => f16,
        _ => f32::MAX,
    };
    // NaN is not within the limit either.
    match values.iter().find(|v| !matches!(v.abs().partial_cmp(&limit), Some(Less | Equal))) {
        None => Ok(()),
        Some(v) => Err(Error::Tensor {
            name: from.into(),
            found: format!("{v} in row {row}"),
            expected: format!("numbers within {limit:e}, which {ty} can hold"),
        }),
    }
}

fn write(sink: &mut dyn Write, bytes: &[u8]) -> Result<(), Error> {
    sink.write_all(bytes).map_err(|source| Error::Io { path: "output".into(), source })
}
