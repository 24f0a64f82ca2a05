//! How far two files are from the checkpoint they were made from, tensor by tensor.

use crate::names::{Class, Item, items};
use crate::{Checkpoint, Error};
use ds4_gguf::{Gguf, Tensor, TensorType};
use ds4_quant::dequantize_row;
use rayon::prelude::*;

/// A tensor in two files.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// Type in either file; none where it is missing.
    pub types: [Option<TensorType>; 2],
    /// Whether types and bytes are the same.
    pub same: bool,
    /// Root mean square of the errors over that of the checkpoint's values, in either file; none where it is missing, has other
    /// dimensions, or is a table.
    pub errors: [Option<f64>; 2],
}

/// Compares the tensors of two files that `checkpoint` has; `report` is told each.
pub fn compare(
    checkpoint: &Checkpoint,
    files: [&Gguf; 2],
    report: &mut dyn FnMut(Compared),
) -> Result<(), Error> {
    for item in items(checkpoint.config()) {
        let found = files.map(|f| f.tensor(&item.to));
        if found.iter().all(Option::is_none) {
            continue;
        }
        let same = match &found {
            [Some(a), Some(b)] => a.ty() == b.ty() && a.bytes() == b.bytes(),
            _ => false,
        };
        let mut errors = [None, None];
        for (error, tensor) in errors.iter_mut().zip(&found) {
            if let Some(tensor) = tensor {
                *error = error_of(checkpoint, &item, tensor)?;
            }
        }
        let types = found.map(|t| t.map(|t| t.ty()));
        report(Compared { name: item.to, types, same, errors });
    }
    Ok(())
}

/// The relative error of a tensor.
fn error_of(checkpoint: &Checkpoint, item: &Item, tensor: &Tensor) -> Result<Option<f64>, Error> {
    let experts = if item.class == Class::Experts { checkpoint.config().n_routed_experts } else { 1 };
    let values = item.shape.iter().product::<usize>() as u64 * u64::from(experts);
    let width = item.shape.last().copied().unwrap_or(1);
    let fits = tensor.dims().iter().product::<u64>() == values && tensor.dims()[0] == width as u64;
    if item.class == Class::Table || !fits {
        return Ok(None);
    }
    let (mut error, mut size) = (0.0, 0.0);
    for e in 0..experts {
        let matrix = checkpoint.matrix(&item.from.replace("{}", &e.to_string()), &item.shape)?;
        let row_bytes = tensor.ty().bytes_of(width as u64) as usize;
        let rows: Vec<_> = (0..matrix.rows)
            .into_par_iter()
            .map(|r| {
                let at = (e as usize * matrix.rows + r) * row_bytes;
                let (mut want, mut got) = (vec![0.0; width], vec![0.0; width]);
                matrix.row(r, &mut want);
                dequantize_row(tensor.ty(), &tensor.bytes()[at..at + row_bytes], &mut got)?;
                let square = |x: f32| f64::from(x) * f64::from(x);
                let error: f64 = want.iter().zip(&got).map(|(w, g)| square(w - g)).sum();
                Ok((error, want.iter().map(|&w| square(w)).sum::<f64>()))
            })
            .collect::<Result<_, ds4_quant::RowError>>()
            .map_err(|e| Error::Plan(format!("tensor {}: {e}", item.to)))?;
        // In order, so that the sum is the same for any number of threads.
        rows.iter().for_each(|(e, s)| (error, size) = (error + e, size + s));
    }
    Ok(Some(if error == 0.0 { 0.0 } else { (error / size.max(f64::MIN_POSITIVE)).sqrt() }))
}
