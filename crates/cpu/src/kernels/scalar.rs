//! Plain Rust: the reference of `ds4_quant`, wrapped as kernels.

use super::{Columns, Input, Kernels, Level, TILE, Tile, index, small};
use ds4_gguf::TensorType;
use ds4_quant::act::{Act32, Act256};
use ds4_quant::{dot_row, f16_to_f32};

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Scalar,
    f32: float::<4>,
    f16: float::<2>,
    f16_rows: None,
    q8_0: |rows, x, out| quantized(TensorType::Q8_0, rows, x, out),
    q8_0_rows: None,
    q2_k: |rows, x, out| quantized(TensorType::Q2K, rows, x, out),
    q2_k_rows: None,
    q4_k: |rows, x, out| quantized(TensorType::Q4K, rows, x, out),
    q4_k_rows: None,
    iq2_xxs: |rows, x, out| quantized(TensorType::Iq2Xxs, rows, x, out),
    iq2_xxs_input: Input::Int256,
    iq2_xxs_rows: None,
    dot: |a, b| a.iter().zip(b).map(|(a, b)| a * b).sum(),
    scores,
    weigh,
    small: small::PLAIN,
    index_scores: index::scores,
};

/// Runs a product for all rows and columns.
fn each(rows: &[u8], x: &Columns<'_>, out: &mut [f32], product: impl Fn(&[u8], usize) -> f32) {
    let columns = x.index.len();
    let row_bytes = rows.len() * columns / out.len();
    for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(columns)) {
        out.iter_mut().enumerate().for_each(|(j, o)| *o = product(row, j));
    }
}

fn float<const BYTES: usize>(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    each(rows, x, out, |row, j| {
        let weights = row.chunks_exact(BYTES).map(|b| match *b {
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            [a, b] => f16_to_f32([a, b]),
            _ => 0.0,
        });
        weights.zip(x.float(j)).map(|(w, &x)| f64::from(w) * f64::from(x)).sum::<f64>() as f32
    });
}

fn quantized(ty: TensorType, rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let (no32, no256) = (Act32 { q: &[], d: &[] }, Act256 { q: &[], d: &[], sums: &[] });
    each(rows, x, out, |row, j| {
        let dot = match ty {
            TensorType::Q8_0 => dot_row(ty, row, x.act32(j), no256),
            _ => dot_row(ty, row, no32, x.act256(j)),
        };
        debug_assert!(dot.is_some(), "matrices are checked when they are bound");
        dot.unwrap_or(f32::NAN)
    });
}

fn scores(q: &[f32], tile: &Tile<'_>, scores: &mut [f32]) {
    for (q, scores) in q.chunks_exact(tile.width).zip(scores.chunks_exact_mut(TILE)) {
        for (r, s) in scores[..tile.n].iter_mut().enumerate() {
            *s = tile.row(r).iter().zip(q).map(|(a, b)| a * b).sum();
        }
    }
}

fn weigh(weights: &[f32], tile: &Tile<'_>, out: &mut [f32]) {
    for (out, weights) in out.chunks_exact_mut(tile.width).zip(weights.chunks_exact(TILE)) {
        for (r, w) in weights[..tile.n].iter().enumerate() {
            out.iter_mut().zip(tile.row(r)).for_each(|(o, v)| *o += w * v);
        }
    }
}
