//! Every kernel of every level this CPU has, against the scalar reference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use ds4_cpu::kernels::index::{BLOCK, BLOCKS, IndexQuery};
use ds4_cpu::kernels::{Columns, Input, Kernels, Level, TILE, Tile, planes};
use ds4_gguf::TensorType;
use ds4_model::cache::{KvFormat, RowCodec};
use ds4_quant::act::{Act32, Act256, quantize_32, quantize_256};
use ds4_quant::{dequantize_row, dot_f32, dot_row, fp4};
use proptest::prelude::*;

const TYPES: [TensorType; 8] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::Bf16,
    TensorType::Q8_0,
    TensorType::Q2K,
    TensorType::Q4K,
    TensorType::Iq2Xxs,
    TensorType::Mxfp4,
];

/// A small generator, so that a case is a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn unit(&mut self) -> f32 {
        (self.next() as f32 / (1u64 << 30) as f32) - 1.0
    }
}

/// A row of random bits with sane scales: every pattern of quants is legal.
fn random_row(ty: TensorType, len: usize, r: &mut Random) -> Vec<u8> {
    let half = |r: &mut Random| half::f16::from_f32(0.01 + 0.01 * r.unit().abs()).to_le_bytes();
    let (block_len, bytes) = (ty.block_len() as usize, ty.block_bytes() as usize);
    let mut row = Vec::new();
    for _ in 0..len / block_len {
        let mut b: Vec<u8> = (0..bytes).map(|_| r.next() as u8).collect();
        match ty {
            TensorType::F32 => b.copy_from_slice(&r.unit().to_le_bytes()),
            TensorType::F16 => b.copy_from_slice(&half::f16::from_f32(r.unit()).to_le_bytes()),
            TensorType::Bf16 => b.copy_from_slice(&half::bf16::from_f32(r.unit()).to_le_bytes()),
            TensorType::Q2K => {
                b[80..82].copy_from_slice(&half(r));
                b[82..84].copy_from_slice(&half(r));
            }
            TensorType::Q4K => {
                b[0..2].copy_from_slice(&half(r));
                b[2..4].copy_from_slice(&half(r));
            }
            TensorType::Mxfp4 => b[0] = 120 + b[0] % 8,
            _ => b[0..2].copy_from_slice(&half(r)),
        }
        row.extend(b);
    }
    row
}

struct Panel {
    x: Vec<f32>,
    q32: Vec<i8>,
    d32: Vec<f32>,
    offsets32: Vec<i32>,
    q256: Vec<i8>,
    planes256: Vec<i8>,
    d256: Vec<f32>,
    sums: Vec<i16>,
}

fn panel(len: usize, rows: usize, r: &mut Random) -> Panel {
    quantized((0..len * rows).map(|_| 3.0 * r.unit()).collect())
}

/// All forms of some activations.
fn quantized(x: Vec<f32>) -> Panel {
    let n = x.len();
    let mut p = Panel {
        q32: vec![0; n],
        d32: vec![0.0; n / 32],
        offsets32: Vec::new(),
        q256: vec![0; n],
        planes256: vec![0; n],
        d256: vec![0.0; n / 256],
        sums: vec![0; n / 16],
        x,
    };
    quantize_32(&p.x, &mut p.q32, &mut p.d32);
    p.offsets32 = p.q32.chunks(32).map(|q| -128 * q.iter().map(|&q| i32::from(q)).sum::<i32>()).collect();
    quantize_256(&p.x, &mut p.q256, &mut p.d256, &mut p.sums);
    planes(&p.q256, &mut p.planes256);
    p
}

/// A width that a type can have: one of blocks of 32 any number of them.
fn width(ty: TensorType, blocks: usize, seed: u64) -> usize {
    if ty.block_len() == 32 { 256 * blocks - 32 * (seed % 8) as usize } else { 256 * blocks }
}

fn check(ty: TensorType, level: Level, exact: bool, blocks: usize, rows: usize, seed: u64) {
    let mut r = Random(seed);
    let len = width(ty, blocks, seed);
    let row = random_row(ty, len, &mut r);
    let p = panel(len, rows, &mut r);
    let index: Vec<u32> = (0..rows as u32).rev().collect();
    let product = Kernels::new(level).product(ty, exact).unwrap();
    let (q, d, sums): (&[i8], &[f32], &[i16]) = match product.input {
        Input::Float => (&[], &[], &[]),
        Input::Int32 => (&p.q32, &p.d32, &[]),
        Input::Int256 => (&p.q256, &p.d256, &p.sums),
        Input::Planes256 => (&p.planes256, &p.d256, &p.sums),
    };
    let columns = Columns {
        floats: &p.x,
        q,
        d,
        sums,
        offsets: &p.offsets32,
        stride: len,
        offset: 0,
        len,
        index: &index,
    };
    let mut out = vec![0.0; rows];
    product.dots(&row, row.len(), &columns, &mut out);
    // Many rows at once, the same bits.
    let many: Vec<u8> =
        (0..35).flat_map(|i| if i == 7 { row.clone() } else { random_row(ty, len, &mut r) }).collect();
    let mut all = vec![0.0; 35 * rows];
    product.multiply(&many, row.len(), &columns, &mut all);
    for (i, row) in many.chunks_exact(row.len()).enumerate() {
        let mut one = vec![0.0; rows];
        product.dots(row, row.len(), &columns, &mut one);
        let same = all.chunks_exact(35).zip(&one).all(|(a, b)| a[i].to_bits() == b.to_bits());
        assert!(same, "{ty} {level:?}: {all:?} {one:?}");
    }
    let mut weights = vec![0.0; len];
    dequantize_row(ty, &row, &mut weights).unwrap();
    for (j, got) in out.iter().enumerate() {
        let x = columns.float(j);
        let want = match product.input {
            Input::Float => dot_f32(&weights, x),
            Input::Int32 => {
                dot_row(ty, &row, columns.act32(j), Act256 { q: &[], d: &[], sums: &[] }).unwrap()
            }
            Input::Int256 | Input::Planes256 => {
                let columns = Columns { q: &p.q256, ..columns };
                dot_row(ty, &row, Act32 { q: &[], d: &[] }, columns.act256(j)).unwrap()
            }
        };
        let size: f32 = weights.iter().zip(x).map(|(w, x)| (w * x).abs()).sum();
        assert!((got - want).abs() <= 2e-6 * size, "{ty} {level:?} exact {exact}: {got} vs {want}");
        // And alone, the same bits.
        let mut alone = [0.0];
        product.dots(&row, row.len(), &Columns { index: &index[j..=j], ..columns }, &mut alone);
        assert_eq!(alone[0].to_bits(), got.to_bits());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn kernels_equal_the_reference(blocks in 1usize..=5, rows in 1usize..=11, seed: u64) {
        for level in Level::available() {
            for ty in TYPES {
                for exact in [false, true] {
                    check(ty, level, exact, blocks, rows, seed);
                }
            }
        }
    }

    /// Widths that are no multiple of a vector: float formats have no blocks.
    #[test]
    fn odd_widths(len in 1usize..200, seed: u64) {
        let mut r = Random(seed);
        for level in Level::available() {
            let k = Kernels::new(level);
            let (a, b): (Vec<f32>, Vec<f32>) = (0..len).map(|_| (r.unit(), r.unit())).unzip();
            prop_assert!(((k.dot)(&a, &b) - dot_f32(&a, &b)).abs() < 1e-4);
            let row: Vec<u8> = a.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            let columns = Columns { floats: &b, stride: len, len, index: &[0], ..Columns::default() };
            // A file's floats may lie anywhere.
            let floats: Vec<u8> = [0].into_iter().chain(a.iter().flat_map(|v| v.to_le_bytes())).collect();
            let mut out = [0.0];
            (k.f32)(&floats[1..], &columns, &mut out);
            prop_assert!((out[0] - dot_f32(&a, &b)).abs() < 1e-4);
            (k.f16)(&row, &columns, &mut out);
            let mut w = vec![0.0; len];
            dequantize_row(TensorType::F16, &row, &mut w).unwrap();
            prop_assert!((out[0] - dot_f32(&w, &b)).abs() < 1e-4);
        }
    }
}

/// Heads that attend to the rows of a tile, of any width and number.
fn attention(level: Level, width: usize, heads: usize, n: usize, seed: u64) {
    let (mut r, stride) = (Random(seed), width + 3);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| r.unit()).collect() };
    let (q, rows, before) = (random(heads * width), random(n * stride), random(heads * width));
    let weights = random(heads * TILE);
    let tile = Tile { rows: &rows, n, width, stride };
    let kernels = Kernels::new(level);
    let (mut scores, mut out) = (vec![0.0; heads * TILE], before.clone());
    (kernels.scores)(&q, &tile, &mut scores);
    (kernels.weigh)(&weights, &tile, &mut out);
    for h in 0..heads {
        let head = h * width..(h + 1) * width;
        for i in 0..n {
            let want = dot_f32(&q[head.clone()], tile.row(i));
            assert!((scores[h * TILE + i] - want).abs() < 1e-4, "{level:?} {width} {heads} {n}");
        }
        for c in 0..width {
            let added: f64 =
                (0..n).map(|i| f64::from(weights[h * TILE + i]) * f64::from(tile.row(i)[c])).sum();
            let want = f64::from(before[h * width + c]) + added;
            assert!((f64::from(out[h * width + c]) - want).abs() < 1e-4, "{level:?} {width} {heads} {n}");
        }
        // A head alone, the same bits.
        let (mut alone, mut one) = (vec![0.0; TILE], before[head.clone()].to_vec());
        (kernels.scores)(&q[head.clone()], &tile, &mut alone);
        (kernels.weigh)(&weights[h * TILE..(h + 1) * TILE], &tile, &mut one);
        assert_eq!(alone[..n], scores[h * TILE..h * TILE + n]);
        assert_eq!(one, out[head]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn heads_attend(width in 1usize..200, heads in 1usize..8, n in 1usize..=TILE, seed: u64) {
        for level in Level::available() {
            attention(level, width, heads, n, seed);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Steps that are compiled for the registers of a level give the bits of those that are not.
    #[test]
    fn small_steps_agree(width in 1usize..200, heads in 1usize..8, n in 1usize..=TILE, seed: u64) {
        let mut r = Random(seed);
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| 8.0 * r.unit()).collect() };
        let (rows, scores, state) = (values(TILE * width), values(heads * TILE), values(2 * heads));
        let (gate, up, y) = (values(width), values(width), values(width));
        let (streams, mix, out) = (values(4 * width), values(20), values(heads * width));
        let head_dim = 64 + width;
        let codec = RowCodec { format: KvFormat::Packed, head_dim, rotary: 16, index_dim: 32 };
        let mut stored = vec![0; codec.row_bytes()];
        codec.store_row(&mut values(head_dim), &mut stored);
        let tile = Tile { rows: &rows, n, width, stride: width };
        let steps = |level| {
            let small = Kernels::new(level).small;
            let (mut weights, mut out, mut state) = (scores.clone(), out.clone(), state.clone());
            let (max, sum) = state.split_at_mut(heads);
            (small.softmax)(&mut weights, &tile, 0.3, (max, sum), &mut out);
            let mut row = vec![0.0; head_dim];
            (small.load_row)(codec, &stored, &mut row);
            let mut hidden = gate.clone();
            (small.swiglu)(&mut hidden, &up, 5.0);
            let mut mixed = vec![0.0; width];
            (small.mix)(&mix[..4], &streams, &mut mixed);
            let mut joined = streams.clone();
            (small.join)(&y, mix.split_at(4), &mut joined);
            let all = [weights, out, state, row, hidden, mixed, joined].concat();
            all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let want = steps(Level::Scalar);
        for level in Level::available() {
            prop_assert!(steps(level) == want, "{level:?}");
        }
    }

    /// Every level gives the bits of the scalar one, and these are near the product of the decoded values.
    #[test]
    fn index_scores(heads in 1usize..70, blocks in 1usize..=BLOCKS, keys in 1usize..9, seed: u64) {
        let (mut r, dim) = (Random(seed), blocks * BLOCK);
        let unit = dim / 2 + blocks;
        let mut packed = |n: usize| -> Vec<u8> {
            let mut bytes: Vec<u8> = (0..n * unit).map(|_| r.next() as u8).collect();
            bytes.chunks_mut(unit).for_each(|v| v[dim / 2..].iter_mut().for_each(|s| *s = 120 + *s % 12));
            bytes
        };
        let (q, keys) = (packed(heads), packed(keys));
        let weights: Vec<f32> = (0..heads).map(|_| r.unit()).collect();
        let mut query = IndexQuery::default();
        query.load(&q, &weights, dim);
        let value = |v: &[u8]| -> Vec<f32> {
            let mut out = vec![0.0; dim];
            for (b, out) in out.chunks_mut(BLOCK).enumerate() {
                fp4::unpack_block(&v[b * BLOCK / 2..(b + 1) * BLOCK / 2], v[dim / 2 + b], out);
            }
            out
        };
        let mut want = vec![0.0; keys.len() / unit];
        (Kernels::new(Level::Scalar).index_scores)(&query, &keys, &mut want);
        for (key, want) in keys.chunks(unit).zip(&want) {
            let key = value(key);
            let parts = q.chunks(unit).zip(&weights).map(|(q, w)| w * dot_f32(&value(q), &key).max(0.0));
            let (sum, size) = parts.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            prop_assert!((sum - want).abs() <= 1e-5 * size, "{sum} {want}");
        }
        for level in Level::available() {
            let mut got = vec![0.0; want.len()];
            (Kernels::new(level).index_scores)(&query, &keys, &mut got);
            let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same, "{level:?}: {got:?} {want:?}");
        }
    }
}

#[test]
fn planes_have_every_eighth_value() {
    let q: Vec<i8> = (0..512).map(|i| (i % 251) as u8 as i8).collect();
    let mut got = vec![0; 512];
    planes(&q, &mut got);
    for (at, got) in got.into_iter().enumerate() {
        let (block, plane, code) = (at / 256, at / 32 % 8, at % 32);
        assert_eq!(got, q[256 * block + 8 * code + plane]);
    }
}

/// The integer formats.
const INTEGER: [TensorType; 4] = [TensorType::Q8_0, TensorType::Q2K, TensorType::Q4K, TensorType::Iq2Xxs];

/// Products of `weights`, `[rows, len]`, with all rows of a panel.
fn products(level: Level, ty: TensorType, weights: &[u8], p: &Panel, len: usize) -> Vec<f32> {
    let rows = p.x.len() / len;
    let index: Vec<u32> = (0..rows as u32).collect();
    let product = Kernels::new(level).product(ty, false).unwrap();
    let (q, d) = match product.input {
        Input::Float | Input::Int32 => (&p.q32, &p.d32),
        Input::Int256 => (&p.q256, &p.d256),
        Input::Planes256 => (&p.planes256, &p.d256),
    };
    let columns = Columns {
        q,
        d,
        sums: &p.sums,
        offsets: &p.offsets32,
        stride: len,
        len,
        index: &index,
        ..Columns::default()
    };
    let row = ty.bytes_of(len as u64) as usize;
    let mut out = vec![0.0; rows * weights.len() / row];
    product.multiply(weights, row, &columns, &mut out);
    out
}

#[cfg(target_arch = "x86_64")]
proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The integer formats' sums are exact and added in the same order at every level.
    #[test]
    fn levels_of_x86_agree(blocks in 1usize..=9, rows in 1usize..=11, seed: u64) {
        for ty in INTEGER {
            let mut r = Random(seed);
            let len = width(ty, blocks, seed);
            let weights: Vec<u8> = (0..35).flat_map(|_| random_row(ty, len, &mut r)).collect();
            let p = panel(len, rows, &mut r);
            let levels = Level::available().into_iter().skip(1);
            let all: Vec<_> = levels.map(|level| products(level, ty, &weights, &p, len)).collect();
            for (got, level) in all.iter().zip(Level::available().into_iter().skip(1)) {
                let same = got.iter().zip(&all[0]).all(|(a, b)| a.to_bits() == b.to_bits());
                prop_assert!(same, "{ty} {level:?}: {got:?} {:?}", all[0]);
            }
        }
    }
}

/// All weights and activations at their extremes, the worst case of the 16-bit intermediate sums.
#[test]
fn large_magnitudes_do_not_overflow() {
    let (len, one) = (512, half::f16::from_f32(1.0).to_le_bytes());
    for ty in INTEGER {
        let row = |byte: u8| {
            let mut block = vec![byte; ty.block_bytes() as usize];
            let scales: &[usize] = match ty {
                TensorType::Q2K => &[80, 82],
                TensorType::Q4K => &[0, 2],
                _ => &[0],
            };
            scales.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&one));
            block.repeat(len / ty.block_len() as usize)
        };
        let bytes = [0x80, 0x7f, 0xff, 0, 0x81, 0xf0, 0x0f];
        let weights: Vec<u8> = (0..35).flat_map(|i| row(bytes[i % bytes.len()])).collect();
        for columns in [1, 5, 9] {
            // Of one sign, and of both in turn.
            let x: Vec<f32> = (0..columns * len)
                .map(|i| match i / len % 3 {
                    0 => -127.0,
                    1 => 127.0,
                    _ => [127.0, -127.0][i % 2],
                })
                .collect();
            let p = quantized(x);
            for level in Level::available() {
                let got = products(level, ty, &weights, &p, len);
                for (i, got) in got.iter().enumerate() {
                    let (j, r) = (i / 35, i % 35);
                    let row = &weights[r * weights.len() / 35..(r + 1) * weights.len() / 35];
                    let (q, part) = (j * len..(j + 1) * len, |per: usize| j * len / per..(j + 1) * len / per);
                    let act32 = Act32 { q: &p.q32[q.clone()], d: &p.d32[part(32)] };
                    let act256 = Act256 { q: &p.q256[q], d: &p.d256[part(256)], sums: &p.sums[part(16)] };
                    let want = dot_row(ty, row, act32, act256).unwrap();
                    let near = (got - want).abs() <= 1e-5 * want.abs().max(1e4);
                    assert!(near, "{ty} {level:?} row {r} column {j}: {got} {want}");
                }
            }
        }
    }
}
