//! The grid of IQ2_XXS in shared memory, from `ds4-quant`. Signs are worked out: looking them up would double the
//! traffic on shared memory, which is what bounds these products.

use cubecl::prelude::*;
use ds4_quant::IQ2XXS_GRID;

/// The grid, as a kernel sees it. Empty where no format needs it.
#[derive(CubeType)]
pub struct Tables {
    /// Eight magnitudes a code.
    pub grid: Shared<[Vector<u32, Const<2>>]>,
}

/// Words of the grid: 256 pairs of four magnitudes each.
pub fn words() -> Vec<u32> {
    let pairs = IQ2XXS_GRID.iter().flat_map(|g| {
        let (a, b) = g.split_at(4);
        [a, b].map(|h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]))
    });
    pairs.collect()
}

/// The same in f16: 256 eights.
pub fn half_words() -> Vec<u32> {
    let magnitude = |m: u8| u32::from(half::f16::from_f32(f32::from(m)).to_bits());
    let eights =
        IQ2XXS_GRID.iter().flat_map(|g| [0, 2, 4, 6].map(|i| magnitude(g[i]) | magnitude(g[i + 1]) << 16));
    eights.collect()
}

#[cube]
impl Tables {
    /// Loads it into shared memory; the whole cube takes part.
    pub fn load(words: &[Vector<u32, Const<2>>], #[comptime] needed: bool) -> Tables {
        let mut grid =
            Shared::<[Vector<u32, Const<2>>]>::new_slice(comptime!(if needed { 256usize } else { 1usize }));
        if comptime!(needed) {
            let mut i = UNIT_POS as usize;
            while i < 256 {
                grid[i] = words[i];
                i += CUBE_DIM as usize;
            }
            sync_cube();
        }
        Tables { grid }
    }
}
