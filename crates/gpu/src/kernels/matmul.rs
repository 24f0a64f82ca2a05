//! Products with many rows, on the matrix units: f16 tiles, sums in f32.
//!
//! A cube multiplies a tile of rows of activations with a tile of rows of weights, a slice of 32 or 64 values of depth
//! at a time. Both come into shared memory as f16, the weights decoded on the way in: once for all the rows of the tile.
//! While the matrix units work on one slice, the next is decoded, and the one after it on its way into registers. What a row's result is does not depend on the other rows of the tile, nor on the tile's size.

use super::common::Real;
use super::dot::{Eight, Four, Quad, Weights, eight_signs};
use super::experts::swiglu;
use crate::layout::Format;
use cubecl::prelude::*;
use half::f16;

/// Units of a cube.
pub const UNITS: usize = 128;

type Two = Vector<f16, Const<2>>;

/// How a cube's planes share a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiling {
    /// Side of the matrix units' tiles.
    pub side: usize,
    /// Rows of activations in a tile.
    pub rows: usize,
    /// Rows of weights in a tile: one or two for each unit to load.
    pub columns: usize,
    /// Depth of a slice.
    pub depth: usize,
    /// Planes along the rows.
    pub planes_m: usize,
    /// Planes along the columns.
    pub planes_n: usize,
    /// Slices in shared memory at once: of two, one is decoded while the other is multiplied.
    pub buffers: usize,
}

impl Tiling {
    /// Tiles of a plane along the rows.
    pub const fn m(&self) -> usize {
        self.rows / self.planes_m / self.side
    }
    /// Tiles of a plane along the columns.
    pub const fn n(&self) -> usize {
        self.columns / self.planes_n / self.side
    }
    /// Eights of f16 from row to row of a tile in shared memory: one more than a slice has, so that rows start in
    /// different banks.
    const fn pitch(&self) -> usize {
        self.depth / 8 + 1
    }
    /// Eights of activations that a unit loads.
    const fn eights(&self) -> usize {
        (self.rows * self.depth / 8).div_ceil(UNITS)
    }
    /// Chunks of 16 weights to decode after step `k` of a slice: all by the last, none before the middle.
    const fn chunks_after(&self, k: usize) -> (usize, usize) {
        let (steps, chunks) = (self.depth / self.side, self.depth / 16);
        let (half, late) = (steps / 2, if k >= steps / 2 { k - steps / 2 } else { return (0, 0) });
        (late * chunks / (steps - half), (late + 1) * chunks / (steps - half))
    }
    /// Rows of activations from one eight of a unit to its next.
    const fn row_step(&self) -> usize {
        8 * UNITS / self.depth
    }
    /// Bytes of shared memory, with the largest table and what experts lay side by side.
    pub const fn shared_bytes(&self) -> usize {
        self.buffers * (self.rows + self.columns) * self.pitch() * 16
            + 256 * 16
            + 2 * self.side * self.side * 4 * self.planes_m * self.planes_n
    }
}

/// Shared memory that the products of experts need at the least.
pub const fn least_shared_bytes(side: usize) -> usize {
    Tiling { side, rows: 64, columns: 2 * UNITS, depth: 32, planes_m: 1, planes_n: 4, buffers: 1 }
        .shared_bytes()
}

/// The grid of IQ2_XXS in f16: eight magnitudes of a code.
#[derive(CubeType)]
pub struct HalfTables {
    grid: Shared<[Quad]>,
}

#[cube]
impl HalfTables {
    fn load(words: &[Quad], #[comptime] needed: bool) -> HalfTables {
        let mut grid = Shared::<[Quad]>::new_slice(comptime!(if needed { 256usize } else { 1usize }));
        if comptime!(needed) {
            let mut i = UNIT_POS as usize;
            while i < 256 {
                grid[i] = words[i];
                i += CUBE_DIM as usize;
            }
            sync_cube();
        }
        HalfTables { grid }
    }
}

/// Part of a row of weights as it is stored: a slice of depth.
#[derive(CubeType)]
struct Stored {
    quads: Array<Quad>,
    /// Scales, or scale and minimum of a block.
    scales: Array<f32>,
    /// Scales within the block.
    sub: Array<u32>,
}

/// Quads of a slice.
const fn quads_of(format: Format, depth: usize) -> usize {
    depth.div_ceil(format.unit())
}

#[cube]
impl Stored {
    fn new(#[comptime] format: Format, #[comptime] depth: usize) -> Stored {
        Stored {
            quads: Array::<Quad>::new(comptime!(quads_of(format, depth))),
            scales: Array::<f32>::new(2usize),
            sub: Array::<u32>::new(2usize),
        }
    }
}

/// Loads slice `slice` of row `row`. Depth beyond the end of the row is zeros.
#[cube]
fn fetch(w: &Weights, row: usize, slice: usize, to: &mut Stored, #[comptime] depth: usize) {
    let units = comptime!(w.input / w.format.unit());
    let count = comptime!(quads_of(w.format, depth));
    let first = slice * comptime!(depth) / comptime!(w.format.unit());
    #[unroll]
    for i in 0..count {
        let at = first + i;
        let end = comptime!(units - 1);
        let quad = if comptime!(w.format == Format::F16) {
            Quad::reinterpret(w.halves.index(0usize)[row * units + usize::min(at, end)])
        } else {
            w.quants.index(0usize)[row * units + usize::min(at, end)]
        };
        to.quads[i] =
            if comptime!(w.input % depth == 0) { quad } else { select(at < units, quad, Quad::new(0u32)) };
    }
    match comptime!(w.format) {
        Format::F32 | Format::F16 => {}
        Format::Q8 =>
        {
            #[unroll]
            for i in 0..comptime!(depth / 32) {
                let at = usize::min(slice * comptime!(depth / 32) + i, comptime!(units / 2 - 1));
                to.scales[i] = f32::cast_from(w.scales.index(0usize)[row * comptime!(units / 2) + at]);
            }
        }
        Format::Iq2 => {
            let block = row * comptime!(units / 4) + first / 4;
            to.scales[0] = f32::cast_from(w.scales.index(0usize)[block]);
        }
        Format::Q2K => {
            let block = row * comptime!(units / 4) + first / 4;
            to.scales[0] = f32::cast_from(w.scales.index(0usize)[2 * block]);
            to.scales[1] = f32::cast_from(w.scales.index(0usize)[2 * block + 1]);
            to.sub[0] = w.sub.index(0usize)[row * units + first];
        }
        Format::Q4K => {
            let block = row * comptime!(units / 8) + first / 8;
            to.scales[0] = f32::cast_from(w.scales.index(0usize)[2 * block]);
            to.scales[1] = f32::cast_from(w.scales.index(0usize)[2 * block + 1]);
            let (word, shift) = (4 * block + first / 4 % 2, (8 * (first % 4)) as u32);
            to.sub[0] = w.sub.index(0usize)[word] >> shift;
            to.sub[1] = w.sub.index(0usize)[word + 2] >> shift;
        }
    }
}

/// Two f16 in a word.
#[cube]
fn word_of(v: Two) -> u32 {
    u32::reinterpret(v)
}

#[cube]
fn two_of(word: u32) -> Two {
    Two::reinterpret(word)
}

/// Sixteen unsigned bytes as f16, minus `offset`, times `scale`, minus `low`: two quads.
#[cube]
fn bytes_to_half(bytes: Quad, #[comptime] offset: f32, scale: Two, low: Two, out: &mut Array<Quad>) {
    let offset = pair_of(comptime!(offset));
    #[unroll]
    for i in 0..2usize {
        let mut q = Quad::empty();
        #[unroll]
        for j in 0..2usize {
            let four = bytes.extract(comptime!(2 * i + j));
            // 0x6400 is 1024, whose last bits are ones.
            let a = (four & 0xff) | ((four & 0xff00) << 8) | 0x6400_6400;
            let b = ((four >> 16) & 0xff) | ((four >> 8) & 0x00ff_0000) | 0x6400_6400;
            q.insert(comptime!(2 * j), word_of((two_of(a) - offset) * scale - low));
            q.insert(comptime!(2 * j + 1), word_of((two_of(b) - offset) * scale - low));
        }
        out[i] = q;
    }
}

/// Two f32 as f16.
#[cube]
fn pair(a: f32, b: f32) -> u32 {
    let mut v = Two::empty();
    v.insert(0usize, f16::cast_from(a));
    v.insert(1usize, f16::cast_from(b));
    word_of(v)
}

#[cube]
fn pair_of(value: f32) -> Two {
    Two::new(f16::cast_from(value))
}

/// Weights `16 * chunk ..` of a slice as f16, two quads; of the second half of a quad where that is `odd`.
#[cube]
fn decode(
    from: &Stored,
    tables: &HalfTables,
    odd: bool,
    #[comptime] chunk: usize,
    #[comptime] format: Format,
    #[comptime] depth: usize,
) -> Array<Quad> {
    let mut out = Array::<Quad>::new(2usize);
    // Whether slices are halves of a quad.
    let halves = comptime!(depth < format.unit());
    match comptime!(format) {
        Format::F32 =>
        {
            #[unroll]
            for i in 0..2usize {
                let a = Four::reinterpret(from.quads[comptime!(4 * chunk + 2 * i)]);
                let b = Four::reinterpret(from.quads[comptime!(4 * chunk + 2 * i + 1)]);
                let mut q = Quad::empty();
                q.insert(0usize, pair(a.extract(0usize), a.extract(1usize)));
                q.insert(1usize, pair(a.extract(2usize), a.extract(3usize)));
                q.insert(2usize, pair(b.extract(0usize), b.extract(1usize)));
                q.insert(3usize, pair(b.extract(2usize), b.extract(3usize)));
                out[i] = q;
            }
        }
        Format::F16 => {
            out[0] = from.quads[comptime!(2 * chunk)];
            out[1] = from.quads[comptime!(2 * chunk + 1)];
        }
        Format::Iq2 => {
            // Codes of four eights, then their signs and a scale; twice in a quad.
            let quad = from.quads[0];
            let group = comptime!(chunk / 2);
            let mut codes = quad.extract(comptime!(2 * group));
            let mut aux = quad.extract(comptime!(2 * group + 1));
            if comptime!(halves) {
                codes = select(odd, quad.extract(2usize), codes);
                aux = select(odd, quad.extract(3usize), aux);
            }
            let scale = pair_of(from.scales[0] * 0.125f32 * f32::cast_from(2 * (aux >> 28) + 1));
            #[unroll]
            for i in 0..2usize {
                let eight = comptime!(2 * (chunk % 2) as u32 + i as u32);
                let magnitude = tables.grid[((codes >> comptime!(8 * eight)) & 255) as usize];
                // Two copies of the signs, so that one shift brings two of them to the tops of two halves.
                let signs = eight_signs(aux >> comptime!(7 * eight)) * 0x8001;
                let mut q = Quad::empty();
                #[unroll]
                for j in 0..4usize {
                    let flip = (signs << comptime!(15 - 2 * j as u32)) & 0x8000_8000;
                    q.insert(j, word_of(two_of(magnitude.extract(j) ^ flip) * scale));
                }
                out[i] = q;
            }
        }
        Format::Q8 => {
            let scale = pair_of(from.scales[comptime!(chunk / 2)]);
            let bytes = from.quads[chunk] ^ Quad::new(0x8080_8080u32);
            let none = pair_of(0.0f32);
            bytes_to_half(bytes, comptime!(1152.0f32), scale, none, &mut out);
        }
        Format::Q2K => {
            let mut shift = comptime!(2 * chunk as u32).runtime();
            if comptime!(halves) {
                shift += select(odd, 4u32, 0u32);
            }
            let sub = from.sub[0] >> (4 * shift);
            let scale = pair_of(from.scales[0] * f32::cast_from(sub & 15));
            let low = pair_of(from.scales[1] * f32::cast_from((sub >> 4) & 15));
            let bytes = (from.quads[0] >> Quad::new(shift)) & Quad::new(0x0303_0303u32);
            bytes_to_half(bytes, comptime!(1024.0f32), scale, low, &mut out);
        }
        Format::Q4K => {
            let group = comptime!(chunk as u32 / 2);
            let scale = pair_of(from.scales[0] * f32::cast_from((from.sub[0] >> comptime!(8 * group)) & 255));
            let low = pair_of(from.scales[1] * f32::cast_from((from.sub[1] >> comptime!(8 * group)) & 255));
            let bytes = (from.quads[comptime!(chunk / 2)] >> Quad::new(comptime!(4 * (chunk as u32 % 2))))
                & Quad::new(0x0f0f_0f0fu32);
            bytes_to_half(bytes, comptime!(1024.0f32), scale, low, &mut out);
        }
    }
    out
}

/// Decodes chunks `first..end` of 16 weights of a slice of a row into shared memory.
#[cube]
fn store_weights(
    from: &Stored,
    tables: &HalfTables,
    odd: bool,
    b: &mut Shared<[Eight]>,
    at: usize,
    #[comptime] chunks: (usize, usize),
    #[comptime] format: Format,
    #[comptime] depth: usize,
) {
    #[unroll]
    for chunk in comptime!(chunks.0)..comptime!(chunks.1) {
        let decoded = decode(from, tables, odd, chunk, format, depth);
        b[at + comptime!(2 * chunk)] = Eight::reinterpret(decoded[0]);
        b[at + comptime!(2 * chunk + 1)] = Eight::reinterpret(decoded[1]);
    }
}

/// Sums of a plane's tiles.
type Sums = Sequence<cmma::Matrix<f32>>;

#[cube]
fn zero_sums(#[comptime] t: Tiling) -> Sums {
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(t.m() * t.n()) {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            t.side,
            t.side,
            t.side,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    sums
}

/// A tile of f16 from shared memory.
#[cube]
fn tile_at(
    shared: &Shared<[Eight]>,
    at: usize,
    #[comptime] end: usize,
    #[comptime] ident: cmma::MatrixIdent,
    #[comptime] layout: cmma::MatrixLayout,
    #[comptime] t: Tiling,
) -> cmma::Matrix<f16> {
    // SAFETY: it is filled before it is used.
    let mut tile = unsafe { cmma::Matrix::<f16>::uninitialized(ident, t.side, t.side, t.side, layout) };
    cmma::load(&mut tile, &shared[at..end], comptime!(8 * t.pitch() as u32));
    tile
}

/// Row of activations of a plane's tile `i`, within the cube's.
#[cube]
fn row_of(#[comptime] i: usize, #[comptime] t: Tiling) -> usize {
    (PLANE_POS as usize / comptime!(t.planes_n)) * comptime!(t.rows / t.planes_m) + comptime!(i * t.side)
}

/// Row of weights of a plane's tile `j`, within the cube's. Of a pair of matrices, whose rows are the halves of the
/// cube's tile, every plane has as many of the first as of the second.
#[cube]
fn column_of(#[comptime] j: usize, #[comptime] t: Tiling, #[comptime] pair: bool) -> usize {
    let plane = PLANE_POS as usize % comptime!(t.planes_n);
    if comptime!(pair) {
        let half = comptime!(t.n() / 2);
        plane * comptime!(t.columns / 2 / t.planes_n)
            + comptime!(j / half * (t.columns / 2) + j % half * t.side)
    } else {
        plane * comptime!(t.columns / t.planes_n) + comptime!(j * t.side)
    }
}

/// Step `k` of a slice in shared memory: the products of tiles of the matrix units' depth, added to this plane's sums.
#[cube]
fn multiply(
    a: &Shared<[Eight]>,
    b: &Shared<[Eight]>,
    buffer: usize,
    sums: &Sums,
    #[comptime] k: usize,
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) {
    let (base_a, base_b) =
        (buffer * comptime!(t.rows * t.pitch()), buffer * comptime!(t.columns * t.pitch()));
    let mut left = Sequence::<cmma::Matrix<f16>>::new();
    #[unroll]
    for i in 0..comptime!(t.m()) {
        left.push(tile_at(
            a,
            base_a + row_of(i, t) * comptime!(t.pitch()) + comptime!(k * t.side / 8),
            comptime!(t.buffers * t.rows * t.pitch()),
            cmma::MatrixIdent::A,
            cmma::MatrixLayout::RowMajor,
            t,
        ));
    }
    #[unroll]
    for j in 0..comptime!(t.n()) {
        let right = tile_at(
            b,
            base_b + column_of(j, t, pair) * comptime!(t.pitch()) + comptime!(k * t.side / 8),
            comptime!(t.buffers * t.columns * t.pitch()),
            cmma::MatrixIdent::B,
            cmma::MatrixLayout::ColMajor,
            t,
        );
        #[unroll]
        for i in 0..comptime!(t.m()) {
            let sum = sums.index(comptime!(i * t.n() + j));
            cmma::execute(left.index(i), &right, sum, sum);
        }
    }
}

/// Row of activations, within the cube's tile, of this unit's eight `i`.
#[cube]
fn input_row(#[comptime] i: usize, #[comptime] t: Tiling) -> usize {
    UNIT_POS as usize / comptime!(t.depth / 8) + comptime!(i * t.row_step())
}

/// The product of a tile of activations and one of weights: this plane's sums. Row `input_row(i)` of the activations
/// begins at eight `starts[i]` of `x`; `first_row` and `second_row` are the rows of weights that this unit loads: of
/// `first` and, where there are two for each unit, of `second`.
#[cube]
fn product(
    x: &[Eight],
    starts: &Array<usize>,
    first: &Weights,
    first_row: usize,
    second: &Weights,
    second_row: usize,
    words: &[Quad],
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) -> Sums {
    let iq2 = comptime!(first.format == Format::Iq2 || second.format == Format::Iq2);
    let tables = HalfTables::load(words, iq2);
    let mut a = Shared::<[Eight]>::new_slice(comptime!(t.buffers * t.rows * t.pitch()));
    let mut b = Shared::<[Eight]>::new_slice(comptime!(t.buffers * t.columns * t.pitch()));
    let sums = zero_sums(t);
    let slices = comptime!(first.input.div_ceil(t.depth));
    let mut one = Stored::new(comptime!(first.format), comptime!(t.depth));
    let mut other = Stored::new(comptime!(second.format), comptime!(t.depth));
    let mut input = Array::<Eight>::new(comptime!(t.eights()));
    fetch_slice(x, starts, first, first_row, second, second_row, 0usize, &mut one, &mut other, &mut input, t);
    let (formats, steps) = (comptime!((first.format, second.format)), comptime!(t.depth / t.side));
    if comptime!(t.buffers == 2) {
        store_input(&input, &mut a, 0usize, t);
        store_chunks(&one, &other, &tables, 0usize, &mut b, 0usize, comptime!((0, t.depth / 16)), formats, t);
        let next = comptime!(usize::min(1, slices - 1)).runtime();
        fetch_slice(
            x, starts, first, first_row, second, second_row, next, &mut one, &mut other, &mut input, t,
        );
        sync_cube();
        for slice in 0..slices {
            let (buffer, free) = (slice % 2, (slice + 1) % 2);
            // What was fetched during the slice before is decoded in the second half of the steps, between the
            // products: the matrix units go on meanwhile.
            #[unroll]
            for k in 0..steps {
                multiply(&a, &b, buffer, &sums, k, t, pair);
                let chunks = comptime!(t.chunks_after(k));
                if comptime!(chunks.0 < chunks.1) {
                    if comptime!(chunks.0 == 0) {
                        store_input(&input, &mut a, free, t);
                    }
                    store_chunks(&one, &other, &tables, slice + 1, &mut b, free, chunks, formats, t);
                }
            }
            let next = usize::min(slice + 2, comptime!(slices - 1));
            fetch_slice(
                x, starts, first, first_row, second, second_row, next, &mut one, &mut other, &mut input, t,
            );
            sync_cube();
        }
    } else {
        for slice in 0..slices {
            sync_cube();
            store_input(&input, &mut a, 0usize, t);
            let all = comptime!((0, t.depth / 16));
            store_chunks(&one, &other, &tables, slice, &mut b, 0usize, all, formats, t);
            sync_cube();
            let next = usize::min(slice + 1, comptime!(slices - 1));
            fetch_slice(
                x, starts, first, first_row, second, second_row, next, &mut one, &mut other, &mut input, t,
            );
            #[unroll]
            for k in 0..steps {
                multiply(&a, &b, 0usize, &sums, k, t, pair);
            }
        }
    }
    sums
}

/// Some chunks of this unit's rows of weights of a slice, into shared memory.
#[cube]
fn store_chunks(
    one: &Stored,
    other: &Stored,
    tables: &HalfTables,
    slice: usize,
    b: &mut Shared<[Eight]>,
    buffer: usize,
    #[comptime] chunks: (usize, usize),
    #[comptime] formats: (Format, Format),
    #[comptime] t: Tiling,
) {
    let (odd, depth) = (slice % 2 == 1, comptime!(t.depth));
    let at = (buffer * comptime!(t.columns) + UNIT_POS as usize) * comptime!(t.pitch());
    store_weights(one, tables, odd, b, at, chunks, comptime!(formats.0), depth);
    if comptime!(t.columns > UNITS) {
        let at = at + comptime!(UNITS * t.pitch());
        store_weights(other, tables, odd, b, at, chunks, comptime!(formats.1), depth);
    }
}

/// This unit's eights of activations of a slice, into shared memory.
#[cube]
fn store_input(input: &Array<Eight>, a: &mut Shared<[Eight]>, buffer: usize, #[comptime] t: Tiling) {
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let row = input_row(i, t);
        if row < comptime!(t.rows) {
            let at = (buffer * comptime!(t.rows) + row) * comptime!(t.pitch());
            a[at + UNIT_POS as usize % comptime!(t.depth / 8)] = input[i];
        }
    }
}

/// What this unit loads of a slice.
#[cube]
fn fetch_slice(
    x: &[Eight],
    starts: &Array<usize>,
    first: &Weights,
    first_row: usize,
    second: &Weights,
    second_row: usize,
    slice: usize,
    one: &mut Stored,
    other: &mut Stored,
    input: &mut Array<Eight>,
    #[comptime] t: Tiling,
) {
    fetch(first, first_row, slice, one, comptime!(t.depth));
    if comptime!(t.columns > UNITS) {
        fetch(second, second_row, slice, other, comptime!(t.depth));
    }
    fetch_input(x, starts, slice, input, comptime!(first.input), t);
}

/// This unit's eights of a slice of the activations. Those beyond the end of a row meet weights of zero.
#[cube]
fn fetch_input(
    x: &[Eight],
    starts: &Array<usize>,
    slice: usize,
    to: &mut Array<Eight>,
    #[comptime] width: usize,
    #[comptime] t: Tiling,
) {
    let mut at = slice * comptime!(t.depth / 8) + UNIT_POS as usize % comptime!(t.depth / 8);
    if comptime!(width % t.depth != 0) {
        at = usize::min(at, comptime!(width / 8 - 1));
    }
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        to[i] = x[starts[i] + at];
    }
}

/// What a product of many rows is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dense {
    /// How planes share a tile.
    pub tiling: Tiling,
    /// Values from row to row of the activations.
    pub x_stride: usize,
    /// Rows of the weights.
    pub columns: usize,
    /// Rows of the weights that share a slice of the activations.
    pub group: usize,
    /// Values from row to row of the output.
    pub stride: usize,
}

/// `out = x W^T`: tiles of rows along y, of columns along x. Writes whole tiles: `out` has room for them.
#[cube(launch_unchecked)]
pub fn matmul(x: &[Eight], w: &Weights, words: &[Quad], out: &mut [f32], n: u32, #[comptime] s: Dense) {
    let t = comptime!(s.tiling);
    let first_row = CUBE_POS_Y as usize * comptime!(t.rows);
    let first_column = CUBE_POS_X as usize * comptime!(t.columns);
    let offset = (first_column / comptime!(s.group)) * comptime!(w.input / 8);
    // Rows and columns beyond the last repeat it; nobody reads their results.
    let mut starts = Array::<usize>::new(comptime!(t.eights()));
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let row = usize::min(first_row + input_row(i, t), n as usize - 1);
        starts[i] = row * comptime!(s.x_stride / 8) + offset;
    }
    let column = first_column + UNIT_POS as usize;
    let last = comptime!(s.columns - 1);
    let (one, other) = (usize::min(column, last), usize::min(column + UNITS, last));
    let sums = product(x, &starts, w, one, w, other, words, t, false);
    let length = out.len();
    #[unroll]
    for i in 0..comptime!(t.m()) {
        #[unroll]
        for j in 0..comptime!(t.n()) {
            let (r, c) = (first_row + row_of(i, t), first_column + column_of(j, t, false));
            if c < comptime!(s.columns) {
                cmma::store(
                    &mut out[r * comptime!(s.stride) + c..length],
                    sums.index(comptime!(i * t.n() + j)),
                    comptime!(s.stride as u32),
                    cmma::MatrixLayout::RowMajor,
                );
            }
        }
    }
}

/// Units of the cube that sorts.
pub const SORT_UNITS: usize = 256;

/// Sorts the pass's (row, expert) pairs by expert, in one cube: `sorted` lists pairs, and `tiles` has for each tile of
/// at most `rows` of them its expert, first place and count; word 0 of `tiles` is their number.
#[cube(launch_unchecked)]
pub fn sort_pairs(
    ids: &[u32],
    sorted: &mut [u32],
    tiles: &mut [u32],
    pairs: u32,
    #[comptime] experts: usize,
    #[comptime] rows: u32,
) {
    let counts = Shared::<[Atomic<u32>]>::new_slice(experts);
    let next = Shared::<[Atomic<u32>]>::new_slice(experts);
    let mut e = UNIT_POS as usize;
    while e < experts {
        counts[e].store(0u32);
        e += CUBE_DIM as usize;
    }
    sync_cube();
    let mut p = UNIT_POS;
    while p < pairs {
        counts[ids[p as usize] as usize].fetch_add(1u32);
        p += CUBE_DIM;
    }
    sync_cube();
    #[unroll]
    for step in 0..comptime!(experts.div_ceil(SORT_UNITS)) {
        let e = UNIT_POS as usize + comptime!(step * SORT_UNITS);
        if e < experts {
            let mut first = 0u32;
            let mut tile = 0u32;
            for j in 0..e {
                let count = counts[j].load();
                first += count;
                tile += (count + comptime!(rows - 1)) / rows;
            }
            let count = counts[e].load();
            next[e].store(first);
            let mut done = 0u32;
            while done < count {
                let at = (4 + 4 * tile) as usize;
                tiles[at] = e as u32;
                tiles[at + 1] = first + done;
                tiles[at + 2] = u32::min(rows, count - done);
                tile += 1;
                done += rows;
            }
            if e == comptime!(experts - 1) {
                tiles[0] = tile;
            }
        }
    }
    sync_cube();
    p = UNIT_POS;
    while p < pairs {
        let place = next[ids[p as usize] as usize].fetch_add(1u32);
        sorted[place as usize] = p;
        p += CUBE_DIM;
    }
}

/// What the experts' products are specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertMatmul {
    /// How planes share a tile.
    pub tiling: Tiling,
    /// Whether this is the shared expert: its tiles are the rows in order.
    pub shared: bool,
    /// Experts of a token.
    pub used: usize,
    /// Values from row to row of the input.
    pub x_stride: usize,
    /// Rows of an expert's matrix.
    pub columns: usize,
    /// Values from row to row of the output.
    pub stride: usize,
    /// SwiGLU clamp.
    pub clamp: Real,
}

/// The tile of a cube: expert, first place among the sorted pairs, pairs of it (none beyond the last tile).
#[derive(CubeType, Clone, Copy)]
struct ExpertTile {
    expert: usize,
    first: usize,
    count: usize,
}

#[cube]
fn expert_tile(tiles: &[u32], n: u32, #[comptime] s: ExpertMatmul) -> ExpertTile {
    let tile = CUBE_POS_Y as usize;
    let rows = comptime!(s.tiling.rows);
    if comptime!(s.shared) {
        let first = tile * rows;
        ExpertTile { expert: 0usize, first, count: usize::min(rows, n as usize - first) }
    } else {
        let at = 4 + 4 * tile;
        let count = select(CUBE_POS_Y < tiles[0], tiles[at + 2], 0u32);
        ExpertTile { expert: tiles[at] as usize, first: tiles[at + 1] as usize, count: count as usize }
    }
}

/// Row of the hidden activations of the `i`th pair of a tile, and the row of the pass it is of.
#[cube]
fn pair_rows(sorted: &[u32], tile: &ExpertTile, i: usize, #[comptime] s: ExpertMatmul) -> (usize, usize) {
    let i = usize::min(i, tile.count - 1);
    let (used, place) = (comptime!(s.used), tile.first + i);
    if comptime!(s.shared) {
        (place * (used + 1) + used, place)
    } else {
        let pair = sorted[place] as usize;
        (pair / used * (used + 1) + pair % used, pair / used)
    }
}

/// Where the activations of the tile's rows begin: of the rows of the pass, or of the pairs' hidden ones.
#[cube]
fn pair_starts(
    sorted: &[u32],
    tile: &ExpertTile,
    #[comptime] hidden: bool,
    #[comptime] s: ExpertMatmul,
) -> Array<usize> {
    let t = comptime!(s.tiling);
    let mut starts = Array::<usize>::new(comptime!(t.eights()));
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let (place, row) = pair_rows(sorted, tile, input_row(i, t), s);
        starts[i] = if comptime!(hidden) { place } else { row } * comptime!(s.x_stride / 8);
    }
    starts
}

/// Weighted hidden activations of the tile's pairs: the weights' tile is half gate, half up.
#[cube(launch_unchecked)]
pub fn hidden_matmul(
    x: &[Eight],
    gate: &Weights,
    up: &Weights,
    words: &[Quad],
    sorted: &[u32],
    tiles: &[u32],
    weights: &[f32],
    out: &mut [f16],
    n: u32,
    #[comptime] s: ExpertMatmul,
) {
    let t = comptime!(s.tiling);
    let tile = expert_tile(tiles, n, s);
    if tile.count > 0 {
        let first_column = CUBE_POS_X as usize * UNITS;
        let column = usize::min(first_column + UNIT_POS as usize, comptime!(s.columns - 1));
        let weight_row = tile.expert * comptime!(s.columns) + column;
        let starts = pair_starts(sorted, &tile, false, s);
        let sums = product(x, &starts, gate, weight_row, up, weight_row, words, t, true);
        // Each plane lays a tile of gate and one of up side by side and joins them.
        let area = comptime!(t.side * t.side);
        let mut stage = Shared::<[f32]>::new_slice(comptime!(2 * t.side * t.side * t.planes_m * t.planes_n));
        let base = PLANE_POS as usize * 2 * area;
        let halves = comptime!(t.n() / 2);
        #[unroll]
        for i in 0..comptime!(t.m()) {
            #[unroll]
            for j in 0..halves {
                let (first_row, first_column) = (row_of(i, t), first_column + column_of(j, t, true));
                cmma::store(
                    &mut stage[base..base + area],
                    sums.index(comptime!(i * t.n() + j)),
                    comptime!(t.side as u32),
                    cmma::MatrixLayout::RowMajor,
                );
                cmma::store(
                    &mut stage[base + area..base + 2 * area],
                    sums.index(comptime!(i * t.n() + halves + j)),
                    comptime!(t.side as u32),
                    cmma::MatrixLayout::RowMajor,
                );
                sync_plane();
                let mut k = UNIT_POS_PLANE as usize;
                while k < area {
                    let (r, c) = (first_row + k / comptime!(t.side), first_column + k % comptime!(t.side));
                    if r < tile.count && c < comptime!(s.columns) {
                        let (place, _) = pair_rows(sorted, &tile, r, s);
                        let mut weight = 1.0f32;
                        if comptime!(!s.shared) {
                            weight = weights[sorted[tile.first + r] as usize];
                        }
                        let v = swiglu(stage[base + k], stage[base + area + k], s.clamp);
                        out[place * comptime!(s.stride) + c] = f16::cast_from(v * weight);
                    }
                    k += PLANE_DIM as usize;
                }
                sync_plane();
            }
        }
    }
}

/// Down projections of the tile's pairs, each to its own row of `out`.
#[cube(launch_unchecked)]
pub fn down_matmul(
    hidden: &[Eight],
    w: &Weights,
    words: &[Quad],
    sorted: &[u32],
    tiles: &[u32],
    out: &mut [f32],
    n: u32,
    #[comptime] s: ExpertMatmul,
) {
    let t = comptime!(s.tiling);
    let tile = expert_tile(tiles, n, s);
    if tile.count > 0 {
        let first_column = CUBE_POS_X as usize * comptime!(t.columns);
        let (column, last) = (first_column + UNIT_POS as usize, comptime!(s.columns - 1));
        let first = tile.expert * comptime!(s.columns);
        let (one, other) = (first + usize::min(column, last), first + usize::min(column + UNITS, last));
        let starts = pair_starts(sorted, &tile, true, s);
        let sums = product(hidden, &starts, w, one, w, other, words, t, false);
        let area = comptime!(t.side * t.side);
        let mut stage = Shared::<[f32]>::new_slice(comptime!(t.side * t.side * t.planes_m * t.planes_n));
        let base = PLANE_POS as usize * area;
        #[unroll]
        for i in 0..comptime!(t.m()) {
            #[unroll]
            for j in 0..comptime!(t.n()) {
                let (first_row, first_column) = (row_of(i, t), first_column + column_of(j, t, false));
                cmma::store(
                    &mut stage[base..base + area],
                    sums.index(comptime!(i * t.n() + j)),
                    comptime!(t.side as u32),
                    cmma::MatrixLayout::RowMajor,
                );
                sync_plane();
                let mut k = UNIT_POS_PLANE as usize;
                while k < area {
                    let (r, c) = (first_row + k / comptime!(t.side), first_column + k % comptime!(t.side));
                    if r < tile.count && c < comptime!(s.columns) {
                        let (place, _) = pair_rows(sorted, &tile, r, s);
                        out[place * comptime!(s.stride) + c] = stage[base + k];
                    }
                    k += PLANE_DIM as usize;
                }
                sync_plane();
            }
        }
    }
}

/// `y = shared + routed experts, ascending`, of the rows that [`down_matmul`] left.
#[cube(launch_unchecked)]
pub fn combine(
    parts: &[Four],
    y: &mut [Four],
    #[comptime] used: usize,
    #[comptime] width: usize,
    #[comptime] stride: usize,
) {
    let row = CUBE_POS_Y as usize;
    let k = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    if k < comptime!(width / 4) {
        let first = row * comptime!(used + 1);
        let mut sum = parts[(first + used) * comptime!(stride / 4) + k];
        #[unroll]
        for slot in 0..used {
            sum += parts[(first + slot) * comptime!(stride / 4) + k];
        }
        y[row * comptime!(stride / 4) + k] = sum;
    }
}
