//! From a checkpoint to a file.

use crate::names::{Class, Item, items};
use crate::{Checkpoint, Error};
use ds4_gguf::{TensorType, Value, Writer};
use ds4_quant::quantize_q8_0;
use std::cmp::Ordering::{Equal, Less};
use std::io::Write;
use std::path::Path;

/// Which types the tensors get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Q8_0 for large matrices, experts included; F16 for the embedding and control matrices.
    Q8,
}

impl Recipe {
    fn ty(self, class: Class) -> TensorType {
        match class {
            Class::Vector => TensorType::F32,
            Class::Offsets | Class::Control | Class::Embedding => TensorType::F16,
            Class::Dense | Class::Experts => TensorType::Q8_0,
            Class::Table => TensorType::I32,
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
        writer.tensor(&item.to, &dims(item, config.n_routed_experts), recipe.ty(item.class))?;
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
    match item.class {
        Class::Table => {
            let table = checkpoint.table(&item.from, &item.shape, experts)?;
            let bytes: Vec<u8> = table.iter().flat_map(|v| v.to_le_bytes()).collect();
            write(sink, &bytes)
        }
        Class::Experts => (0..experts).try_for_each(|e| {
            let from = item.from.replace("{}", &e.to_string());
            rows(checkpoint, &from, &item.shape, recipe.ty(item.class), sink)
        }),
        _ => rows(checkpoint, &item.from, &item.shape, recipe.ty(item.class), sink),
    }
}

/// Decodes and encodes row by row.
fn rows(
    checkpoint: &Checkpoint,
    from: &str,
    shape: &[usize],
    ty: TensorType,
    sink: &mut dyn Write,
) -> Result<(), Error> {
    let matrix = checkpoint.matrix(from, shape)?;
    let mut values = vec![0.0; matrix.width];
    let mut bytes = Vec::new();
    for r in 0..matrix.rows {
        matrix.row(r, &mut values);
        representable(from, r, &values, ty)?;
        bytes.clear();
        match ty {
            TensorType::Q8_0 => quantize_q8_0(&values, &mut bytes),
            TensorType::F16 => {
                bytes.extend(values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()));
            }
            _ => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        }
        write(sink, &bytes)?;
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
