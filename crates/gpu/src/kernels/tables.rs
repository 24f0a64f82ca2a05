//! Tables of IQ2_XXS in shared memory: the grid and the signs, from `ds4-quant`.

use cubecl::prelude::*;
use ds4_quant::{IQ2XXS_GRID, iq2_signs};

/// The tables, as a kernel sees them. Empty where no format needs them.
#[derive(CubeType)]
pub struct Tables {
    /// Eight magnitudes a code.
    pub grid: Shared<[Vector<u32, Const<2>>]>,
    /// Eight masks a sign code, 255 where minus.
    pub signs: Shared<[Vector<u32, Const<2>>]>,
}

/// Words of the tables: the grid's 256 pairs, then 128 pairs of masks.
pub fn words() -> Vec<u32> {
    let grid = IQ2XXS_GRID.iter().flat_map(|g| {
        let (a, b) = g.split_at(4);
        [a, b].map(|h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]))
    });
    let signs = (0..128).flat_map(|s| {
        let bits = iq2_signs(s);
        [0, 4].map(|first| (0..4).map(|i| u32::from(bits >> (first + i) & 1) * (255 << (8 * i))).sum())
    });
    grid.chain(signs).collect()
}

/// The same for f16: the grid's 256 eights, then 128 eights of sign bits.
pub fn half_words() -> Vec<u32> {
    let pair = |a: u16, b: u16| u32::from(a) | u32::from(b) << 16;
    let magnitude = |m: u8| half::f16::from_f32(f32::from(m)).to_bits();
    let grid = IQ2XXS_GRID
        .iter()
        .flat_map(|g| [0, 2, 4, 6].map(|i| pair(magnitude(g[i]), magnitude(g[i + 1]))));
    let signs = (0..128).flat_map(|s| {
        let bits = iq2_signs(s);
        let sign = |i: u8| u16::from(bits >> i & 1) << 15;
        [0, 2, 4, 6].map(|i| pair(sign(i), sign(i + 1)))
    });
    grid.chain(signs).collect()
}

#[cube]
impl Tables {
    /// Loads them into shared memory; the whole cube takes part.
    pub fn load(words: &[Vector<u32, Const<2>>], #[comptime] needed: bool) -> Tables {
                let mut grid = Shared::<[Vector<u32, Const<2>>]>::new_slice(comptime!(if needed { 256usize } else { 1usize }));
        let mut signs = Shared::<[Vector<u32, Const<2>>]>::new_slice(comptime!(if needed { 128usize } else { 1usize }));
        if comptime!(needed) {
            let mut i = UNIT_POS as usize;
            while i < 384 {
                if i < 256 {
                    grid[i] = words[i];
                } else {
                    signs[i - 256] = words[i];
                }
                i += CUBE_DIM as usize;
            }
            sync_cube();
        }
        Tables { grid, signs }
    }
}
