//! Blocks as another implementation decodes them, and dot products against decoded blocks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use ds4_gguf::TensorType;
use ds4_quant::act::{Act32, Act256, quantize_32, quantize_256};
use ds4_quant::{RowError, dequantize_row, dot_f32, dot_row, quantize_q8_0};

static VECTORS: &[u8] = include_bytes!("data/vectors.bin");

/// (type, bytes, values)
fn vectors() -> Vec<(TensorType, Vec<u8>, Vec<f32>)> {
    let mut rest = VECTORS;
    let mut all = Vec::new();
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head.to_vec()
    };
    for _ in 0..6 {
        let head: Vec<u32> = take(12).chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let bytes = take(head[1] as usize);
        let values =
            take(4 * head[2] as usize).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        all.push((TensorType::from_id(head[0]).unwrap(), bytes, values));
    }
    assert!(rest.is_empty());
    all
}

#[test]
fn decoding_equals_another_implementation() {
    for (ty, bytes, want) in vectors() {
        let mut got = vec![0.0; want.len()];
        dequantize_row(ty, &bytes, &mut got).unwrap();
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            // The products of scales may be rounded in another order.
            assert!((g - w).abs() <= 2.0 * f32::EPSILON * w.abs(), "{ty} value {i}: {g} vs {w}");
        }
    }
}

#[test]
fn integer_dot_products_equal_float_ones_on_the_same_numbers() {
    for (ty, bytes, _) in vectors() {
        let n = bytes.len() / ty.block_bytes() as usize * ty.block_len() as usize;
        if !n.is_multiple_of(256) || matches!(ty, TensorType::Bf16 | TensorType::Mxfp4) {
            continue;
        }
        let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 9.0).collect();
        let (mut q32, mut d32) = (vec![0; n], vec![0.0; n / 32]);
        quantize_32(&x, &mut q32, &mut d32);
        let (mut q256, mut d256, mut sums) = (vec![0; n], vec![0.0; n / 256], vec![0; n / 16]);
        quantize_256(&x, &mut q256, &mut d256, &mut sums);
        let mut weights = vec![0.0; n];
        dequantize_row(ty, &bytes, &mut weights).unwrap();
        let rounded: Vec<f32> = (0..n)
            .map(|i| match ty {
                TensorType::Q8_0 => d32[i / 32] * f32::from(q32[i]),
                _ => d256[i / 256] * f32::from(q256[i]),
            })
            .collect();
        let got = dot_row(ty, &bytes, Act32 { q: &q32, d: &d32 }, Act256 { q: &q256, d: &d256, sums: &sums })
            .unwrap();
        let size: f32 = weights.iter().zip(&rounded).map(|(w, x)| (w * x).abs()).sum();
        assert!((got - dot_f32(&weights, &rounded)).abs() < 1e-6 * size, "{ty}");
    }
}

#[test]
fn q8_0_round_trip() {
    let x: Vec<f32> = (0..96).map(|i| ((i * 29 % 83) as f32 - 41.0) * 0.03).collect();
    let mut bytes = Vec::new();
    quantize_q8_0(&x, &mut bytes);
    let mut y = vec![0.0; 96];
    dequantize_row(TensorType::Q8_0, &bytes, &mut y).unwrap();
    for (block, (x, y)) in x.chunks(32).zip(y.chunks(32)).enumerate() {
        let step = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        for (a, b) in x.iter().zip(y) {
            // Half a step, and what rounding the scale to f16 adds.
            assert!((a - b).abs() <= 0.5 * step + a.abs() / 1024.0, "block {block}: {a} vs {b}");
        }
    }
    // What was decoded encodes to the same bytes.
    let mut again = Vec::new();
    quantize_q8_0(&y, &mut again);
    assert_eq!(bytes, again);
}

#[test]
fn wrong_lengths_and_types_are_errors() {
    let mut out = [0.0; 32];
    assert!(matches!(dequantize_row(TensorType::Q8_0, &[0; 33], &mut out), Err(RowError::Length { .. })));
    assert!(matches!(dequantize_row(TensorType::F16, &[0; 66], &mut out), Err(RowError::Length { .. })));
    assert_eq!(dequantize_row(TensorType::Q6K, &[], &mut out), Err(RowError::Type(TensorType::Q6K)));
}
