//! The matrix units, as a plane uses them: tiles of f16 from shared memory, their products added to sums in f32.
//!
//! What all devices offer are opaque tiles: which unit holds which value is the device's affair. NVIDIA's say so, and
//! tiles then come in fragments by an instruction of their own, which is a little faster.

use super::dot::Eight;
use super::matmul::Tiling;
use cubecl::prelude::*;
use half::f16;

/// Sums of a plane's tiles.
#[derive(CubeType)]
pub struct Sums {
    tiles: Sequence<cmma::Matrix<f32>>,
    /// Two for each tile, its left half and its right.
    fragments: Sequence<Array<Vector<f32, Const<2>>>>,
}

/// Sums of nothing yet.
#[cube]
pub fn zero_sums(#[comptime] t: Tiling) -> Sums {
    let mut tiles = Sequence::<cmma::Matrix<f32>>::new();
    let mut fragments = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _ in 0..comptime!(t.m() * t.n()) {
        if comptime!(t.fragments) {
            #[unroll]
            for _ in 0..2usize {
                let mut zeros = Array::<Vector<f32, Const<2>>>::new(2usize);
                zeros[0] = Vector::new(0.0f32);
                zeros[1] = Vector::new(0.0f32);
                fragments.push(zeros);
            }
        } else {
            tiles.push(cmma::Matrix::<f32>::from_value(
                cmma::MatrixIdent::Accumulator,
                t.side,
                t.side,
                t.side,
                cmma::MatrixLayout::Undefined,
                0.0f32,
            ));
        }
    }
    Sums { tiles, fragments }
}

/// Stores tile `i` of a plane's sums.
#[cube]
pub fn store_sum(
    sums: &Sums,
    to: &mut [f32],
    #[comptime] i: usize,
    #[comptime] stride: usize,
    #[comptime] t: Tiling,
) {
    if comptime!(t.fragments) {
        let def = fragment_shape();
        #[unroll]
        for half in 0..2usize {
            #[unroll]
            for element in 0..4usize {
                let (row, column) =
                    def.position_of_nth(UNIT_POS_PLANE, element as u32, cmma::MatrixIdent::Accumulator);
                let v = sums.fragments.index(comptime!(2 * i + half))[comptime!(element / 2)];
                to[row as usize * stride + column as usize + 8 * half] = v.extract(comptime!(element % 2));
            }
        }
    } else {
        cmma::store(to, sums.tiles.index(i), comptime!(stride as u32), cmma::MatrixLayout::RowMajor);
    }
}

/// What a step of the matrix units multiplies, where fragments are known: the left or right half of a tile.
#[cube]
fn fragment_shape() -> cmma::MmaDefinition<f16, f16, f32> {
    cmma::MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize)
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
pub fn row_of(#[comptime] i: usize, #[comptime] t: Tiling) -> usize {
    (PLANE_POS as usize / comptime!(t.planes_n)) * comptime!(t.rows / t.planes_m) + comptime!(i * t.side)
}

/// Row of weights of a plane's tile `j`, within the cube's. Of a pair of matrices, whose rows are the halves of the
/// cube's tile, every plane has as many of the first as of the second.
#[cube]
pub fn column_of(#[comptime] j: usize, #[comptime] t: Tiling, #[comptime] pair: bool) -> usize {
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
pub fn multiply(
    a: &Shared<[Eight]>,
    b: &Shared<[Eight]>,
    buffer: usize,
    sums: &mut Sums,
    #[comptime] k: usize,
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) {
    let base_a = buffer * comptime!(t.rows * t.pitch()) + comptime!(k * t.side / 8);
    let base_b = buffer * comptime!(t.columns * t.pitch()) + comptime!(k * t.side / 8);
    if comptime!(t.fragments) {
        multiply_fragments(a, b, base_a, base_b, sums, t, pair);
    } else {
        multiply_tiles(a, b, base_a, base_b, sums, t, pair);
    }
}

#[cube]
fn multiply_tiles(
    a: &Shared<[Eight]>,
    b: &Shared<[Eight]>,
    base_a: usize,
    base_b: usize,
    sums: &mut Sums,
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) {
    let mut right = Sequence::<cmma::Matrix<f16>>::new();
    #[unroll]
    for j in 0..comptime!(t.n()) {
        right.push(tile_at(
            b,
            base_b + column_of(j, t, pair) * comptime!(t.pitch()),
            comptime!(t.buffers * t.columns * t.pitch()),
            cmma::MatrixIdent::B,
            cmma::MatrixLayout::ColMajor,
            t,
        ));
    }
    #[unroll]
    for i in 0..comptime!(t.m()) {
        let left = tile_at(
            a,
            base_a + row_of(i, t) * comptime!(t.pitch()),
            comptime!(t.buffers * t.rows * t.pitch()),
            cmma::MatrixIdent::A,
            cmma::MatrixLayout::RowMajor,
            t,
        );
        #[unroll]
        for j in 0..comptime!(t.n()) {
            let sum = sums.tiles.index(comptime!(i * t.n() + j));
            cmma::execute(&left, right.index(j), sum, sum);
        }
    }
}

/// The same where fragments are known. A tile is loaded as four parts of 8x8, for each of which eight units name a row.
#[cube]
fn multiply_fragments(
    a: &Shared<[Eight]>,
    b: &Shared<[Eight]>,
    base_a: usize,
    base_b: usize,
    sums: &mut Sums,
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) {
    let (def, lane) = (fragment_shape(), UNIT_POS_PLANE as usize);
    let end_b = comptime!(t.buffers * t.columns * t.pitch());
    // Parts in the order that the units want them: of activations first along the rows, of weights along the depth.
    let (row_a, eight_a) = (lane % 16, lane / 16);
    let (row_b, eight_b) = (lane / 16 * 8 + lane % 8, lane / 8 % 2);
    let mut right = Sequence::<Array<Vector<f16, Const<2>>>>::new();
    #[unroll]
    for j in 0..comptime!(t.n()) {
        let at = base_b + (column_of(j, t, pair) + row_b) * comptime!(t.pitch()) + eight_b;
        let parts = def.load_matrix::<Eight, Const<2>>(&b[at..end_b], cmma::MatrixIdent::B, 4usize, false);
        #[unroll]
        for half in 0..2usize {
            let mut own = Array::<Vector<f16, Const<2>>>::new(2usize);
            own[0] = parts[comptime!(2 * half)];
            own[1] = parts[comptime!(2 * half + 1)];
            right.push(own);
        }
    }
    multiply_rows(a, base_a + row_a * comptime!(t.pitch()) + eight_a, &right, sums, t);
}

/// Step `k` of a slice of activations in shared memory, with weights that are in fragments already.
#[cube]
pub fn multiply_with(
    a: &Shared<[Eight]>,
    buffer: usize,
    right: &Sequence<Array<Vector<f16, Const<2>>>>,
    sums: &mut Sums,
    #[comptime] k: usize,
    #[comptime] t: Tiling,
) {
    let lane = UNIT_POS_PLANE as usize;
    let base = buffer * comptime!(t.rows * t.pitch()) + comptime!(k * t.side / 8);
    multiply_rows(a, base + lane % 16 * comptime!(t.pitch()) + lane / 16, right, sums, t);
}

/// The products of all tiles of rows; this unit names the row of eight values at `first` of each.
#[cube]
fn multiply_rows(
    a: &Shared<[Eight]>,
    first: usize,
    right: &Sequence<Array<Vector<f16, Const<2>>>>,
    sums: &mut Sums,
    #[comptime] t: Tiling,
) {
    let (def, end) = (fragment_shape(), comptime!(t.buffers * t.rows * t.pitch()));
    #[unroll]
    for i in 0..comptime!(t.m()) {
        let at = first + row_of(i, t) * comptime!(t.pitch());
        let left = def.load_matrix::<Eight, Const<2>>(&a[at..end], cmma::MatrixIdent::A, 4usize, false);
        #[unroll]
        for j in 0..comptime!(2 * t.n()) {
            let sum = sums.fragments.index_mut(comptime!(2 * i * t.n() + j));
            def.execute_inplace(&left, right.index(j), sum);
        }
    }
}
