//! How fast weights are encoded, and how far what is written is from them.
#![allow(clippy::print_stdout)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ds4_gguf::TensorType as T;
use ds4_quant::{dequantize_row, encode_row};
use std::hint::black_box;

/// Bell-shaped values, some of them three times as large.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut bell = |scale: f32| scale * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0);
    (0..n).map(|i| bell(if i.is_multiple_of(37) { 0.06 } else { 0.02 })).collect()
}

fn encode(c: &mut Criterion) {
    let row = weights(4096);
    let importances: Vec<f32> = weights(4096).iter().rev().map(|w| (75.0 * w).exp()).collect();
    let mut group = c.benchmark_group("encode");
    group.throughput(Throughput::Elements(row.len() as u64));
    for ty in [T::Q8_0, T::Q4K, T::Q2K, T::Iq2Xxs] {
        for (name, importances) in [("", None), (" by importance", Some(&importances[..]))] {
            let (mut bytes, mut values) = (Vec::new(), vec![0.0; row.len()]);
            if encode_row(ty, &row, importances, &mut bytes).is_err()
                || dequantize_row(ty, &bytes, &mut values).is_err()
            {
                continue;
            }
            let cost = |i: usize| importances.map_or(1.0, |w| w[i]);
            let of = |f: &dyn Fn(usize) -> f32| {
                (0..row.len()).map(|i| f64::from(cost(i) * f(i) * f(i))).sum::<f64>()
            };
            let share = (of(&|i| row[i] - values[i]) / of(&|i| row[i])).sqrt();
            println!("{ty}{name}: an error of {:.2} %", 100.0 * share);
            group.bench_function(format!("{ty}{name}"), |b| {
                b.iter(|| {
                    bytes.clear();
                    encode_row(ty, black_box(&row), importances, &mut bytes)
                });
            });
        }
    }
}

criterion_group!(benches, encode);
criterion_main!(benches);
