//! Scores of index keys (A.7) in integers: keys and queries are FP4 with a scale per 32 values, so twice a value is an integer of at most 12
//! and the product over 32 values is exact.
//!
//! A lane is a head: a query is laid out so that a vector holds four values of each of 16 heads, and a key's four bytes meet them at once.

use ds4_quant::{e8m0_to_f32, fp4};

/// Heads side by side; their number is filled up with heads that weigh nothing.
pub const HEADS: usize = 16;

/// Values of a scale.
pub const BLOCK: usize = fp4::BLOCK;

/// Twice the value of every FP4 code.
pub(crate) const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What makes twice a key's value unsigned.
pub(crate) const MIDDLE: i8 = 12;

/// Four values of each of 16 heads.
pub(crate) type Step = [[i8; 4]; HEADS];

/// 16 heads of a query.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Heads {
    /// `[blocks, 8]`, of at most [`BLOCKS`] blocks: twice the values.
    q: [[Step; BLOCK / 4]; BLOCKS],
    /// `[blocks]`: sums of a block times [`MIDDLE`], negative.
    offsets: [[i32; HEADS]; BLOCKS],
    /// `[blocks]`: a quarter of the scales.
    d: [[f32; HEADS]; BLOCKS],
    /// Weights of the heads.
    weights: [f32; HEADS],
}

/// Most blocks of a key.
pub const BLOCKS: usize = 4;

/// A query of all heads.
#[derive(Clone, Default)]
pub struct IndexQuery {
    heads: Vec<Heads>,
    /// Blocks in use.
    blocks: usize,
}

/// Scores of some keys, `[codes, scales]` one behind the other, into `scores`.
pub type IndexScores = fn(query: &IndexQuery, keys: &[u8], scores: &mut [f32]);

impl IndexQuery {
    /// Takes a query's heads, packed as keys are, and their weights. `dim`: values of a head, at most `BLOCKS * BLOCK`.
    pub fn load(&mut self, packed: &[u8], weights: &[f32], dim: usize) {
        const NONE: Heads = Heads {
            q: [[[[0; 4]; HEADS]; BLOCK / 4]; BLOCKS],
            offsets: [[0; HEADS]; BLOCKS],
            d: [[0.0; HEADS]; BLOCKS],
            weights: [0.0; HEADS],
        };
        self.blocks = dim / BLOCK;
        self.heads.clear();
        self.heads.resize(weights.len().div_ceil(HEADS), NONE);
        let key_bytes = dim / 2 + self.blocks;
        for (h, (head, weight)) in packed.chunks_exact(key_bytes).zip(weights).enumerate() {
            let (out, lane) = (&mut self.heads[h / HEADS], h % HEADS);
            out.weights[lane] = *weight;
            let (codes, scales) = head.split_at(dim / 2);
            for (b, (codes, scale)) in codes.chunks_exact(BLOCK / 2).zip(scales).enumerate() {
                let mut sum = 0;
                for (step, pair) in codes.as_chunks::<2>().0.iter().enumerate() {
                    let [x, y] = pair.map(|codes| (codes & 15, codes >> 4));
                    let four = [x.0, x.1, y.0, y.1].map(|code| TWICE[usize::from(code)]);
                    out.q[b][step][lane] = four;
                    sum += four.iter().map(|&v| i32::from(v)).sum::<i32>();
                }
                out.offsets[b][lane] = -i32::from(MIDDLE) * sum;
                out.d[b][lane] = 0.25 * e8m0_to_f32(*scale);
            }
        }
    }

    /// Bytes of a key.
    pub(crate) fn key_bytes(&self) -> usize {
        self.blocks * (BLOCK / 2 + 1)
    }

    /// Those of its codes, which come first.
    pub(crate) fn code_bytes(&self) -> usize {
        self.blocks * BLOCK / 2
    }

    pub(crate) fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        let blocks = self.blocks;
        self.heads.iter().map(move |h| Group {
            q: &h.q[..blocks],
            offsets: &h.offsets[..blocks],
            d: &h.d[..blocks],
            weights: &h.weights,
        })
    }
}

/// 16 heads of a query, as far as their blocks are in use.
pub(crate) struct Group<'a> {
    pub(crate) q: &'a [[Step; BLOCK / 4]],
    pub(crate) offsets: &'a [[i32; HEADS]],
    pub(crate) d: &'a [[f32; HEADS]],
    pub(crate) weights: &'a [f32; HEADS],
}

/// A key's values, twice each, plus [`MIDDLE`].
pub(crate) fn unpack(codes: &[u8], out: &mut [u8; BLOCK * BLOCKS]) {
    for (out, codes) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        *out = [codes & 15, codes >> 4].map(|code| (TWICE[usize::from(code)] + MIDDLE) as u8);
    }
}

/// The reference: a lane's sums in the order that all levels have.
pub(super) fn scores(query: &IndexQuery, keys: &[u8], scores: &mut [f32]) {
    let mut key = [0; BLOCK * BLOCKS];
    for (bytes, score) in keys.chunks_exact(query.key_bytes()).zip(scores) {
        let (codes, scales) = bytes.split_at(query.code_bytes());
        unpack(codes, &mut key);
        let mut lanes = [0.0; HEADS];
        for group in query.groups() {
            for (lane, total) in lanes.iter_mut().enumerate() {
                let mut dot = 0f32;
                for (b, (q, scale)) in group.q.iter().zip(scales).enumerate() {
                    let fours = key.as_chunks::<BLOCK>().0[b].as_chunks::<4>().0;
                    let products = q.iter().zip(fours).flat_map(|(q, k)| q[lane].into_iter().zip(k));
                    let int: i32 = products.map(|(q, &k)| i32::from(q) * i32::from(k)).sum();
                    let int = (int + group.offsets[b][lane]) as f32;
                    dot = int.mul_add(group.d[b][lane] * e8m0_to_f32(*scale), dot);
                }
                *total = group.weights[lane].mul_add(dot.max(0.0), *total);
            }
        }
        *score = total(&lanes);
    }
}

/// The sum of all lanes, by halves.
pub(crate) fn total(lanes: &[f32; HEADS]) -> f32 {
    let mut sums = *lanes;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}
