//! Float kernels, written once for the widths of the registers: `float_kernels!` makes them for a level from its few instructions.
//!
//! A product has two sums of as many lanes as a register, of every other register's worth of values, and a tail in order; which other
//! products are computed beside it never changes that. Tiles of products share their loads: the units that multiply are kept busy by half
//! as many loads as products.

/// Kernels of one level, whose registers hold two sums of `$rows` x 4 products, or `$registers` x 4 of a head's channels. `$load` reads a
/// register of floats, `$half` one of halves; `$sum` adds the lanes.
macro_rules! float_kernels {
    (
        $features:literal, $lanes:literal, $vector:ty, $rows:literal x $registers:literal,
        $zero:path, $load:path, $half:path, $store:path, $splat:path, $fma:path, $add:path, $sum:path
    ) => {
        /// Products of the rows `w` with the columns `x`, as far as whole pairs of registers reach, added to `acc`.
        macro_rules! products {
            ($name:ident, $bytes:literal, $read:path) => {
                #[inline]
                #[target_feature(enable = $features)]
                fn $name<const R: usize, const C: usize>(
                    w: [&[u8]; R],
                    x: [&[f32]; C],
                    acc: &mut [[[$vector; 2]; C]; R],
                ) {
                    let mut sums = *acc;
                    let pairs = w[0].len() / $bytes / (2 * $lanes);
                    // As long as they are read: else every load is checked.
                    let (mut w, mut x) = (w, x);
                    for r in 0..R {
                        w[r] = &w[r][..2 * $lanes * $bytes * pairs];
                    }
                    for c in 0..C {
                        x[c] = &x[c][..2 * $lanes * pairs];
                    }
                    for i in 0..pairs {
                        let at = 2 * $lanes * i;
                        let mut weights = [[$zero(); 2]; R];
                        for r in 0..R {
                            weights[r] = [$read(w[r], at), $read(w[r], at + $lanes)];
                        }
                        for c in 0..C {
                            let (low, high) = ($load(x[c], at), $load(x[c], at + $lanes));
                            for r in 0..R {
                                sums[r][c][0] = $fma(weights[r][0], low, sums[r][c][0]);
                                sums[r][c][1] = $fma(weights[r][1], high, sums[r][c][1]);
                            }
                        }
                    }
                    *acc = sums;
                }
            };
        }
        products!(products_f32, 4, float_at);
        products!(products_f16, 2, $half);

        /// A register of the floats of a file, which may lie anywhere.
        #[inline]
        #[target_feature(enable = $features)]
        fn float_at(row: &[u8], i: usize) -> $vector {
            let bytes = row[4 * i..4 * i + 4 * $lanes].as_chunks::<4>().0;
            let mut floats = [0.0; $lanes];
            for k in 0..$lanes {
                floats[k] = f32::from_le_bytes(bytes[k]);
            }
            $load(&floats, 0)
        }

        macro_rules! dots {
            ($tile:ident, $dots:ident, $products:ident, $bytes:literal, $one:expr) => {
                #[target_feature(enable = $features)]
                fn $tile<const N: usize>(rows: &[u8], x: [&[f32]; N], out: &mut [f32], columns: usize) {
                    for (row, out) in each_row::<u8>(rows, out, columns) {
                        let mut acc = [[[$zero(); 2]; N]; 1];
                        $products([row], x, &mut acc);
                        let len = row.len() / $bytes;
                        for j in 0..N {
                            out[j] = $sum($add(acc[0][j][0], acc[0][j][1]));
                            for i in len / (2 * $lanes) * (2 * $lanes)..len {
                                out[j] += $one(row, i) * x[j][i];
                            }
                        }
                    }
                }

                #[target_feature(enable = $features)]
                pub(super) fn $dots(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
                    tiles!(x, rows, out, float, $tile);
                }
            };
        }
        dots!(f32_tile, f32_dots, products_f32, 4, |row: &[u8], i: usize| f32::from_le_bytes([
            row[4 * i],
            row[4 * i + 1],
            row[4 * i + 2],
            row[4 * i + 3]
        ]));
        dots!(f16_tile, f16_dots, products_f16, 2, |row: &[u8], i: usize| f16_to_f32([
            row[2 * i],
            row[2 * i + 1]
        ]));

        #[target_feature(enable = $features)]
        pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
            let mut product = [0.0];
            f32_tile::<1>(bytemuck::cast_slice(a), [b], &mut product, 1);
            product[0]
        }

        /// Eight rows of halves: four columns at a time meet a stretch of all rows that the first cache holds.
        #[target_feature(enable = $features)]
        pub(super) fn f16_rows(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
            const STRETCH: usize = 512;
            let (row, n) = (rows.len() / F16_ROWS, x.index.len());
            let len = row / 2;
            let whole = len / (2 * $lanes) * (2 * $lanes);
            let mut j = 0;
            while j < n {
                // The last columns meet the weights twice where they are fewer than four.
                let columns = [j, (j + 1).min(n - 1), (j + 2).min(n - 1), (j + 3).min(n - 1)];
                let mut acc = [[[[$zero(); 2]; 4]; $rows]; F16_ROWS / $rows];
                for first in (0..whole).step_by(STRETCH) {
                    let end = whole.min(first + STRETCH);
                    let mut part = [&x.float(j)[first..end]; 4];
                    for c in 1..4 {
                        part[c] = &x.float(columns[c])[first..end];
                    }
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let mut weights: [&[u8]; $rows] = [&[]; $rows];
                        for (r, w) in weights.iter_mut().enumerate() {
                            *w = &rows[(i * $rows + r) * row..][2 * first..2 * end];
                        }
                        products_f16(weights, part, acc);
                    }
                }
                for (r, acc) in acc.iter().flatten().enumerate() {
                    let w = &rows[r * row..(r + 1) * row];
                    for (c, [low, high]) in acc.iter().enumerate().take(n - j) {
                        let mut sum = $sum($add(*low, *high));
                        let x = x.float(j + c);
                        for i in whole..len {
                            sum += f16_to_f32([w[2 * i], w[2 * i + 1]]) * x[i];
                        }
                        out.column(j + c, F16_ROWS)[r] = sum;
                    }
                }
                j += 4;
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn scores_of<const H: usize, const R: usize>(
            q: &[f32],
            tile: &Tile<'_>,
            (h, r): (usize, usize),
            scores: &mut [f32],
        ) {
            let width = tile.width;
            let mut heads: [&[u8]; H] = [&[]; H];
            for i in 0..H {
                heads[i] = bytemuck::cast_slice(&q[(h + i) * width..(h + i + 1) * width]);
            }
            let mut rows = [tile.row(r); R];
            for i in 1..R {
                rows[i] = tile.row(r + i);
            }
            let mut acc = [[[$zero(); 2]; R]; H];
            products_f32(heads, rows, &mut acc);
            for i in 0..H {
                for k in 0..R {
                    let mut sum = $sum($add(acc[i][k][0], acc[i][k][1]));
                    for c in width / (2 * $lanes) * (2 * $lanes)..width {
                        sum += rows[k][c] * q[(h + i) * width + c];
                    }
                    scores[(h + i) * TILE + r + k] = sum;
                }
            }
        }

        /// [`super::Scores`]: four rows stay in the first cache while all heads meet them.
        #[target_feature(enable = $features)]
        pub(super) fn scores(q: &[f32], tile: &Tile<'_>, scores: &mut [f32]) {
            let heads = q.len() / tile.width;
            let mut r = 0;
            while r + 4 <= tile.n {
                let mut h = 0;
                while heads - h >= $rows {
                    scores_of::<$rows, 4>(q, tile, (h, r), scores);
                    h += $rows;
                }
                for h in h..heads {
                    scores_of::<1, 4>(q, tile, (h, r), scores);
                }
                r += 4;
            }
            for r in r..tile.n {
                for h in 0..heads {
                    scores_of::<1, 1>(q, tile, (h, r), scores);
                }
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn weigh_of<const H: usize, const C: usize>(
            weights: &[f32],
            tile: &Tile<'_>,
            (h, channel): (usize, usize),
            out: &mut [f32],
        ) {
            let width = tile.width;
            let mut acc = [[$zero(); C]; H];
            for i in 0..H {
                for c in 0..C {
                    acc[i][c] = $load(out, (h + i) * width + channel + c * $lanes);
                }
            }
            for r in 0..tile.n {
                let row = &tile.row(r)[channel..channel + C * $lanes];
                for i in 0..H {
                    let weight = $splat(weights[(h + i) * TILE + r]);
                    for c in 0..C {
                        acc[i][c] = $fma(weight, $load(row, c * $lanes), acc[i][c]);
                    }
                }
            }
            for i in 0..H {
                for c in 0..C {
                    $store(out, (h + i) * width + channel + c * $lanes, acc[i][c]);
                }
            }
        }

        /// [`super::Weigh`]: some channels of all rows stay in the first cache while all heads weigh them.
        #[target_feature(enable = $features)]
        pub(super) fn weigh(weights: &[f32], tile: &Tile<'_>, out: &mut [f32]) {
            const HEADS: usize = 4;
            const REGISTERS: usize = $registers;
            let (width, heads) = (tile.width, out.len() / tile.width);
            let whole = width / (REGISTERS * $lanes) * (REGISTERS * $lanes);
            for channel in (0..whole).step_by(REGISTERS * $lanes) {
                let mut h = 0;
                while h + HEADS <= heads {
                    weigh_of::<HEADS, REGISTERS>(weights, tile, (h, channel), out);
                    h += HEADS;
                }
                for h in h..heads {
                    weigh_of::<1, REGISTERS>(weights, tile, (h, channel), out);
                }
            }
            for (out, weights) in out.chunks_exact_mut(width).zip(weights.chunks_exact(TILE)) {
                for r in 0..tile.n {
                    for (o, v) in out[whole..].iter_mut().zip(&tile.row(r)[whole..]) {
                        *o = weights[r].mul_add(*v, *o);
                    }
                }
            }
        }
    };
}
pub(super) use float_kernels;
