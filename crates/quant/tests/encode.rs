//! Encoders: how far what they write is from what they were given.
#![allow(clippy::unwrap_used)]

use ds4_gguf::TensorType as T;
use ds4_quant::{EncodeError, dequantize_row, encode_row};

/// Values as of weights: bell-shaped, with a heavier tail.
fn bell(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2) + 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n)
        .map(|i| {
            let sum: f32 = (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
            0.02 * sum * if i.is_multiple_of(37) { 3.0 } else { 1.0 }
        })
        .collect()
}

fn decoded(ty: T, row: &[f32], importances: Option<&[f32]>) -> Vec<f32> {
    let (mut bytes, mut values) = (Vec::new(), vec![0.0; row.len()]);
    encode_row(ty, row, importances, &mut bytes).unwrap();
    dequantize_row(ty, &bytes, &mut values).unwrap();
    values
}

fn error(a: &[f32], b: &[f32], w: impl Fn(usize) -> f32) -> f64 {
    let squares = a.iter().zip(b).enumerate().map(|(i, (a, b))| f64::from(w(i)) * f64::from(a - b).powi(2));
    squares.sum()
}

/// Error of a row as a share of the row.
fn share(ty: T, row: &[f32]) -> f64 {
    let zeros = vec![0.0; row.len()];
    (error(row, &decoded(ty, row, None), |_| 1.0) / error(row, &zeros, |_| 1.0)).sqrt()
}

#[test]
fn errors_are_those_of_the_formats() {
    let row = bell(256 * 64, 1);
    for (ty, most) in [
        (T::Bf16, 0.003),
        (T::F16, 0.0005),
        (T::Q8_0, 0.008),
        (T::Q4K, 0.08),
        (T::Q2K, 0.29),
        (T::Iq2Xxs, 0.39),
    ] {
        let share = share(ty, &row);
        println!("{ty}: {share:.5}");
        assert!(share < most, "{ty}: {share}");
    }
}

/// What counts more is encoded better, at the cost of the rest.
#[test]
fn importances_count() {
    let row = bell(256 * 32, 2);
    let importances: Vec<f32> =
        (0..row.len()).map(|i| if i.is_multiple_of(5) { 20.0 } else { 0.3 }).collect();
    for ty in [T::Q4K, T::Q2K, T::Iq2Xxs] {
        let cost = |importances: Option<&[f32]>| {
            error(&row, &decoded(ty, &row, importances), |i| if i.is_multiple_of(5) { 20.0 } else { 0.3 })
        };
        let (with, without) = (cost(Some(&importances)), cost(None));
        println!("{ty}: {with:.4} with, {without:.4} without");
        assert!(with < 0.9 * without, "{ty}: {with} and {without}");
        // Importances are relative.
        let scaled: Vec<f32> = importances.iter().map(|i| i * 1024.0).collect();
        assert_eq!(decoded(ty, &row, Some(&importances)), decoded(ty, &row, Some(&scaled)));
    }
}

/// Rows that are on a format's grid already come back almost as they were.
#[test]
fn what_fits_stays() {
    let row = bell(256 * 8, 3);
    for (ty, most) in [(T::Q4K, 0.02), (T::Q2K, 0.06), (T::Iq2Xxs, 0.06)] {
        let once = decoded(ty, &row, None);
        let share = share(ty, &once);
        println!("{ty}: {share:.5}");
        assert!(share < most, "{ty}: {share}");
    }
}

#[test]
fn odd_rows() {
    let mut spike = vec![0.0; 256];
    spike[100] = -7.5;
    let rows = [
        vec![0.0; 256],
        vec![0.03; 256],
        vec![-0.03; 256],
        spike,
        (0..256).map(|i| (i as f32 - 128.0) * 1e-6).collect(),
        (0..256).map(|i| if i % 2 == 0 { 3e4 } else { -3e4 }).collect(),
        vec![1e-30; 256],
    ];
    for row in &rows {
        let zeros = vec![0.0; 256];
        for ty in [T::Q4K, T::Q2K, T::Iq2Xxs] {
            for importances in [None, Some(&zeros[..])] {
                let values = decoded(ty, row, importances);
                assert!(values.iter().all(|v| v.is_finite()));
                let (e, all) = (error(row, &values, |_| 1.0), error(row, &zeros, |_| 1.0));
                assert!(e <= all * 1.0001, "{ty}: {e} of {all} for {:?}", &row[..4]);
            }
        }
    }
}

#[test]
fn rows_that_cannot_be() {
    let mut out = Vec::new();
    let row = [0.0; 100];
    assert_eq!(
        encode_row(T::Q2K, &row, None, &mut out),
        Err(EncodeError::Length { values: 100, block: 256 })
    );
    assert_eq!(encode_row(T::I32, &row, None, &mut out), Err(EncodeError::Type(T::I32)));
    let given = Err(EncodeError::Importances { given: 1, values: 100 });
    assert_eq!(encode_row(T::F32, &row, Some(&[1.0]), &mut out), given);
    assert!(out.is_empty());
}
