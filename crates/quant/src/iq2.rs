//! IQ2_XXS: 256 weights in vectors of 8, each a code of a fixed 256-entry grid plus signs.

use crate::act::Act256;
use crate::blocks::{Block, BlockIq2Xxs, f16_to_f32};
use ds4_gguf::TensorType;

/// Magnitudes 8, 25 or 43 of the eight elements of every code (`gguf.md` section 5).
pub static IQ2XXS_GRID: [[u8; 8]; 256] = parse_grid(include_bytes!("iq2xxs_grid.txt"));

const fn parse_grid(text: &[u8]) -> [[u8; 8]; 256] {
    const LEVELS: [u8; 3] = [8, 25, 43];
    let mut grid = [[0; 8]; 256];
    let (mut n, mut i) = (0, 0);
    while i < text.len() {
        if text[i] >= b'0' && text[i] <= b'2' {
            grid[n / 8][n % 8] = LEVELS[(text[i] - b'0') as usize];
            n += 1;
        }
        i += 1;
    }
    assert!(n == 256 * 8, "the grid has 256 codes of 8 digits");
    grid
}

/// Eight sign bits from the seven stored ones: the last makes the number of minus signs even.
pub const fn iq2_signs(s7: u32) -> u8 {
    let s7 = (s7 & 127) as u8;
    s7 | (((s7.count_ones() & 1) as u8) << 7)
}

impl BlockIq2Xxs {
    /// Group `g`: its four codes packed in a word, and its signs and scale.
    pub fn group(&self, g: usize) -> (u32, u32) {
        let [a, b, c, d, e, f, h, i] = self.groups[g];
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, h, i]))
    }
}

/// Signed integer weights of a group of 32 (four vectors of eight).
fn signed_levels(codes: u32, aux: u32, out: &mut [i8; 32]) {
    for v in 0..4 {
        let code = (codes >> (8 * v)) & 255;
        let signs = iq2_signs(aux >> (7 * v));
        for k in 0..8 {
            let level = IQ2XXS_GRID[code as usize][k] as i8;
            out[8 * v + k] = if signs >> k & 1 == 1 { -level } else { level };
        }
    }
}

impl Block for BlockIq2Xxs {
    const TYPE: TensorType = TensorType::Iq2Xxs;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let d = f16_to_f32(self.d);
        let mut levels = [0i8; 32];
        for (g, out) in out.chunks_exact_mut(32).enumerate().take(8) {
            let (codes, aux) = self.group(g);
            let unit = d * (0.5 + (aux >> 28) as f32) * 0.25;
            signed_levels(codes, aux, &mut levels);
            for (o, &level) in out.iter_mut().zip(&levels) {
                *o = unit * f32::from(level);
            }
        }
    }
}

/// Dot product of a row with activations quantized per 256.
pub(crate) fn dot(row: &[BlockIq2Xxs], x: Act256<'_>) -> f32 {
    let mut sum = 0.0;
    let mut levels = [0i8; 32];
    for (b, block) in row.iter().enumerate() {
        let mut scaled = 0i32;
        for g in 0..8 {
            let (codes, aux) = block.group(g);
            signed_levels(codes, aux, &mut levels);
            let q = &x.q[256 * b + 32 * g..256 * b + 32 * g + 32];
            let int: i32 = levels.iter().zip(q).map(|(&w, &a)| i32::from(w) * i32::from(a)).sum();
            scaled += (2 * (aux >> 28) as i32 + 1) * int;
        }
        // (0.5 + s) / 4 = (2s + 1) / 8
        sum += f16_to_f32(block.d) * x.d[b] * 0.125 * scaled as f32;
    }
    sum
}
