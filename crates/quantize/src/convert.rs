//! From a checkpoint to a file.

use crate::names::Class;
use crate::plan::{Plan, Planned};
use crate::{Checkpoint, Error};
use ds4_gguf::{Resume, TensorType};
use ds4_quant::encode_row;
use rayon::prelude::*;
use std::cell::Cell;
use std::cmp::Ordering::{Equal, Less};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

/// What is reported while converting.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Weights done.
    pub done: u64,
    /// Weights in all.
    pub total: u64,
    /// Of these, weights that an interrupted run had left.
    pub resumed: u64,
    /// The tensor in work.
    pub tensor: &'a str,
}

/// What the tensors of a type took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Tensors.
    pub tensors: usize,
    /// Weights.
    pub weights: u64,
    /// Bytes of the checkpoint.
    pub read: u64,
    /// Bytes of the file.
    pub written: u64,
    /// Seconds.
    pub seconds: f64,
}

/// What a conversion took, by the name of the type.
pub type Tallies = BTreeMap<&'static str, Tally>;

/// Bytes between two points from which an interrupted conversion goes on.
const RESUME_EVERY: u64 = 256 << 20;

impl Plan<'_> {
    /// Makes the file `out`, which appears complete or not at all. What an interrupted run of the same plan has left beside it is
    /// used.
    pub fn write(&self, out: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Tallies, Error> {
        let tensors = self.tensors();
        let weights = |n: usize| tensors[..n].iter().map(Planned::weights).sum::<u64>();
        let (total, resumed, done) = (weights(tensors.len()), Cell::new(0), Cell::new(0));
        let begin = &mut |n| {
            resumed.set(weights(n));
            done.set(weights(n));
        };
        let resume = Resume { key: self.key(), every: RESUME_EVERY };
        let mut tallies = Tallies::new();
        // The writer's callback has the container's error; ours is kept beside it.
        let mut failure = None;
        let written = self.writer.write_resumable(out, &resume, begin, &mut |i, sink| {
            let (tensor, start) = (&tensors[i], Instant::now());
            let step = &mut |n| {
                done.set(done.get() + n);
                let (done, resumed) = (done.get(), resumed.get());
                progress(Progress { done, total, resumed, tensor: tensor.name() });
            };
            step(0);
            let read = put(self.checkpoint, tensor, sink, step).map_err(|e| {
                let message = e.to_string();
                failure = Some(e);
                ds4_gguf::Error::Write(message)
            })?;
            let tally = tallies.entry(tensor.ty.name()).or_default();
            tally.tensors += 1;
            tally.weights += tensor.weights();
            tally.read += read;
            tally.written += tensor.bytes;
            tally.seconds += start.elapsed().as_secs_f64();
            Ok(())
        });
        match failure {
            Some(Error::Io { source, .. }) => Err(Error::Io { path: out.into(), source }),
            Some(e) => Err(e),
            None => written.map(|()| tallies).map_err(Error::from),
        }
    }

    /// Stands for everything the data are made from but what the header tells.
    fn key(&self) -> String {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(&self.checkpoint.identity());
        for importances in self.tensors().iter().filter_map(|t| t.importances.as_ref()) {
            for i in 0..importances.dims().0 {
                hash.update(bytemuck::cast_slice(&importances.of(i)));
            }
        }
        format!("{:032x}", hash.digest128())
    }
}

/// Writes one tensor; returns the bytes of the checkpoint it was made from. `step` is told the weights done.
fn put(
    checkpoint: &Checkpoint,
    tensor: &Planned<'_>,
    sink: &mut dyn Write,
    step: &mut dyn FnMut(u64),
) -> Result<u64, Error> {
    let (item, experts) = (&tensor.item, checkpoint.config().n_routed_experts);
    let mut rows = |from: &str, i: usize| {
        let importances = tensor.importances.as_ref().map(|all| all.of(i));
        let shape = &item.shape;
        encode(checkpoint, from, shape, tensor.ty, importances.as_deref(), sink, step)
    };
    match item.class {
        Class::Table => {
            let table = checkpoint.table(&item.from, &item.shape, experts)?;
            let bytes: Vec<u8> = table.iter().flat_map(|v| v.to_le_bytes()).collect();
            write(sink, &bytes)?;
            step(table.len() as u64);
            Ok(2 * bytes.len() as u64)
        }
        Class::Experts => {
            (0..experts).map(|e| rows(&item.from.replace("{}", &e.to_string()), e as usize)).sum()
        }
        _ => rows(&item.from, 0),
    }
}

/// Rows that are encoded at the same time.
const ROWS: usize = 128;

/// Decodes and encodes rows, some at a time on all cores, so that memory does not grow with the matrix.
fn encode(
    checkpoint: &Checkpoint,
    from: &str,
    shape: &[usize],
    ty: TensorType,
    importances: Option<&[f32]>,
    sink: &mut dyn Write,
    step: &mut dyn FnMut(u64),
) -> Result<u64, Error> {
    let matrix = checkpoint.matrix(from, shape)?;
    let encode = |r: usize| {
        let (mut values, mut bytes) = (vec![0.0; matrix.width], Vec::new());
        matrix.row(r, &mut values);
        representable(from, r, &values, ty)?;
        encode_row(ty, &values, importances, &mut bytes).map_err(|e| Error::Tensor {
            name: from.into(),
            found: format!("{e}"),
            expected: "a matrix that the recipe can encode".into(),
        })?;
        Ok(bytes)
    };
    for first in (0..matrix.rows).step_by(ROWS) {
        let last = (first + ROWS).min(matrix.rows);
        // Of several rows that are wrong the first is named, whichever thread is the fastest.
        let encoded: Vec<Result<Vec<u8>, Error>> = (first..last).into_par_iter().map(encode).collect();
        for bytes in encoded {
            write(sink, &bytes?)?;
        }
        step(((last - first) * matrix.width) as u64);
    }
    Ok(matrix.bytes())
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

#[cfg(test)]
mod tests {
    use crate::{Checkpoint, Content, Imatrix, Moments, Options, Plan, Recipe};
    use std::path::Path;

    /// What an interrupted run left is of use to the same plan only.
    #[test]
    #[allow(clippy::unwrap_used)]
    fn the_key_is_that_of_the_importances() {
        let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano");
        let checkpoint = Checkpoint::open(Path::new(nano)).unwrap();
        let key = |last: Option<f32>| {
            // The last column of the last expert.
            let imatrix = last.map(|last| {
                let mut moments = Moments { sums: vec![1.0; 8 * 256], counts: vec![100.0; 8] };
                moments.sums[8 * 256 - 1] = last;
                let tensors = [("blk.5.ffn_down_exps.weight".to_owned(), moments)].into();
                Imatrix { tensors, ..Imatrix::default() }
            });
            let imatrix = imatrix.as_ref().map(|m| (m, "i.gguf"));
            let options =
                Options { name: "x", recipe: Recipe::Q2, overrides: &[], imatrix, content: Content::Whole };
            Plan::new(&checkpoint, &options).unwrap().key()
        };
        assert_eq!(key(Some(1.0)), key(Some(1.0)));
        assert_ne!(key(Some(1.0)), key(Some(2.0)));
        assert_ne!(key(Some(1.0)), key(None));
    }
}
