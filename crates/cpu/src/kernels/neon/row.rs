//! One weight row with some activation rows, and the indexer's scores. As on other machines the sum over a block is an exact integer, and
//! there are four sums of blocks, one for every fourth block, here in the four lanes: `acc = fma(block, weight scale * activation scale,
//! acc)`; the product is `(acc0 + acc1) + (acc2 + acc3)`.

use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, IQ2XXS_GRID, f16_to_f32, iq2_signs, scale_min};

/// A block of 256 as signed bytes, with scales of groups of 32 and minima of 16.
pub(super) struct Unpacked {
    pub(super) w: [i8; 256],
    pub(super) scales: [i32; 8],
    pub(super) minima: [i16; 16],
    pub(super) d: f32,
    pub(super) dmin: f32,
}

/// A format of blocks of 256.
pub(super) trait Unpack: bytemuck::Pod {
    fn unpack(&self) -> Unpacked;
}

/// Quants times their scales, at most 45: there is one for 16 of them.
impl Unpack for BlockQ2K {
    #[inline]
    fn unpack(&self) -> Unpacked {
        let (mut w, mut minima) = ([0; 256], [0; 16]);
        for s in 0..16 {
            let (half, plane, lane) = (s / 8, s % 8 / 2, s % 2 * 16);
            let scale = self.scales[s] & 15;
            minima[s] = i16::from(self.scales[s] >> 4);
            let bytes = &self.q[32 * half + lane..32 * half + lane + 16];
            for (w, q) in w[16 * s..16 * s + 16].iter_mut().zip(bytes) {
                *w = (((q >> (2 * plane)) & 3) * scale) as i8;
            }
        }
        Unpacked { w, scales: [1; 8], minima, d: f16_to_f32(self.d), dmin: f16_to_f32(self.dmin) }
    }
}

impl Unpack for BlockQ4K {
    #[inline]
    fn unpack(&self) -> Unpacked {
        let (mut w, mut scales, mut minima) = ([0; 256], [0; 8], [0; 16]);
        for g in 0..8 {
            let (scale, min) = scale_min(&self.scales, g);
            scales[g] = i32::from(scale);
            (minima[2 * g], minima[2 * g + 1]) = (i16::from(min), i16::from(min));
            let bytes = &self.q[32 * (g / 2)..32 * (g / 2) + 32];
            for (w, q) in w[32 * g..32 * g + 32].iter_mut().zip(bytes) {
                *w = if g % 2 == 0 { q & 15 } else { q >> 4 } as i8;
            }
        }
        Unpacked { w, scales, minima, d: f16_to_f32(self.d), dmin: f16_to_f32(self.dmin) }
    }
}

/// Eight bytes of 0 or -1 for every seven stored sign bits.
static SIGNS: [u64; 128] = {
    let mut table = [0; 128];
    let mut s7 = 0;
    while s7 < 128 {
        let s8 = iq2_signs(s7 as u32);
        let (mut bytes, mut k) = ([0; 8], 0);
        while k < 8 {
            bytes[k] = if s8 >> k & 1 == 1 { 255 } else { 0 };
            k += 1;
        }
        table[s7] = u64::from_le_bytes(bytes);
        s7 += 1;
    }
    table
};

impl Unpack for BlockIq2Xxs {
    #[inline]
    fn unpack(&self) -> Unpacked {
        let (mut w, mut scales) = ([0; 256], [0; 8]);
        for (g, w) in w.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (codes, aux) = self.group(g);
            scales[g] = 2 * (aux >> 28) as i32 + 1;
            for (v, w) in w.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let level = u64::from_le_bytes(IQ2XXS_GRID[(codes >> (8 * v)) as usize & 255]);
                let signs = SIGNS[(aux >> (7 * v)) as usize & 127];
                // A byte less -1 is its negative's complement; no byte is 0, so that nothing is carried.
                let negative = (level ^ signs).wrapping_add(signs & 0x0101_0101_0101_0101);
                *w = bytemuck::cast(negative);
            }
        }
        Unpacked { w, scales, minima: [0; 16], d: f16_to_f32(self.d) * 0.125, dmin: 0.0 }
    }
}

/// Kernels of a level. In scope must be `products(sum, w, x)`, which adds the products of signed bytes in fours.
macro_rules! rows {
    ($features:literal) => {
        /// The sums of four vectors.
        #[inline]
        #[target_feature(enable = $features)]
        fn sums_of_four(p: [int32x4_t; 4]) -> int32x4_t {
            vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3]))
        }

        /// Products of 32 signed bytes, added.
        #[inline]
        #[target_feature(enable = $features)]
        fn dot(w: &[i8; 32], x: &[i8; 32]) -> int32x4_t {
            let (w, x): (&[[u8; 16]; 2], &[[u8; 16]; 2]) = (bytemuck::cast_ref(w), bytemuck::cast_ref(x));
            let sum = products(zero(), load_bytes(&w[0]), load_bytes(&x[0]));
            products(sum, load_bytes(&w[1]), load_bytes(&x[1]))
        }

        /// Up to four scales from `b`.
        #[inline]
        #[target_feature(enable = $features)]
        fn scales_from(d: &[f32], b: usize) -> float32x4_t {
            let mut four = [0.0; 4];
            four.iter_mut().zip(&d[b..]).for_each(|(o, d)| *o = *d);
            floats(&four)
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn total(acc: float32x4_t) -> f32 {
            let mut sums = [0.0; 4];
            store_floats(acc, &mut sums);
            (sums[0] + sums[1]) + (sums[2] + sums[3])
        }

        #[target_feature(enable = $features)]
        fn q8_0_tile<const N: usize>(rows: &[u8], x: [Act32<'_>; N], out: &mut [f32], columns: usize) {
            for (row, out) in each_row::<BlockQ8_0>(rows, out, columns) {
                let mut acc = [no_floats(); N];
                for (i, four) in row.chunks(4).enumerate() {
                    prefetch(four);
                    let mut d = [0.0; 4];
                    for (d, block) in d.iter_mut().zip(four) {
                        *d = f16_to_f32(block.d);
                    }
                    for j in 0..N {
                        let mut p = [zero(); 4];
                        for (k, block) in four.iter().enumerate() {
                            p[k] = dot(&block.q, &x[j].q.as_chunks().0[4 * i + k]);
                        }
                        let scale = vmulq_f32(floats(&d), scales_from(x[j].d, 4 * i));
                        acc[j] = add_block(acc[j], sums_of_four(p), scale);
                    }
                }
                for j in 0..N {
                    out[j] = total(acc[j]);
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn q8_0_dots(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            tiles!(x, rows, out, act32, q8_0_tile);
        }

        #[target_feature(enable = $features)]
        fn block_tile<const N: usize, B: Unpack>(
            rows: &[u8],
            x: [Act256<'_>; N],
            out: &mut [f32],
            columns: usize,
        ) {
            for (row, out) in each_row::<B>(rows, out, columns) {
                let mut acc = [no_floats(); N];
                for (i, four) in row.chunks(4).enumerate() {
                    prefetch(four);
                    let (mut ints, mut mins) = ([[zero(); 4]; N], [[zero(); 4]; N]);
                    let (mut d, mut dmin) = ([0.0; 4], [0.0; 4]);
                    for (k, block) in four.iter().enumerate() {
                        let u = block.unpack();
                        (d[k], dmin[k]) = (u.d, u.dmin);
                        let minima: &[[u8; 16]; 2] = bytemuck::cast_ref(&u.minima);
                        for j in 0..N {
                            let q: &[i8; 256] = &x[j].q.as_chunks().0[4 * i + k];
                            for g in 0..8 {
                                let sum = dot(&u.w.as_chunks().0[g], &q.as_chunks().0[g]);
                                ints[j][k] = vmlaq_n_s32(ints[j][k], sum, u.scales[g]);
                            }
                            let sums: &[i16; 16] = &x[j].sums.as_chunks().0[4 * i + k];
                            let sums: &[[u8; 16]; 2] = bytemuck::cast_ref(sums);
                            for h in 0..2 {
                                mins[j][k] = pairs(mins[j][k], load_bytes(&minima[h]), load_bytes(&sums[h]));
                            }
                        }
                    }
                    for j in 0..N {
                        let scales = scales_from(x[j].d, 4 * i);
                        acc[j] = add_block(acc[j], sums_of_four(ints[j]), vmulq_f32(floats(&d), scales));
                        acc[j] =
                            subtract_block(acc[j], sums_of_four(mins[j]), vmulq_f32(floats(&dmin), scales));
                    }
                }
                for j in 0..N {
                    out[j] = total(acc[j]);
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn block_dots<B: Unpack>(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            tiles!(x, rows, out, act256, block_tile::<B>);
        }

        /// Index scores: a lane is a head, and four bytes of a key meet four vectors of 16 heads.
        #[target_feature(enable = $features)]
        pub(super) fn index_scores(query: &IndexQuery, keys: &[u8], scores: &mut [f32]) {
            let mut key = [0; index::BLOCK * index::BLOCKS];
            for (bytes, score) in keys.chunks_exact(query.key_bytes()).zip(scores) {
                let (codes, scales) = bytes.split_at(query.code_bytes());
                index::unpack(codes, &mut key);
                let mut all = [no_floats(); 4];
                for group in query.groups() {
                    let mut dot = [no_floats(); 4];
                    let blocks = key.as_chunks::<{ index::BLOCK }>().0;
                    for (b, ((q, block), scale)) in group.q.iter().zip(blocks).zip(scales).enumerate() {
                        let offsets: &[[i32; 4]; 4] = bytemuck::cast_ref(&group.offsets[b]);
                        let mut int =
                            [words(&offsets[0]), words(&offsets[1]), words(&offsets[2]), words(&offsets[3])];
                        for (q, four) in q.iter().zip(block.as_chunks::<4>().0) {
                            let four = splat(i32::from_ne_bytes(*four));
                            let q: &[[u8; 16]; 4] = bytemuck::cast_ref(q);
                            for v in 0..4 {
                                int[v] = products(int[v], load_bytes(&q[v]), four);
                            }
                        }
                        let d: &[[f32; 4]; 4] = bytemuck::cast_ref(&group.d[b]);
                        for v in 0..4 {
                            let scale = scaled_floats(floats(&d[v]), e8m0_to_f32(*scale));
                            dot[v] = add_block(dot[v], int[v], scale);
                        }
                    }
                    let weights: &[[f32; 4]; 4] = bytemuck::cast_ref(group.weights);
                    for v in 0..4 {
                        all[v] = vfmaq_f32(all[v], floats(&weights[v]), vmaxq_f32(dot[v], no_floats()));
                    }
                }
                let mut lanes = [[0.0; 4]; 4];
                for v in 0..4 {
                    store_floats(all[v], &mut lanes[v]);
                }
                *score = index::total(bytemuck::cast_ref(&lanes));
            }
        }
    };
}
pub(super) use rows;
