//! Weights on their way to the matrix units: a slice of a row from memory, then as f16 into shared memory.

use super::dot::{Eight, Four, Quad, Weights};
use super::matmul::UNITS;
use super::plane::ptx;
use super::tables::{Grid, pick, signed_levels};
use crate::layout::Format;
use cubecl::prelude::*;
use half::f16;

/// Two halves: a word.
pub type Two = Vector<f16, Const<2>>;

/// Part of a row of weights as it is stored: a slice of depth.
#[derive(CubeType)]
pub struct Stored {
    quads: Array<Quad>,
    /// Scale of each quad, or scale and minimum of a block.
    scales: Array<f32>,
    /// Scales within the block.
    sub: Array<u32>,
}

/// Quads of a slice.
pub const fn quads_of(format: Format, depth: usize) -> usize {
    depth.div_ceil(format.unit())
}

#[cube]
impl Stored {
    pub fn new(#[comptime] format: Format, #[comptime] depth: usize) -> Stored {
        Stored {
            quads: Array::<Quad>::new(comptime!(quads_of(format, depth))),
            scales: Array::<f32>::new(comptime!(usize::max(depth / 16, 2))),
            sub: Array::<u32>::new(2usize),
        }
    }
}

/// Where in a slice a unit's 16-byte vectors of weights are: the row of the cube's, and the vector of the row.
///
/// Int8 weights have several vectors in a slice of a row: units side by side take those of one row, so that a load of a
/// plane touches few rows. Other formats have about one, and a unit takes a row.
#[cube]
fn place_of(#[comptime] i: usize, #[comptime] format: Format, #[comptime] depth: usize) -> (usize, usize) {
    let unit = UNIT_POS as usize;
    if comptime!(format == Format::Q8) {
        let in_row = comptime!(depth / 16);
        (unit / in_row + comptime!(i * UNITS / (depth / 16)), unit % in_row)
    } else {
        (unit, comptime!(i).runtime())
    }
}

/// Loads this unit's part of slice `slice` of [`UNITS`] rows from `first` on; those beyond the `last` repeat it. Depth
/// beyond the end of a row is zeros.
#[cube]
pub fn fetch(
    w: &Weights,
    first: usize,
    last: usize,
    slice: usize,
    to: &mut Stored,
    #[comptime] depth: usize,
) {
    let units = comptime!(w.input / w.format.unit());
    let start = slice * comptime!(depth) / comptime!(w.format.unit());
    #[unroll]
    for i in 0..comptime!(quads_of(w.format, depth)) {
        let (row, vector) = place_of(i, w.format, depth);
        let (row, at) = (usize::min(first + row, last), start + vector);
        let place = row * units + usize::min(at, comptime!(units - 1));
        let quad = if comptime!(w.format == Format::F16) {
            Quad::reinterpret(w.halves.index(0usize)[place])
        } else {
            w.quants.index(0usize)[place]
        };
        to.quads[i] =
            if comptime!(w.input % depth == 0) { quad } else { select(at < units, quad, Quad::new(0u32)) };
        if comptime!(w.format == Format::Q8) {
            to.scales[i] = f32::cast_from(w.scales.index(0usize)[place / 2]);
        }
    }
    if comptime!(w.format.sub_bytes(w.input) > 0) {
        let row = usize::min(first + UNIT_POS as usize, last);
        fetch_scales(w, row, slice, to, depth);
    }
}

/// Scales of a slice of a row in blocks: those of a whole block with its first slice, or where slices are not parts of
/// blocks of 256.
#[cube]
fn fetch_scales(w: &Weights, row: usize, slice: usize, to: &mut Stored, #[comptime] depth: usize) {
    let units = comptime!(w.input / w.format.unit());
    let start = slice * comptime!(depth) / comptime!(w.format.unit());
    let place = row * units + start;
    let block = row * comptime!(units * w.format.unit() / 256) + slice * comptime!(depth) / 256;
    if slice % comptime!(256 / depth) == 0 {
        if comptime!(w.format == Format::Iq2) {
            to.scales[0] = f32::cast_from(w.scales.index(0usize)[block]);
        } else {
            to.scales[0] = f32::cast_from(w.scales.index(0usize)[2 * block]);
            to.scales[1] = f32::cast_from(w.scales.index(0usize)[2 * block + 1]);
        }
    }
    match comptime!(w.format) {
        Format::Iq2 => {
            let group = slice * comptime!(depth / 32) % 8;
            to.sub[0] = w.sub.index(0usize)[block] >> (4 * group) as u32;
        }
        Format::Q2K => to.sub[0] = w.sub.index(0usize)[place],
        Format::Q4K => {
            let (word, shift) = (4 * block + start / 4 % 2, (8 * (start % 4)) as u32);
            to.sub[0] = w.sub.index(0usize)[word] >> shift;
            to.sub[1] = w.sub.index(0usize)[word + 2] >> shift;
        }
        _ => {}
    }
}

/// Two f16 in a word.
#[cube]
pub fn word_of(v: Two) -> u32 {
    u32::reinterpret(v)
}

#[cube]
pub fn two_of(word: u32) -> Two {
    Two::reinterpret(word)
}

/// Sixteen unsigned bytes as f16, minus `offset`, times `scale`, and minus `low` where that `lowers` them: two quads.
#[cube]
fn bytes_to_half(
    bytes: Quad,
    #[comptime] offset: f32,
    scale: Two,
    #[comptime] lowers: bool,
    low: Two,
    out: &mut Array<Quad>,
) {
    #[unroll]
    for i in 0..2usize {
        let mut q = Quad::empty();
        #[unroll]
        for j in 0..2usize {
            let (a, b) = halves_of(bytes.extract(comptime!(2 * i + j)), offset);
            let (mut a, mut b) = (a * scale, b * scale);
            if lowers {
                a -= low;
                b -= low;
            }
            q.insert(comptime!(2 * j), word_of(a));
            q.insert(comptime!(2 * j + 1), word_of(b));
        }
        out[i] = q;
    }
}

/// Four unsigned bytes as f16, minus `offset`.
#[cube]
pub fn halves_of(four: u32, #[comptime] offset: f32) -> (Two, Two) {
    let (a, b) = thousands(four);
    let offset = pair_of(offset);
    (two_of(a) - offset, two_of(b) - offset)
}

/// Four bytes as f16 above 1024, which is 0x6400: its last bits are ones.
#[cube]
fn thousands(four: u32) -> (u32, u32) {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) {
        (pick(four, 0x6464_6464u32, 0x4140u32), pick(four, 0x6464_6464u32, 0x4342u32))
    } else {
        let a = (four & 0xff) | ((four & 0xff00) << 8) | 0x6400_6400;
        let b = ((four >> 16) & 0xff) | ((four >> 8) & 0x00ff_0000) | 0x6400_6400;
        (a, b)
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
pub fn pair_of(value: f32) -> Two {
    Two::new(f16::cast_from(value))
}

/// Bit `from` of a word, where bit `to` is to be.
#[cube]
fn moved(word: u32, #[comptime] from: u32, #[comptime] to: u32) -> u32 {
    let bit = comptime!(1u32 << to);
    if comptime!(from < to) {
        (word << comptime!(to.saturating_sub(from))) & bit
    } else {
        (word >> comptime!(from.saturating_sub(to))) & bit
    }
}

/// Bytes of the f16 of the three levels, and of their opposites.
const LOWS: u32 = 0x0060_4000;
const HIGHS: [u32; 2] = [0x0051_4e48, 0x00d1_cec8];

/// Four signed levels as f16: two words.
#[cube]
pub fn levels_to_halves(by: u32) -> (u32, u32) {
    let low = pick(LOWS, LOWS, by);
    let high = pick(comptime!(HIGHS[0]), comptime!(HIGHS[1]), by);
    (pick(low, high, 0x5140u32), pick(low, high, 0x7362u32))
}

/// The weights of code `v` of a group as f16, without their scale.
#[cube]
fn eight_of(grid: &Grid, codes: u32, signs: u32, #[comptime] v: usize) -> Quad {
    let device = comptime::device_properties().comptime();
    let code = ((codes >> comptime!(8 * v as u32)) & 255) as usize;
    let mut q = Quad::empty();
    if comptime!(ptx(&device)) {
        let by = signed_levels(grid.levels[code], signs, v);
        #[unroll]
        for half in 0..2usize {
            let (a, b) = levels_to_halves(by >> comptime!(16 * half as u32));
            q.insert(comptime!(2 * half), a);
            q.insert(comptime!(2 * half + 1), b);
        }
    } else {
        let magnitudes = grid.eights[code];
        #[unroll]
        for j in 0..4usize {
            // To the tops of two halves.
            let sign = comptime!((8 * j + v) as u32);
            let flip = moved(signs, sign, 15u32) | moved(signs, comptime!(sign + 4), 31u32);
            let two = magnitudes.extract(comptime!(j / 2)) >> comptime!(8 * (j as u32 % 2));
            let magnitude = two_of((two & 0x00ff_00ff) | 0x6400_6400) - pair_of(1024.0f32);
            q.insert(j, word_of(magnitude) ^ flip);
        }
    }
    q
}

/// Weights `16 * chunk ..` of a slice as f16, two quads; of the second half of a quad where that is `odd`.
#[cube]
fn decode(
    from: &Stored,
    grid: &Grid,
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
            // Codes of four eights, then their signs; twice in a quad.
            let quad = from.quads[0];
            let group = comptime!(chunk / 2);
            let mut codes = quad.extract(comptime!(2 * group));
            let mut signs = quad.extract(comptime!(2 * group + 1));
            if comptime!(halves) {
                codes = select(odd, quad.extract(2usize), codes);
                signs = select(odd, quad.extract(3usize), signs);
            }
            let sub = (from.sub[0] >> comptime!(4 * group as u32)) & 15;
            let scale = pair_of(from.scales[0] * 0.125f32 * f32::cast_from(2 * sub + 1));
            #[unroll]
            for i in 0..2usize {
                let eight = comptime!(2 * (chunk % 2) + i);
                let signed = eight_of(grid, codes, signs, eight);
                let mut q = Quad::empty();
                #[unroll]
                for j in 0..4usize {
                    q.insert(j, word_of(two_of(signed.extract(j)) * scale));
                }
                out[i] = q;
            }
        }
        Format::Q8 => {
            let scale = pair_of(from.scales[chunk]);
            let bytes = from.quads[chunk] ^ Quad::new(0x8080_8080u32);
            bytes_to_half(bytes, comptime!(1152.0f32), scale, false, scale, &mut out);
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
            bytes_to_half(bytes, comptime!(1024.0f32), scale, true, low, &mut out);
        }
        Format::Q4K => {
            let group = comptime!(chunk as u32 / 2);
            let scale = pair_of(from.scales[0] * f32::cast_from((from.sub[0] >> comptime!(8 * group)) & 255));
            let low = pair_of(from.scales[1] * f32::cast_from((from.sub[1] >> comptime!(8 * group)) & 255));
            let bytes = (from.quads[comptime!(chunk / 2)] >> Quad::new(comptime!(4 * (chunk as u32 % 2))))
                & Quad::new(0x0f0f_0f0fu32);
            bytes_to_half(bytes, comptime!(1024.0f32), scale, true, low, &mut out);
        }
    }
    out
}

/// Decodes chunks `first..end` of 16 weights of a unit's part of a slice into shared memory, rows `pitch` eights apart.
#[cube]
pub fn store_weights(
    from: &Stored,
    grid: &Grid,
    odd: bool,
    b: &mut Shared<[Eight]>,
    first_row: usize,
    #[comptime] chunks: (usize, usize),
    #[comptime] format: Format,
    #[comptime] depth: usize,
    #[comptime] pitch: usize,
) {
    #[unroll]
    for chunk in comptime!(chunks.0)..comptime!(chunks.1) {
        let decoded = decode(from, grid, odd, chunk, format, depth);
        let (row, place) = place_of(chunk, format, depth);
        let at = (first_row + row) * pitch + 2 * place;
        b[at] = Eight::reinterpret(decoded[0]);
        b[at + 1] = Eight::reinterpret(decoded[1]);
    }
}
