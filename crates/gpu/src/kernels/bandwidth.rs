//! Reading a buffer from end to end.

use super::dot::Quad;
use cubecl::prelude::*;

/// Each cube adds up vectors all over the buffer, four loads at a time.
#[cube(launch_unchecked)]
pub fn sum(data: &[Quad], out: &mut [u32]) {
    let step = (CUBE_COUNT_X * CUBE_DIM) as usize;
    let mut total = Quad::new(0u32);
    let mut i = ABSOLUTE_POS;
    while i + 3 * step < data.len() {
        total += (data[i] ^ data[i + step]) + (data[i + 2 * step] ^ data[i + 3 * step]);
        i += 4 * step;
    }
    let sum =
        (total.extract(0usize) ^ total.extract(1usize)) + (total.extract(2usize) ^ total.extract(3usize));
    if sum == 0x1234_5678 {
        out[CUBE_POS_X as usize] = sum;
    }
}
