//! IQ2_XXS, 66 bytes a block: 32 look-ups in a grid of 256 codes of eight magnitudes, and signs.
//!
//! With VBMI a block of 256 is unpacked by 30 instructions and without a load from a table: a code is 8 fields of two bits, the table of
//! codes is eight registers, and one instruction moves each field to a byte of its own.

use super::tile::{self, Packed};
use super::*;
use crate::kernels::{ROWS, tiles};
use ds4_quant::act::Act256;
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID};

/// A block's magnitudes, in order, and -1 for every negative one.
type Unpacked = ([__m512i; 4], [__m512i; 4]);

/// `v`, negative where `signs` is -1.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn signed(v: __m512i, signs: __m512i) -> __m512i {
    _mm512_sub_epi8(_mm512_xor_si512(v, signs), signs)
}

/// Places of the groups' scales (words `4 g`), as words, where the products of two quarters are packed to words.
const SCALES: [[i16; 32]; 2] = {
    let mut index = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        let (pair, lane, word) = (i / 32, i % 32 / 8, i % 8);
        let quarter = 2 * pair + word / 4;
        index[pair][i % 32] = (4 * (2 * quarter + lane / 2)) as i16;
        i += 1;
    }
    index
};

/// Eight bytes of 0 or -1 for every seven stored sign bits.
static SIGNS: [i64; 128] = {
    let mut table = [0; 128];
    let mut s7 = 0;
    while s7 < 128 {
        let s8 = s7 as u32 | (s7 as u32).count_ones() << 7;
        let (mut bytes, mut k) = ([0; 8], 0);
        while k < 8 {
            bytes[k] = if s8 >> k & 1 == 1 { 255 } else { 0 };
            k += 1;
        }
        table[s7] = i64::from_le_bytes(bytes);
        s7 += 1;
    }
    table
};

/// `2 s + 1` of each group, in 64 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn scales_of(block: &BlockIq2Xxs) -> __m512i {
    let groups = load(bytemuck::cast_ref(&block.groups));
    // The bit below a scale becomes the one.
    _mm512_or_si512(_mm512_srli_epi64::<59>(groups), _mm512_set1_epi64(1))
}

/// Scales of each row's groups, and what 128 more in each of 32 quants adds, for either half of them.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw")]
fn lay_out_groups(packed: &mut Packed, b: usize, blocks: &[&BlockIq2Xxs; ROWS]) {
    let words = tile::words_of_rows(|r| bytemuck::cast_ref(&blocks[r].groups));
    for g in 0..8 {
        let scales = _mm512_and_si512(_mm512_srli_epi32::<27>(words[2 * g + 1]), _mm512_set1_epi32(31));
        let scales = _mm512_or_si512(scales, _mm512_set1_epi32(1));
        let offset = _mm512_or_si512(_mm512_slli_epi32::<7>(scales), _mm512_slli_epi32::<23>(scales));
        tile::store(scales, &mut packed.groups[b][g]);
        tile::store(offset, &mut packed.groups[b][8 + g]);
    }
    let mut d = [[0; 2]; ROWS];
    for (d, block) in d.iter_mut().zip(blocks) {
        *d = block.d;
    }
    packed.d[b] = tile::halves(&d);
}

macro_rules! kernels {
    ($features:literal, $unpack:path, $lay_out:path) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn products<const N: usize>(
            block: &BlockIq2Xxs,
            x: [(&[i8; 256], &[i16; 16]); N],
        ) -> [(__m512i, __m512i); N] {
            let (levels, signs) = $unpack(block);
            let scales = scales_of(block);
            let scales = [
                _mm512_permutexvar_epi16(index(&SCALES[0]), scales),
                _mm512_permutexvar_epi16(index(&SCALES[1]), scales),
            ];
            let zero = _mm512_setzero_si512();
            let mut out = [(zero, zero); N];
            for (out, (x, _)) in out.iter_mut().zip(x) {
                let mut p = [zero; 4];
                for k in 0..4 {
                    p[k] = _mm512_dpbusd_epi32(zero, levels[k], signed(quarter(x, k), signs[k]));
                }
                // Four products of at most 43 * 127 fit 16 bits.
                let low = _mm512_dpwssd_epi32(zero, _mm512_packs_epi32(p[0], p[1]), scales[0]);
                out.0 = _mm512_dpwssd_epi32(low, _mm512_packs_epi32(p[2], p[3]), scales[1]);
            }
            out
        }

        block_dots!($features, BlockIq2Xxs, products, 0.125, None);

        /// 16 weight rows with the columns; see [`tile`]. Weights are laid out plus 128.
        #[target_feature(enable = $features)]
        pub(in super::super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            tile::with_packed(|packed| {
                for b in 0..packed.room::<BlockIq2Xxs>(rows) {
                    let blocks: [&BlockIq2Xxs; ROWS] = tile::blocks(rows, b);
                    lay_out_groups(packed, b, &blocks);
                    $lay_out(&mut packed.q[b].0, &blocks);
                }
                tile::multiply::<true, true>(packed, 0.125, x, out);
            });
        }
    };
}

/// By loads from the grid.
pub(super) mod table {
    use super::*;

    /// Magnitudes and signs of a group.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn group((codes, aux): (u32, u32)) -> (__m256i, __m256i) {
        let level = |v: u32| i64::from_le_bytes(IQ2XXS_GRID[(codes >> (8 * v)) as usize & 255]);
        let sign = |v: u32| SIGNS[(aux >> (7 * v)) as usize & 127];
        (
            _mm256_set_epi64x(level(3), level(2), level(1), level(0)),
            _mm256_set_epi64x(sign(3), sign(2), sign(1), sign(0)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    fn unpack(block: &BlockIq2Xxs) -> Unpacked {
        let (mut levels, mut signs) = ([_mm512_setzero_si512(); 4], [_mm512_setzero_si512(); 4]);
        for k in 0..4 {
            let (low, high) = (group(block.group(2 * k)), group(block.group(2 * k + 1)));
            levels[k] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low.0), high.0);
            signs[k] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low.1), high.1);
        }
        (levels, signs)
    }

    /// Unpacks rows and turns them to columns.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    fn lay_out(q: &mut [[u8; 4 * ROWS]; 64], blocks: &[&BlockIq2Xxs; ROWS]) {
        let middle = _mm512_set1_epi8(-128);
        let mut rows = [[_mm512_setzero_si512(); ROWS]; 4];
        for (r, block) in blocks.iter().enumerate() {
            let (levels, signs) = unpack(block);
            for k in 0..4 {
                rows[k][r] = _mm512_add_epi8(middle, signed(levels[k], signs[k]));
            }
        }
        for (q, rows) in q.as_chunks_mut::<16>().0.iter_mut().zip(rows) {
            q.iter_mut().zip(tile::transpose(rows)).for_each(|(out, v)| tile::store(v, out));
        }
    }

    kernels!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", unpack, lay_out);
}

/// By VBMI and GFNI.
pub(super) mod vbmi {
    use super::*;

    /// The grid, a magnitude in two bits: 0, 1, 2 for 8, 25, 43.
    static GRID: [[u16; 32]; 8] = {
        let mut grid = [[0; 32]; 8];
        let mut code = 0;
        while code < 256 {
            let mut k = 0;
            while k < 8 {
                let level = IQ2XXS_GRID[code][k] as u16 / 20;
                grid[code / 32][code % 32] |= level << (2 * k);
                k += 1;
            }
            code += 1;
        }
        grid
    };

    /// Where the 32 codes of a block are, for the low byte of every word.
    static CODES: [u8; 64] = {
        let mut at = [0; 64];
        let mut i = 0;
        while i < 32 {
            at[2 * i] = (8 * (i / 4) + i % 4) as u8;
            i += 1;
        }
        at
    };

    /// Words `8 quarter..` to the low words of eight lanes.
    static SPREAD: [[i16; 32]; 4] = {
        let mut at = [[0; 32]; 4];
        let mut i = 0;
        while i < 32 {
            at[i / 8][4 * (i % 8)] = i as i16;
            i += 1;
        }
        at
    };

    /// The grid's entries, of 16 bits, of codes of 16 bits.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
    fn look_up(codes: __m512i) -> __m512i {
        let bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
        let bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
        let pair = |i: usize| _mm512_permutex2var_epi16(grid(2 * i), codes, grid(2 * i + 1));
        let low = _mm512_mask_blend_epi16(bit6, pair(0), pair(1));
        let high = _mm512_mask_blend_epi16(bit6, pair(2), pair(3));
        _mm512_mask_blend_epi16(bit7, low, high)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
    fn unpack(block: &BlockIq2Xxs) -> Unpacked {
        let groups = load(bytemuck::cast_ref(&block.groups));
        let words = look_up(_mm512_maskz_permutexvar_epi8(0x5555_5555_5555_5555, load(&CODES), groups));
        // Fields of two bits to bytes, whose upper bits the look-up ignores or finds repeated.
        let fields = _mm512_set1_epi64(0x0e0c_0a08_0604_0200);
        let magnitudes = _mm512_set1_epi32(0x002b_1908);
        let mut levels = [_mm512_setzero_si512(); 4];
        for (levels, at) in levels.iter_mut().zip(&SPREAD) {
            let lanes = _mm512_permutexvar_epi16(index(at), words);
            *levels = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(fields, lanes), magnitudes);
        }
        let sevens = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x352e_2720), groups);
        let mut signs = [_mm512_setzero_si512(); 4];
        for (signs, at) in signs.iter_mut().zip(&SEVENS) {
            let lanes = _mm512_permutexvar_epi8(load(at), sevens);
            // The eighth sign makes the number of negative ones even: a product of bits, as the others are.
            *signs = _mm512_gf2p8affine_epi64_epi8::<0>(_mm512_set1_epi64(0x7f40_2010_0804_0201), lanes);
        }
        (levels, signs)
    }

    /// Where the sign bits of a vector of eight are, eight times.
    static SEVENS: [[u8; 64]; 4] = {
        let mut at = [[0; 64]; 4];
        let mut i = 0;
        while i < 256 {
            at[i / 64][i % 64] = (8 * (i / 32) + i % 32 / 8) as u8;
            i += 1;
        }
        at
    };

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn grid(i: usize) -> __m512i {
        load(bytemuck::cast_ref(&GRID[i]))
    }

    /// The eight sign bits of seven.
    static EIGHTS: [u8; 128] = {
        let mut eights = [0; 128];
        let mut s7 = 0;
        while s7 < 128 {
            eights[s7] = s7 as u8 | (s7.count_ones() as u8 & 1) << 7;
            s7 += 1;
        }
        eights
    };

    /// A byte of every word in all of its bytes.
    static EVERYWHERE: [[u8; 16]; 4] =
        [in_words([0; 4]), in_words([1; 4]), in_words([2; 4]), in_words([3; 4])];

    /// Places of the four fields of a half entry of every word.
    static FIELDS: [i64; 4] =
        [places([0, 2, 4, 6]), places([8, 10, 12, 14]), places([16, 18, 20, 22]), places([24, 26, 28, 30])];

    /// Places in eight bytes, of which `at` gives four for the word `i`.
    const fn places(at: [u8; 4]) -> i64 {
        let [a, b, c, d] = at;
        i64::from_le_bytes([a, b, c, d, a + 32, b + 32, c + 32, d + 32])
    }

    /// A lane is a row from the start: the codes of 16 rows are turned to columns before they are unpacked.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
    fn lay_out(q: &mut [[u8; 4 * ROWS]; 64], blocks: &[&BlockIq2Xxs; ROWS]) {
        let words = tile::words_of_rows(|r| bytemuck::cast_ref(&blocks[r].groups));
        let plus = _mm512_set1_epi32(i32::from_le_bytes([128 + 8, 128 + 25, 128 + 43, 0]));
        let minus = _mm512_set1_epi32(i32::from_le_bytes([128 - 8, 128 - 25, 128 - 43, 0]));
        let (low, high) = (&EIGHTS.as_chunks::<64>().0[0], &EIGHTS.as_chunks::<64>().0[1]);
        for (g, q) in q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let (codes, aux) = (words[2 * g], words[2 * g + 1]);
            let sevens = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(places([0, 7, 14, 21])), aux);
            let signs = _mm512_permutex2var_epi8(load(low), sevens, load(high));
            for (two, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                // Two codes of each row, in a half of a word each.
                let entries = look_up(shuffle(codes, &PAIRS[two]));
                for (k, q) in q.iter_mut().enumerate() {
                    let (code, half) = (k / 2, k % 2);
                    let at = _mm512_set1_epi64(FIELDS[k]);
                    let fields = _mm512_multishift_epi64_epi8(at, entries);
                    let sign = shuffle(signs, &EVERYWHERE[2 * two + code]);
                    let bits = _mm512_set1_epi32(0x0804_0201 << (4 * half));
                    let negative = _mm512_test_epi8_mask(sign, bits);
                    let bytes = _mm512_permutexvar_epi8(fields, plus);
                    tile::store(_mm512_mask_permutexvar_epi8(bytes, negative, fields, minus), q);
                }
            }
        }
    }

    kernels!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni", unpack, lay_out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_quant::iq2_signs;

    #[test]
    fn signs_agree_with_the_reference() {
        for (s7, bytes) in SIGNS.iter().enumerate() {
            let bits = iq2_signs(s7 as u32);
            assert!(bytes.to_le_bytes().iter().enumerate().all(|(k, b)| (*b == 255) == (bits >> k & 1 == 1)));
        }
    }
}
