//! Products with many rows, on the matrix units: f16 tiles, sums in f32.
//!
//! A cube multiplies a tile of rows of activations with a tile of rows of weights, 32 values of depth at a time.
//! Both come into shared memory as f16, the weights decoded on the way in: once for all the rows of the tile.
//! While the matrix units work on one slice, the next is on its way into registers. What a row's result is does not
//! depend on the other rows of the tile.

use super::common::Real;
use super::dot::{Eight, Four, Quad, Weights, eight_signs};
use super::experts::swiglu;
use crate::layout::Format;
use cubecl::prelude::*;
use half::f16;

/// Depth of a slice.
pub const DEPTH: usize = 32;
/// Eights of f16 from row to row of a tile in shared memory: one more than a slice, so that rows start in different
/// banks.
const PITCH: usize = 5;
/// Rows of weights in a tile; two units load a row of a slice.
pub const COLUMNS: usize = 128;
/// Units of a cube.
pub const UNITS: usize = 256;

type Two = Vector<f16, Const<2>>;

/// How a cube's planes share a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiling {
    /// Side of the matrix units' tiles.
    pub side: usize,
    /// Rows of activations in a tile.
    pub rows: usize,
    /// Planes along the rows.
    pub planes_m: usize,
    /// Planes along the columns.
    pub planes_n: usize,
    /// Units of a plane.
    pub plane: usize,
    /// Slices in shared memory at once: with two, one is written while the other is read.
    pub buffers: usize,
}

impl Tiling {
    /// Tiles of a plane along the rows.
    pub const fn m(&self) -> usize {
        self.rows / self.planes_m / self.side
    }
    /// Tiles of a plane along the columns.
    pub const fn n(&self) -> usize {
        COLUMNS / self.planes_n / self.side
    }
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

/// Quads that hold sixteen weights.
const fn quads_of(format: Format) -> usize {
    match format {
        Format::F32 => 4,
        Format::F16 => 2,
        _ => 1,
    }
}

/// Loads half `half` of slice `slice` of row `row` as it is stored: quants, and scale and minimum.
#[cube]
fn fetch(
    w: &Weights,
    row: usize,
    slice: usize,
    half: usize,
    quads: &mut Array<Quad>,
    scales: &mut Array<f32>,
) {
    let units = comptime!(w.input / w.format.unit());
    let start = row * units;
    match comptime!(w.format) {
        Format::F32 => {
            #[unroll]
            for i in 0..4usize {
                // Rows may end within a slice.
                let at = 8 * slice + 4 * half + i;
                let inside = at < units;
                let quad = w.quants.index(0usize)[start + usize::min(at, units - 1)];
                quads[i] = select(inside, quad, Quad::new(0u32));
            }
        }
        Format::F16 =>
        {
            #[unroll]
            for i in 0..2usize {
                let at = 4 * slice + 2 * half + i;
                let inside = at < units;
                let quad = Quad::reinterpret(w.halves.index(0usize)[start + usize::min(at, units - 1)]);
                quads[i] = select(inside, quad, Quad::new(0u32));
            }
        }
        Format::Q8 => {
            quads[0] = w.quants.index(0usize)[start + 2 * slice + half];
            scales[0] = f32::cast_from(w.scales.index(0usize)[row * comptime!(units / 2) + slice]);
        }
        Format::Iq2 => {
            quads[0] = w.quants.index(0usize)[start + slice / 2];
            scales[0] = f32::cast_from(w.scales.index(0usize)[row * comptime!(units / 4) + slice / 8]);
        }
        Format::Q2K => {
            let (block, part) = (slice / 8, slice % 8);
            quads[0] = w.quants.index(0usize)[start + 4 * block + 2 * (part / 4) + half];
            let at = row * comptime!(units / 4) + block;
            // Sub-block 8 * (part / 4) + 2 * (part % 4) + half.
            let sub = 8 * (part / 4) + 2 * (part % 4) + half;
            let s = w.sub.index(0usize)[4 * at + sub / 4] >> (8 * (sub % 4)) as u32;
            scales[0] = f32::cast_from(w.scales.index(0usize)[2 * at]) * f32::cast_from(s & 15);
            scales[1] = f32::cast_from(w.scales.index(0usize)[2 * at + 1]) * f32::cast_from((s >> 4) & 15);
        }
        Format::Q4K => {
            let (block, group) = (slice / 8, slice % 8);
            quads[0] = w.quants.index(0usize)[start + 8 * block + 2 * (group / 2) + half];
            let at = row * comptime!(units / 8) + block;
            let shift = (8 * (group % 4)) as u32;
            let s = w.sub.index(0usize)[4 * at + group / 4] >> shift;
            let m = w.sub.index(0usize)[4 * at + 2 + group / 4] >> shift;
            scales[0] = f32::cast_from(w.scales.index(0usize)[2 * at]) * f32::cast_from(s & 255);
            scales[1] = f32::cast_from(w.scales.index(0usize)[2 * at + 1]) * f32::cast_from(m & 255);
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

/// Four unsigned bytes as f16, minus `offset`, times `scale`, minus `low`: two words.
#[cube]
fn bytes_to_half(bytes: u32, offset: Two, scale: Two, low: Two) -> Vector<u32, Const<2>> {
    // 0x6400 is 1024, whose last bits are ones.
    let a = (bytes & 0xff) | ((bytes & 0xff00) << 8) | 0x6400_6400;
    let b = ((bytes >> 16) & 0xff) | ((bytes >> 8) & 0x00ff_0000) | 0x6400_6400;
    let mut out = Vector::<u32, Const<2>>::empty();
    out.insert(0usize, word_of((two_of(a) - offset) * scale - low));
    out.insert(1usize, word_of((two_of(b) - offset) * scale - low));
    out
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

/// Sixteen weights as f16: two quads.
#[cube]
fn decode(
    quads: &Array<Quad>,
    scales: &Array<f32>,
    tables: &HalfTables,
    slice: usize,
    half: usize,
    #[comptime] format: Format,
) -> Array<Quad> {
    let mut out = Array::<Quad>::new(2usize);
    match comptime!(format) {
        Format::F32 =>
        {
            #[unroll]
            for i in 0..2usize {
                let a = Four::reinterpret(quads[comptime!(2 * i)]);
                let b = Four::reinterpret(quads[comptime!(2 * i + 1)]);
                let mut q = Quad::empty();
                q.insert(0usize, pair(a.extract(0usize), a.extract(1usize)));
                q.insert(1usize, pair(a.extract(2usize), a.extract(3usize)));
                q.insert(2usize, pair(b.extract(0usize), b.extract(1usize)));
                q.insert(3usize, pair(b.extract(2usize), b.extract(3usize)));
                out[i] = q;
            }
        }
        Format::F16 => {
            out[0] = quads[0];
            out[1] = quads[1];
        }
        Format::Iq2 => {
            // The slice's group of the quad: codes, then signs and scale; this half has two of its four codes.
            let odd = slice % 2 == 1;
            let quad = quads[0];
            let codes = select(odd, quad.extract(2usize), quad.extract(0usize)) >> (16 * half) as u32;
            let aux = select(odd, quad.extract(3usize), quad.extract(1usize));
            let scale = pair_of(scales[0] * 0.125f32 * f32::cast_from(2 * (aux >> 28) + 1));
            let seven = aux >> (14 * half) as u32;
            #[unroll]
            for i in 0..2usize {
                let magnitude = tables.grid[((codes >> comptime!(8 * i as u32)) & 255) as usize];
                let signs = eight_signs(seven >> comptime!(7 * i as u32));
                let mut q = Quad::empty();
                #[unroll]
                for j in 0..4usize {
                    // Two sign bits to the tops of two halves.
                    let flip = ((signs << comptime!(15 - 2 * j as u32)) & 0x8000)
                        | ((signs << comptime!(30 - 2 * j as u32)) & 0x8000_0000);
                    q.insert(j, word_of(two_of(magnitude.extract(j) ^ flip) * scale));
                }
                out[i] = q;
            }
        }
        _ => {
            let scale = pair_of(scales[0]);
            let low = pair_of(scales[1]);
            let offset = pair_of(comptime!(if format == Format::Q8 { 1152.0f32 } else { 1024.0f32 }));
            let mut bytes = quads[0];
            if comptime!(format == Format::Q8) {
                bytes = bytes ^ Quad::new(0x8080_8080u32);
            }
            if comptime!(format == Format::Q2K) {
                bytes = (bytes >> Quad::new((2 * (slice % 4)) as u32)) & Quad::new(0x0303_0303u32);
            }
            if comptime!(format == Format::Q4K) {
                bytes = (bytes >> Quad::new((4 * (slice % 2)) as u32)) & Quad::new(0x0f0f_0f0fu32);
            }
            #[unroll]
            for i in 0..2usize {
                let a = bytes_to_half(bytes.extract(comptime!(2 * i)), offset, scale, low);
                let b = bytes_to_half(bytes.extract(comptime!(2 * i + 1)), offset, scale, low);
                let mut q = Quad::empty();
                q.insert(0usize, a.extract(0usize));
                q.insert(1usize, a.extract(1usize));
                q.insert(2usize, b.extract(0usize));
                q.insert(3usize, b.extract(1usize));
                out[i] = q;
            }
        }
    }
    out
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
    #[comptime] side: usize,
) -> cmma::Matrix<f16> {
    // SAFETY: it is filled before it is used.
    let mut tile = unsafe { cmma::Matrix::<f16>::uninitialized(ident, side, side, side, layout) };
    cmma::load(&mut tile, &shared[at..end], comptime!(8 * PITCH as u32));
    tile
}

/// One slice: the products of the tiles in shared memory, added to this plane's sums.
#[cube]
fn multiply(a: &Shared<[Eight]>, b: &Shared<[Eight]>, buffer: usize, sums: &Sums, #[comptime] t: Tiling) {
    let (base_a, base_b) = (buffer * comptime!(t.rows * PITCH), buffer * comptime!(COLUMNS * PITCH));
    let plane = PLANE_POS as usize;
    let first_row = (plane / comptime!(t.planes_n)) * comptime!(t.rows / t.planes_m);
    let first_column = (plane % comptime!(t.planes_n)) * comptime!(COLUMNS / t.planes_n);
    #[unroll]
    for k in 0..comptime!(DEPTH / t.side) {
        let mut left = Sequence::<cmma::Matrix<f16>>::new();
        #[unroll]
        for i in 0..comptime!(t.m()) {
            let at = base_a + (first_row + comptime!(i * t.side)) * PITCH + comptime!(k * t.side / 8);
            left.push(tile_at(
                a,
                at,
                comptime!(t.buffers * t.rows * PITCH),
                cmma::MatrixIdent::A,
                cmma::MatrixLayout::RowMajor,
                t.side,
            ));
        }
        #[unroll]
        for j in 0..comptime!(t.n()) {
            let at = base_b + (first_column + comptime!(j * t.side)) * PITCH + comptime!(k * t.side / 8);
            let right = tile_at(
                b,
                at,
                comptime!(t.buffers * COLUMNS * PITCH),
                cmma::MatrixIdent::B,
                cmma::MatrixLayout::ColMajor,
                t.side,
            );
            #[unroll]
            for i in 0..comptime!(t.m()) {
                let sum = sums.index(comptime!(i * t.n() + j));
                cmma::execute(left.index(i), &right, sum, sum);
            }
        }
    }
}

/// Sixteen activations of a row: half `at` of its slices.
#[cube]
fn fetch_input(x: &[Eight], start: usize, at: usize, v: &mut Array<Eight>) {
    v[0] = x[start + 2 * at];
    v[1] = x[start + 2 * at + 1];
}

#[cube]
fn store_input(v: &Array<Eight>, a: &mut Shared<[Eight]>, at: usize) {
    a[at] = v[0];
    a[at + 1] = v[1];
}

#[cube]
fn store_weights(v: &Array<Quad>, b: &mut Shared<[Eight]>, at: usize) {
    #[unroll]
    for i in 0..2usize {
        b[at + i] = Eight::reinterpret(v[i]);
    }
}

/// The product of a tile of activations and one of weights: this plane's sums. Two units load a line of both tiles:
/// activations from the `start`th eight of `x` on (lines beyond the tile's rows load none), weights of row `weight_row`.
#[cube]
fn product(
    x: &[Eight],
    start: usize,
    w: &Weights,
    weight_row: usize,
    words: &[Quad],
    #[comptime] t: Tiling,
) -> Sums {
    let tables = HalfTables::load(words, comptime!(w.format == Format::Iq2));
    let mut a = Shared::<[Eight]>::new_slice(comptime!(t.buffers * t.rows * PITCH));
    let mut b = Shared::<[Eight]>::new_slice(comptime!(t.buffers * COLUMNS * PITCH));
    let unit = UNIT_POS as usize;
    let (line, half) = (unit / 2, unit % 2);
    let loads = line < comptime!(t.rows);
    let sums = zero_sums(t);
    let slices = comptime!(w.input.div_ceil(DEPTH));
    let mut raw = Array::<Quad>::new(comptime!(quads_of(w.format)));
    let mut scales = Array::<f32>::new(2usize);
    let mut input = Array::<Eight>::new(2usize);
    fetch(w, weight_row, 0usize, half, &mut raw, &mut scales);
    fetch_input(x, start, half, &mut input);
    for slice in 0..slices {
        let buffer = slice % comptime!(t.buffers);
        // With two buffers, all have read this one before the barrier of the slice before.
        if comptime!(t.buffers == 1) {
            sync_cube();
        }
        let decoded = decode(&raw, &scales, &tables, slice, half, comptime!(w.format));
        store_weights(&decoded, &mut b, (buffer * COLUMNS + line) * PITCH + 2 * half);
        if loads {
            store_input(&input, &mut a, (buffer * comptime!(t.rows) + line) * PITCH + 2 * half);
        }
        sync_cube();
        if slice + 1 < slices {
            fetch(w, weight_row, slice + 1, half, &mut raw, &mut scales);
            fetch_input(x, start, 2 * (slice + 1) + half, &mut input);
        }
        multiply(&a, &b, buffer, &sums, t);
    }
    sums
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
    let (line, first_row) = (UNIT_POS as usize / 2, CUBE_POS_Y as usize * comptime!(t.rows));
    let first_column = CUBE_POS_X as usize * COLUMNS;
    // Rows and columns beyond the last repeat it; nobody reads their results.
    let column = usize::min(first_column + line, comptime!(s.columns - 1));
    let row = usize::min(first_row + line, n as usize - 1);
    let start =
        row * comptime!(s.x_stride / 8) + (first_column / comptime!(s.group)) * comptime!(w.input / 8);
    let sums = product(x, start, w, column, words, t);
    let plane = PLANE_POS as usize;
    let row = first_row + (plane / comptime!(t.planes_n)) * comptime!(t.rows / t.planes_m);
    let column = first_column + (plane % comptime!(t.planes_n)) * comptime!(COLUMNS / t.planes_n);
    let length = out.len();
    #[unroll]
    for i in 0..comptime!(t.m()) {
        #[unroll]
        for j in 0..comptime!(t.n()) {
            let (r, c) = (row + comptime!(i * t.side), column + comptime!(j * t.side));
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

/// Weighted hidden activations of the tile's pairs: 64 columns of gate and the same of up are one tile of weights.
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
        let tables =
            HalfTables::load(words, comptime!(gate.format == Format::Iq2 || up.format == Format::Iq2));
        let mut a = Shared::<[Eight]>::new_slice(comptime!(t.buffers * t.rows * PITCH));
        let mut b = Shared::<[Eight]>::new_slice(comptime!(t.buffers * COLUMNS * PITCH));
        let unit = UNIT_POS as usize;
        let (line, half) = (unit / 2, unit % 2);
        // Lines of the weights' tile by planes: for each, half of its columns of gate, then the same of up.
        let per_plane = comptime!(COLUMNS / t.planes_n);
        let first_column = CUBE_POS_X as usize * comptime!(COLUMNS / 2);
        let within = line % per_plane;
        let is_up = within >= comptime!(COLUMNS / t.planes_n / 2);
        let column = first_column
            + line / per_plane * comptime!(COLUMNS / t.planes_n / 2)
            + within % comptime!(COLUMNS / t.planes_n / 2);
        let weight_row = tile.expert * comptime!(s.columns) + usize::min(column, comptime!(s.columns - 1));
        let loads = line < comptime!(t.rows);
        let (_, row) = pair_rows(sorted, &tile, usize::min(line, comptime!(t.rows - 1)), s);
        let start = row * comptime!(s.x_stride / 8);
        let sums = zero_sums(t);
        let slices = comptime!(gate.input.div_ceil(DEPTH));
        let mut raw_gate = Array::<Quad>::new(comptime!(quads_of(gate.format)));
        let mut raw_up = Array::<Quad>::new(comptime!(quads_of(up.format)));
        let mut scales = Array::<f32>::new(2usize);
        let mut input = Array::<Eight>::new(2usize);
        if is_up {
            fetch(up, weight_row, 0usize, half, &mut raw_up, &mut scales);
        } else {
            fetch(gate, weight_row, 0usize, half, &mut raw_gate, &mut scales);
        }
        fetch_input(x, start, half, &mut input);
        for slice in 0..slices {
            let buffer = slice % comptime!(t.buffers);
            // With two buffers, all have read this one before the barrier of the slice before.
            if comptime!(t.buffers == 1) {
                sync_cube();
            }
            if is_up {
                let decoded = decode(&raw_up, &scales, &tables, slice, half, comptime!(up.format));
                store_weights(&decoded, &mut b, (buffer * COLUMNS + line) * PITCH + 2 * half);
            } else {
                let decoded = decode(&raw_gate, &scales, &tables, slice, half, comptime!(gate.format));
                store_weights(&decoded, &mut b, (buffer * COLUMNS + line) * PITCH + 2 * half);
            }
            if loads {
                store_input(&input, &mut a, (buffer * comptime!(t.rows) + line) * PITCH + 2 * half);
            }
            sync_cube();
            if slice + 1 < slices {
                if is_up {
                    fetch(up, weight_row, slice + 1, half, &mut raw_up, &mut scales);
                } else {
                    fetch(gate, weight_row, slice + 1, half, &mut raw_gate, &mut scales);
                }
                fetch_input(x, start, 2 * (slice + 1) + half, &mut input);
            }
            multiply(&a, &b, buffer, &sums, t);
        }
        // Each plane lays a tile of gate and one of up side by side and joins them.
        let mut stage = Shared::<[f32]>::new_slice(comptime!(2 * t.side * t.side * t.planes_m * t.planes_n));
        let plane = PLANE_POS as usize;
        let area = comptime!(t.side * t.side);
        let base = plane * 2 * area;
        let (pm, pn) = (plane / comptime!(t.planes_n), plane % comptime!(t.planes_n));
        let halves = comptime!(t.n() / 2);
        #[unroll]
        for i in 0..comptime!(t.m()) {
            #[unroll]
            for j in 0..halves {
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
                    let r =
                        pm * comptime!(t.rows / t.planes_m) + comptime!(i * t.side) + k / comptime!(t.side);
                    let c = first_column
                        + pn * comptime!(COLUMNS / t.planes_n / 2)
                        + comptime!(j * t.side)
                        + k % comptime!(t.side);
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
        let line = UNIT_POS as usize / 2;
        let first_column = CUBE_POS_X as usize * COLUMNS;
        let column = usize::min(first_column + line, comptime!(s.columns - 1));
        let weight_row = tile.expert * comptime!(s.columns) + column;
        let (place, _) = pair_rows(sorted, &tile, usize::min(line, comptime!(t.rows - 1)), s);
        let start = place * comptime!(s.x_stride / 8);
        let sums = product(hidden, start, w, weight_row, words, t);
        let mut stage = Shared::<[f32]>::new_slice(comptime!(t.side * t.side * t.planes_m * t.planes_n));
        let plane = PLANE_POS as usize;
        let area = comptime!(t.side * t.side);
        let base = plane * area;
        let (pm, pn) = (plane / comptime!(t.planes_n), plane % comptime!(t.planes_n));
        #[unroll]
        for i in 0..comptime!(t.m()) {
            #[unroll]
            for j in 0..comptime!(t.n()) {
                cmma::store(
                    &mut stage[base..base + area],
                    sums.index(comptime!(i * t.n() + j)),
                    comptime!(t.side as u32),
                    cmma::MatrixLayout::RowMajor,
                );
                sync_plane();
                let mut k = UNIT_POS_PLANE as usize;
                while k < area {
                    let r =
                        pm * comptime!(t.rows / t.planes_m) + comptime!(i * t.side) + k / comptime!(t.side);
                    let c = first_column
                        + pn * comptime!(COLUMNS / t.planes_n)
                        + comptime!(j * t.side)
                        + k % comptime!(t.side);
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
