//! What products of a plane a row have in shared memory.
//!
//! The grid of IQ2_XXS, from `ds4-quant`. Each of its magnitudes is one of three, so that eight fit a word: where a device
//! picks bytes by nibbles, that word and the signs choose eight weights in two instructions, and each lane has a copy in
//! a bank of its own. Elsewhere it holds the magnitudes themselves.
//!
//! Rows of activations, where weights come 64 to a vector: lanes side by side then read activations 64 bytes apart, every
//! other one from another line of the cache.

use super::common::{Real, bytes_of, cube_sum, rms_scale};
use super::dot::{Four, Input, Quad, dot_four};
use super::fetch::load_x;
use super::hyper::MOST_PLANES;
use super::plane::{lane, ptx};
use cubecl::prelude::*;
use ds4_quant::IQ2XXS_GRID;

/// Copies of a word of levels, a bank each: every lane of a plane of PTX reads its own.
const COPIES: usize = 32;
/// The three magnitudes by level, and the negative ones.
const LEVELS: [u32; 2] = [0x002b_1908, 0x00d5_e7f8];

/// Bytes of shared memory of the tables, where kernels are compiled to PTX and where they are not.
pub const fn tables_bytes(ptx: bool) -> usize {
    if ptx { 4 * 256 * COPIES } else { 8 * 256 }
}

/// The grid for the matrix units: eight magnitudes a code, or where bytes are picked their levels. Empty where no format
/// needs it.
#[derive(CubeType)]
pub struct Grid {
    /// Two words a code.
    pub eights: Shared<[Vector<u32, Const<2>>]>,
    /// One word a code.
    pub levels: Shared<[u32]>,
}

/// The grid for products of a plane a row.
#[derive(CubeType)]
pub struct Tables {
    grid: Grid,
    /// Eight levels a code, nibbles of a word, in copies.
    levels: Shared<[Quad]>,
    /// [`LEVELS`], in registers: a compiler that knew the values would load them for every use.
    values: Vector<u32, Const<2>>,
    /// Address in shared memory of this lane's copy of the levels.
    own: u32,
    /// Which of the two it is.
    #[cube(comptime)]
    picks: bool,
}

/// Words of the tables: 256 pairs of four magnitudes each, then 256 of levels, then what these are, for each lane.
pub fn words() -> Vec<u32> {
    pairs().into_iter().chain(levels()).chain([LEVELS; COPIES].concat()).collect()
}

/// Eight levels a code.
fn levels() -> impl Iterator<Item = u32> {
    IQ2XXS_GRID.iter().map(|g| (0..).zip(g).map(|(i, m)| u32::from(m >> 4) << (4 * i)).sum())
}

fn pairs() -> Vec<u32> {
    let pairs = IQ2XXS_GRID.iter().flat_map(|g| {
        let (a, b) = g.split_at(4);
        [a, b].map(|h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]))
    });
    pairs.collect()
}

/// The pairs with the middle bytes of each word exchanged: bytes 0 and 2 are a pair, 1 and 3 the next. Then the levels.
pub fn pair_words() -> Vec<u32> {
    let exchanged = pairs().into_iter().map(|w| w & 0xff00_00ff | (w & 0xff00) << 8 | (w >> 8) & 0xff00);
    exchanged.chain(levels()).collect()
}

#[cube]
impl Grid {
    /// Loads it into shared memory; the whole cube takes part.
    pub fn load(words: &[Vector<u32, Const<2>>], #[comptime] needed: bool) -> Grid {
        let device = comptime::device_properties().comptime();
        let picks = comptime!(ptx(&device));
        let (pairs, codes) = comptime!((
            if needed && !picks { 256usize } else { 1usize },
            if needed && picks { 256usize } else { 2usize }
        ));
        let mut eights = Shared::<[Vector<u32, Const<2>>]>::new_slice(pairs);
        let mut levels = Shared::<[u32]>::new_slice(codes);
        if comptime!(needed) {
            let mut i = UNIT_POS as usize;
            while i < comptime!(if picks { 128usize } else { 256usize }) {
                if comptime!(picks) {
                    let pair = words[256 + i];
                    levels[2 * i] = pair.extract(0usize);
                    levels[2 * i + 1] = pair.extract(1usize);
                } else {
                    eights[i] = words[i];
                }
                i += CUBE_DIM as usize;
            }
            sync_cube();
        }
        Grid { eights, levels }
    }
}

#[cube]
impl Tables {
    /// Loads them into shared memory; the whole cube takes part, and then [meets](Tables::meet).
    pub fn load(words: &[Vector<u32, Const<2>>], #[comptime] needed: bool) -> Tables {
        let device = comptime::device_properties().comptime();
        let picks = comptime!(needed && ptx(&device));
        let mut levels =
            Shared::<[Quad]>::new_slice(comptime!(if picks { 256 * COPIES / 4 } else { 1usize }));
        if comptime!(picks) {
            let mut code = UNIT_POS as usize;
            while code < 256 {
                let pair = words[256 + code / 2];
                let word = select(code % 2 == 0, pair.extract(0usize), pair.extract(1usize));
                #[unroll]
                for i in 0..comptime!(COPIES / 4) {
                    // Units side by side write to different banks.
                    let copy = (i + code) % comptime!(COPIES / 4);
                    levels[code * comptime!(COPIES / 4) + copy] = Quad::new(word);
                }
                code += CUBE_DIM as usize;
            }
        }
        let mut values = Vector::<u32, Const<2>>::new(0u32);
        if comptime!(picks) {
            // A value that all units share would be kept where they do, and copied for every use.
            values = words[384 + lane()];
        }
        Tables {
            grid: Grid::load(words, comptime!(needed && !picks)),
            levels,
            values,
            own: 0u32.runtime(),
            picks: comptime!(picks),
        }
    }

    /// The cube meets: what its units have laid into shared memory can be read.
    pub fn meet(&mut self) {
        sync_cube();
        if comptime!(self.picks) {
            self.own = shared_address(&self.levels) + 4 * lane() as u32;
        }
    }

    /// The eight weights of code `v` of a group, int8: two words.
    pub fn eight(&self, codes: u32, signs: u32, #[comptime] v: usize) -> (u32, u32) {
        if comptime!(self.picks) {
            let code = pick(codes, 0u32, comptime!(0x4440 + v as u32));
            let by = signed_levels(shared_word(self.own + code * comptime!(4 * COPIES as u32)), signs, v);
            let (plus, minus) = (self.values.extract(0usize), self.values.extract(1usize));
            (pick(plus, minus, by), pick(plus, minus, by >> 16))
        } else {
            let code = ((codes >> comptime!(8 * v as u32)) & 255) as usize;
            let magnitudes = self.grid.eights[code];
            let low = signed(magnitudes.extract(0usize), signs >> comptime!(v as u32));
            (low, signed(magnitudes.extract(1usize), signs >> comptime!(16 + v as u32)))
        }
    }
}

/// Levels, each with the sign of its weight of code `v` as the third bit of its nibble, which chooses among the negative
/// ones.
#[cube]
pub fn signed_levels(levels: u32, signs: u32, #[comptime] v: usize) -> u32 {
    let minus = (signs << comptime!(2u32.saturating_sub(v as u32))) >> comptime!(v.saturating_sub(2) as u32);
    levels | (minus & 0x4444_4444)
}

/// Four of the eight bytes of two words, by the lowest four nibbles of `by`; on NVIDIA.
#[cube]
pub fn pick(low: u32, high: u32, by: u32) -> u32 {
    let out: u32;
    gpu_asm!("prmt.b32 {}, {}, {}, {};", out(_) out, in(_) low, in(_) high, in(_) by, options(pure, nomem));
    // A value, which may be picked from in turn: what an assembler line fills is a place.
    #[allow(clippy::identity_op)]
    let value = out | 0;
    value
}

/// Where a slice is in shared memory, on NVIDIA. Of what is read there not before the cube has met: it could be read
/// earlier.
#[cube]
pub fn shared_address<T: CubePrimitive>(slice: &Shared<[T]>) -> u32 {
    // SAFETY: it has a first value.
    let from = unsafe { slice[0..1].as_ptr_unchecked() };
    let out: u32;
    gpu_asm!("{{.reg .u64 t; cvta.to.shared.u64 t, {}; cvt.u32.u64 {}, t;}}", in(_) from, out(_) out);
    out
}

/// The word at an address in shared memory, which is one sum for the whole cube's tables: compilers make three of it where
/// they see an index.
#[cube]
fn shared_word(address: u32) -> u32 {
    let out: u32;
    gpu_asm!("ld.shared.u32 {}, [{}];", out(_) out, in(_) address, options(pure, nomem));
    out
}

/// Four signed bytes: magnitudes, negated where the lowest bits of the lowest four nibbles of `signs` are ones.
#[cube]
fn signed(magnitudes: u32, signs: u32) -> u32 {
    let nibbles = signs & 0x1111;
    let pairs = (nibbles | (nibbles << 8)) & 0x0011_0011;
    let minus = (pairs | (pairs << 4)) & 0x0101_0101;
    // Two's complement of each byte: no carry crosses bytes, since no magnitude is zero.
    (magnitudes ^ (minus * 255)) + minus
}

/// Rows of int8 activations in shared memory. After every four vectors one is left out, so that lanes which read every
/// fourth find theirs in different banks.
#[derive(CubeType)]
pub struct Staged {
    quants: Shared<[Quad]>,
    sums: Shared<[i32]>,
    scales: Shared<[f32]>,
    /// None: the activations are read from memory.
    #[cube(comptime)]
    pub rows: usize,
}

/// Rows that have yet to be normed, by whoever multiplies them.
#[derive(CubeType, CubeLaunch)]
pub struct Raw {
    /// `[n, stride]`.
    pub values: Box<[Four]>,
    /// The norm's weight.
    pub weight: Box<[Four]>,
    /// Values of a row.
    #[cube(comptime)]
    pub width: usize,
    /// Values from row to row.
    #[cube(comptime)]
    pub stride: usize,
    /// Epsilon of the norm.
    #[cube(comptime)]
    pub eps: Real,
    /// Units of a cube.
    #[cube(comptime)]
    pub units: usize,
}

/// A unit's share of raw rows.
#[derive(CubeType)]
pub struct Fetched {
    values: Array<Four>,
    weights: Array<Four>,
}

/// Vectors of a row of `stride` values that each of a cube's units has.
const fn steps(stride: usize, units: usize) -> usize {
    (stride / 4).div_ceil(units)
}

/// `rows` rows from row `first` on, those beyond the last as the last, on their way. Who fetches weights, too, does so
/// later: these are few, and would wait for them.
#[cube]
pub fn fetch_raw(raw: &Raw, x: &Input, first: usize, end: usize, #[comptime] rows: usize) -> Fetched {
    let steps = comptime!(steps(x.stride, raw.units));
    let mut values = Array::<Four>::new(comptime!(rows * steps));
    let mut weights = Array::<Four>::new(steps);
    #[unroll]
    for i in 0..steps {
        let own = usize::min(UNIT_POS as usize + comptime!(i * raw.units), comptime!(raw.width / 4 - 1));
        weights[i] = load_x(&raw.weight, own, true);
        #[unroll]
        for r in 0..rows {
            let row = usize::min(first + r, end - 1) * comptime!(raw.stride / 4);
            values[comptime!(r * steps + i)] = load_x(&raw.values, row + own, true);
        }
    }
    Fetched { values, weights }
}

/// Vectors of a row of `stride` values, with those left out.
pub const fn staged_quads(stride: usize) -> usize {
    stride / 16 + stride / 64
}

/// Scales of a row, likewise.
pub const fn staged_scales(stride: usize) -> usize {
    stride / 32 + stride / 64
}

/// Bytes of shared memory of `rows` staged rows.
pub const fn staged_bytes(rows: usize, stride: usize) -> usize {
    rows * (20 * staged_quads(stride) + 4 * staged_scales(stride))
}

/// Four values of a row of `stride`, those of units side by side next to each other, in int8; the whole plane takes part.
#[cube]
pub fn stage_four(
    quants: &mut Shared<[Quad]>,
    scales: &mut Shared<[f32]>,
    #[comptime] row: usize,
    four: usize,
    value: Four,
    #[comptime] stride: usize,
) {
    let bytes = bytes_of(value);
    let mut quad = Quad::empty();
    #[unroll]
    for j in 0..4usize {
        quad.insert(j, plane_shuffle(bytes.word, (lane() as u32 & !3u32) + comptime!(j as u32)));
    }
    if four % 4 == 0 && four < comptime!(stride / 4) {
        quants[comptime!(row * staged_quads(stride)) + four / 4 + four / 16] = quad;
        if four % 8 == 0 {
            scales[comptime!(row * staged_scales(stride)) + four / 8 + four / 16] = bytes.scale;
        }
    }
}

#[cube]
impl Staged {
    /// No rows.
    pub fn none(x: &Input) -> Staged {
        Staged::load(x, 0usize, 0usize, false)
    }

    /// Loads `rows` rows of `x` from row `first` on, with their sums where they are `summed`; the whole cube takes part, and
    /// meets before it reads them.
    pub fn load(x: &Input, first: usize, #[comptime] rows: usize, #[comptime] summed: bool) -> Staged {
        let (in_row, scales_in_row) = (comptime!(x.stride / 16), comptime!(x.stride / 32));
        let quads = comptime!(usize::max(rows * staged_quads(x.stride), 1));
        let mut quants = Shared::<[Quad]>::new_slice(quads);
        let mut sums = Shared::<[i32]>::new_slice(comptime!(if summed { quads } else { 1 }));
        let mut scales = Shared::<[f32]>::new_slice(comptime!(usize::max(rows * staged_scales(x.stride), 1)));
        if comptime!(rows > 0) {
            let mut i = UNIT_POS as usize;
            while i < comptime!(rows * x.stride / 16) {
                let at = i + i / 4;
                quants[at] = x.quants[first * in_row + i];
                if comptime!(summed) {
                    sums[at] = x.sums[first * in_row + i];
                }
                // Half as many.
                if i < comptime!(rows * x.stride / 32) {
                    scales[i + i / 2] = x.scales[first * scales_in_row + i];
                }
                i += CUBE_DIM as usize;
            }
        }
        Staged { quants, sums, scales, rows: comptime!(rows) }
    }

    /// `rows` rows that were fetched, normed as by [`norm`](super::hyper::norm); the whole cube takes part, and has met. `x`:
    /// their shape.
    pub fn normed(fetched: &Fetched, raw: &Raw, x: &Input, #[comptime] rows: usize) -> Staged {
        let quads = comptime!(rows * staged_quads(x.stride));
        let mut quants = Shared::<[Quad]>::new_slice(quads);
        let mut scales = Shared::<[f32]>::new_slice(comptime!(rows * staged_scales(x.stride)));
        let mut scratch = Shared::<[f32]>::new_slice(MOST_PLANES);
        let steps = comptime!(steps(x.stride, raw.units));
        #[unroll]
        for r in 0..rows {
            let mut sum = 0.0f32;
            #[unroll]
            for i in 0..steps {
                let k = UNIT_POS as usize + comptime!(i * raw.units);
                let v = fetched.values[comptime!(r * steps + i)];
                sum += select(k < comptime!(raw.width / 4), dot_four(v, v), 0.0f32);
            }
            let scale = rms_scale(cube_sum(sum, &mut scratch), raw.width, raw.eps);
            #[unroll]
            for i in 0..steps {
                let k = UNIT_POS as usize + comptime!(i * raw.units);
                let v = fetched.weights[i] * (fetched.values[comptime!(r * steps + i)] * Four::new(scale));
                let v = select(k < comptime!(raw.width / 4), v, Four::new(0.0f32));
                stage_four(&mut quants, &mut scales, r, k, v, x.stride);
            }
        }
        sync_cube();
        Staged { quants, sums: Shared::<[i32]>::new_slice(1usize), scales, rows: comptime!(rows) }
    }

    /// Vector `at` of a row of the activations, from value `offset` on.
    pub fn quad(&self, x: &Input, row: usize, offset: usize, at: usize) -> Quad {
        if comptime!(self.rows > 0) {
            self.quants[row * comptime!(staged_quads(x.stride)) + at + at / 4]
        } else {
            x.quants[row * comptime!(x.stride / 16) + offset / 16 + at]
        }
    }

    /// Sum of the vector's values.
    pub fn sum(&self, x: &Input, row: usize, offset: usize, at: usize) -> i32 {
        if comptime!(self.rows > 0) {
            self.sums[row * comptime!(staged_quads(x.stride)) + at + at / 4]
        } else {
            x.sums[row * comptime!(x.stride / 16) + offset / 16 + at]
        }
    }

    /// Scale `at` of a row.
    pub fn scale(&self, x: &Input, row: usize, offset: usize, at: usize) -> f32 {
        if comptime!(self.rows > 0) {
            self.scales[row * comptime!(staged_scales(x.stride)) + at + at / 2]
        } else {
            x.scales[row * comptime!(x.stride / 32) + offset / 32 + at]
        }
    }
}
