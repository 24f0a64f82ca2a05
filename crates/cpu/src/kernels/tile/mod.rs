//! Weight rows laid out side by side, with many activation rows; written once for the widths of the registers, as the float kernels are.
//!
//! A step multiplies a vector that holds four bytes of each of some rows, a lane a row, with four bytes of an activation row; these meet
//! two vectors, and the vectors several activation rows, so that there are fewer loads than products, and nothing is ever summed across
//! lanes. Groups of 32 are scaled in integers, minima meet the activations' sums in integers: what the one-row kernels add up, in another
//! order. The sum over a block is exact, and blocks are added as there (see [`super::row`]): one row and many give the same bits.
//!
//! [`lay_outs`] makes what lays formats out, [`columns`] the products, from a few instructions that must be in scope. Where an instruction
//! adds the four products of bytes to 32 bits (VNNI), a group is one sum of them. Elsewhere pairs of products are added in 16 bits for as
//! many steps as cannot overflow ([`Form::STEPS`]), and one instruction scales them and adds the pairs.

mod columns;
mod lay_out;

pub(super) use columns::columns;
pub(super) use lay_out::lay_outs;

use super::prefetch::ask_for_what_follows;
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K};

/// Functions of single instructions, so that levels have the same names for them.
macro_rules! instructions {
    (
        $features:literal,
        $($name:ident $(<const $n:ident: $number:ty>)? ($($arg:ident: $ty:ty),*) -> $out:ty $body:block)*
    ) => {$(
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn $name $(<const $n: $number>)? ($($arg: $ty),*) -> $out $body
    )*};
}
pub(super) use instructions;

/// What a format of blocks of 256 needs of the kernels.
pub(super) trait Form: bytemuck::Pod {
    /// Steps whose pairs of products add up to less than 2^15: quants of at most `2^15 / (2 * 127 * STEPS)`.
    const STEPS: usize;
    /// Groups of 32 have scales.
    const SCALED: bool;
    /// Quants have an offset that made them unsigned.
    const SIGNED: bool;
    /// A weight is `UNIT * d` times a quant.
    const UNIT: f32;
}

/// Quants times scales, at most 45.
impl Form for BlockQ2K {
    const STEPS: usize = 2;
    const SCALED: bool = false;
    const SIGNED: bool = false;
    const UNIT: f32 = 1.0;
}

/// Quants, at most 15.
impl Form for BlockQ4K {
    const STEPS: usize = 8;
    const SCALED: bool = true;
    const SIGNED: bool = false;
    const UNIT: f32 = 1.0;
}

/// Weights plus [`IQ2_MIDDLE`], at most 107.
impl Form for BlockIq2Xxs {
    const STEPS: usize = 1;
    const SCALED: bool = true;
    const SIGNED: bool = true;
    const UNIT: f32 = 0.125;
}

/// What makes the levels of IQ2_XXS, at most 43, unsigned.
pub(super) const IQ2_MIDDLE: u8 = 64;

/// What [`IQ2_MIDDLE`] adds too much to the products of the groups of a block, negated.
#[inline]
pub(super) fn iq2_offsets(sums: &[i16; 16]) -> [i32; 8] {
    let mut offsets = [0; 8];
    for (offset, [a, b]) in offsets.iter_mut().zip(sums.as_chunks::<2>().0) {
        *offset = -i32::from(IQ2_MIDDLE) * (i32::from(*a) + i32::from(*b));
    }
    offsets
}

/// Four bytes of each row.
pub(super) type Step<const LANES: usize> = [[u8; 4]; LANES];

/// A block's eight groups of eight steps.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Steps<const LANES: usize>(pub(super) [[Step<LANES>; 8]; 8]);

/// Rows of blocks of 256, side by side.
#[derive(Default)]
pub(super) struct Packed<const LANES: usize> {
    /// `[blocks, 64, rows, 4]`: quants, unsigned.
    pub(super) q: Vec<Steps<LANES>>,
    /// `[blocks, 8, rows]`: scales of groups of 32; in both halves of a word where pairs of 16 bits meet them.
    pub(super) scales: Vec<[[i32; LANES]; 8]>,
    /// `[blocks, 8, rows]`: pairs of minima of 16.
    pub(super) minima: Vec<[[i32; LANES]; 8]>,
    /// `[blocks, rows]`.
    pub(super) d: Vec<[f32; LANES]>,
    pub(super) dmin: Vec<[f32; LANES]>,
}

impl<const LANES: usize> Packed<LANES> {
    /// Makes room for some blocks of each row.
    pub(super) fn room(&mut self, blocks: usize) {
        self.q.resize(blocks, Steps([[[[0; 4]; LANES]; 8]; 8]));
        self.scales.resize(blocks, [[0; LANES]; 8]);
        self.minima.resize(blocks, [[0; LANES]; 8]);
        self.d.resize(blocks, [0.0; LANES]);
        self.dmin.resize(blocks, [0.0; LANES]);
    }
}

/// A block of Q8_0: eight steps of weights plus 128, or of their high nibbles and then of their low ones.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Planes<const LANES: usize, const PLANES: usize>(pub(super) [[Step<LANES>; 8]; PLANES]);

/// Rows of Q8_0, side by side.
#[derive(Default)]
pub(super) struct Packed32<const LANES: usize, const PLANES: usize> {
    /// `[blocks, planes, 8, rows, 4]`.
    pub(super) q: Vec<Planes<LANES, PLANES>>,
    /// `[blocks, rows]`.
    pub(super) d: Vec<[f32; LANES]>,
}

impl<const LANES: usize, const PLANES: usize> Packed32<LANES, PLANES> {
    /// Makes room for some blocks of each row.
    pub(super) fn room(&mut self, blocks: usize) {
        self.q.resize(blocks, Planes([[[[0; 4]; LANES]; 8]; PLANES]));
        self.d.resize(blocks, [0.0; LANES]);
    }
}

/// The blocks of some rows, one row behind the other.
#[inline]
pub(super) fn rows_of<B: bytemuck::Pod, const LANES: usize>(bytes: &[u8]) -> [&[B]; LANES] {
    let row = bytes.len() / LANES;
    // A loop, not an iterator: what fills an array of references is stored in parts, for which their first use would wait.
    let mut rows: [&[B]; LANES] = [bytemuck::cast_slice(&bytes[..row]); LANES];
    for r in 1..LANES {
        rows[r] = bytemuck::cast_slice(&bytes[r * row..(r + 1) * row]);
    }
    rows
}

/// How far the next rows are behind some.
pub(super) fn bytes_of_rows<B, const LANES: usize>(rows: &[&[B]; LANES]) -> usize {
    LANES * size_of_val(rows[0])
}

/// Block `b` of each of some rows. The blocks of the next rows at the same place are asked for: to the hardware these are many streams, too
/// many to see.
#[inline]
pub(super) fn blocks<'a, B: bytemuck::Pod, const LANES: usize>(
    rows: &[&'a [B]; LANES],
    b: usize,
) -> [&'a B; LANES] {
    let (mut blocks, behind) = ([&rows[0][b]; LANES], bytes_of_rows(rows));
    for r in 0..LANES {
        blocks[r] = &rows[r][b];
        ask_for_what_follows(bytemuck::bytes_of(blocks[r]), behind);
    }
    blocks
}

/// Places of the bytes of every word of 16 bytes, of which `at` gives those of the first; 128 makes a 0.
pub(super) const fn in_words(at: [u8; 4]) -> [u8; 16] {
    let mut places = [0; 16];
    let mut i = 0;
    while i < 16 {
        places[i] = at[i % 4] + 4 * (i / 4) as u8;
        i += 1;
    }
    places
}

/// Two bytes of every word, each in a half of it.
pub(super) static PAIRS: [[u8; 16]; 2] = [in_words([0, 128, 1, 128]), in_words([2, 128, 3, 128])];

/// A byte of every word in all of its bytes.
pub(super) static EVERYWHERE: [[u8; 16]; 4] =
    [in_words([0; 4]), in_words([1; 4]), in_words([2; 4]), in_words([3; 4])];

/// Magnitudes of IQ2_XXS, of which two bits name one.
#[cfg(target_arch = "x86_64")]
pub(super) const IQ2_MAGNITUDES: [u8; 4] = [8, 25, 43, 0];

/// The eight magnitudes of a code of IQ2_XXS, two bits each, the first in the lowest.
#[cfg(target_arch = "x86_64")]
pub(super) const fn iq2_fields(code: usize) -> u16 {
    let (mut fields, mut k) = (0, 0);
    while k < 8 {
        fields |= (ds4_quant::IQ2XXS_GRID[code][k] as u16 / 20) << (2 * k);
        k += 1;
    }
    fields
}

/// Of every four bits the eighth bit that makes the number of ones even.
pub(super) static PARITY: [u8; 16] = {
    let mut parity = [0; 16];
    let mut four = 0u8;
    while four < 16 {
        parity[four as usize] = (four.count_ones() as u8 & 1) << 7;
        four += 1;
    }
    parity
};

/// A byte of every word in both halves of it.
pub(super) static BOTH_HALVES: [[u8; 16]; 4] = [
    in_words([0, 128, 0, 128]),
    in_words([1, 128, 1, 128]),
    in_words([2, 128, 2, 128]),
    in_words([3, 128, 3, 128]),
];

/// The eight scales and the eight minima of a block of Q4_K.
#[inline]
pub(super) fn scales_mins(p: &[u8; 12]) -> (u64, u64) {
    let [a, b, c] = *p.as_chunks::<4>().0 else { return (0, 0) };
    let [a, b, c] = [a, b, c].map(u32::from_le_bytes);
    let six = 0x3f3f_3f3f;
    let high = |low: u32, top: u32| u64::from((low & 0x0f0f_0f0f) | ((top >> 6 & 0x0303_0303) << 4)) << 32;
    (u64::from(a & six) | high(c, a), u64::from(b & six) | high(c >> 4, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_quant::scale_min;

    #[test]
    fn scales_agree_with_the_reference() {
        let packed: [u8; 12] = std::array::from_fn(|i| (i * 89 + 7) as u8);
        let (scales, mins) = scales_mins(&packed);
        for g in 0..8 {
            assert_eq!((scales.to_le_bytes()[g], mins.to_le_bytes()[g]), scale_min(&packed, g));
        }
    }
}
