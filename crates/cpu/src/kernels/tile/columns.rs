//! Products of laid out rows with activation rows.

/// Kernels of a level by format, whose registers hold `$lanes` words: two vectors of weight rows, one behind the other, with all columns.
///
/// `wide`: whether `products` adds to 32 bits. `at_once`: numbers of columns that are taken at once, the largest first, of which a format
/// whose groups have scales takes at most `scaled`. In scope must be [`super::lay_outs`], and besides what loads and stores:
/// * `products(sum, w, x)`: adds the products of bytes, unsigned and signed, in twos to 16 bits or in fours to 32;
/// * `add_scaled(int, sum, scale)`: adds what `products` summed, times a scale, to 32 bits;
/// * `pairs(int, a, b)`: adds the products of 16 bits in twos.
macro_rules! columns {
    (
        $features:literal, $lanes:literal, $vector:ty, $floats:ty,
        wide: $wide:literal, at_once: [$($n:literal),*], scaled: $scaled:literal
    ) => {
        const LANES: usize = $lanes;
        /// Of Q8_0, if pairs of products must fit 16 bits: nibbles.
        const PLANES: usize = if $wide { 1 } else { 2 };

        thread_local! {
            static PACKED: RefCell<[Packed<LANES>; 2]> = RefCell::default();
            static PACKED_32: RefCell<[Packed32<LANES, PLANES>; 2]> = RefCell::default();
        }

        #[target_feature(enable = $features)]
        pub(super) fn q8_0(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
            PACKED_32.with_borrow_mut(|packed| {
                for (packed, rows) in packed.iter_mut().zip(rows.chunks_exact(rows.len() / 2)) {
                    let rows = tile::rows_of(rows);
                    packed.room(rows[0].len());
                    lay_out_q8_0(packed, &rows);
                }
                let (n, mut j) = (x.index.len(), 0);
                $(
                    while n - j >= $n {
                        columns_32::<$n>(packed, x, j, out);
                        j += $n;
                    }
                )*
            });
        }

        #[target_feature(enable = $features)]
        pub(super) fn q2_k(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
            multiply::<BlockQ2K, false>(|packed, rows| lay_out_q2_k(packed, rows), rows, x, out);
        }

        #[target_feature(enable = $features)]
        pub(super) fn q4_k(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
            multiply::<BlockQ4K, false>(|packed, rows| lay_out_q4_k::<{ !$wide }>(packed, rows), rows, x, out);
        }

        #[target_feature(enable = $features)]
        pub(super) fn iq2_xxs(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
            multiply::<BlockIq2Xxs, false>(|packed, rows| lay_out_iq2_xxs::<{ !$wide }>(packed, rows), rows, x, out);
        }

        /// Lays out two vectors of rows in the running thread's buffers by `lay_out`, and multiplies them with all columns. `IN_PLANES`: of
        /// activations that are planes the `i`th step of every group is before the next step of any; so are a group's weights laid out.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn multiply<F: Form, const IN_PLANES: bool>(
            lay_out: impl Fn(&mut Packed<LANES>, &[&[F]; LANES]),
            rows: &[u8],
            x: &Columns<'_>,
            out: &mut Target<'_>,
        ) {
            PACKED.with_borrow_mut(|packed| {
                for (packed, rows) in packed.iter_mut().zip(rows.chunks_exact(rows.len() / 2)) {
                    let rows = tile::rows_of(rows);
                    packed.room(rows[0].len());
                    lay_out(packed, &rows);
                }
                let (n, mut j) = (x.index.len(), 0);
                $(
                    while n - j >= $n && (!F::SCALED || $n <= $scaled) {
                        columns::<F, IN_PLANES, $n>(packed, x, j, out);
                        j += $n;
                    }
                )*
            });
        }

        /// Four bytes of an activation row, in every lane.
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn spread<const N: usize>(x: &[i8; N], four: usize) -> $vector {
            splat(bytemuck::cast(x.as_chunks::<4>().0[four]))
        }

        /// Minima of block `b` times the sums of the activations under them.
        #[inline]
        #[target_feature(enable = $features)]
        fn minima_products<const N: usize>(
            packed: &[Packed<LANES>; 2],
            b: usize,
            sums: [&[i16; 16]; N],
        ) -> [[$vector; N]; 2] {
            let mut out = [[zero(); N]; 2];
            for k in 0..8 {
                let w = [words(&packed[0].minima[b][k]), words(&packed[1].minima[b][k])];
                for c in 0..N {
                    let two: [i16; 2] = sums[c].as_chunks::<2>().0[k];
                    let two = splat(bytemuck::cast(two));
                    out[0][c] = pairs(out[0][c], w[0], two);
                    out[1][c] = pairs(out[1][c], w[1], two);
                }
            }
            out
        }

        /// Columns `j..j + N` of the product.
        #[target_feature(enable = $features)]
        fn columns<F: Form, const IN_PLANES: bool, const N: usize>(
            packed: &[Packed<LANES>; 2],
            x: &Columns<'_>,
            j: usize,
            out: &mut Target<'_>,
        ) {
            // Loops, not closures: what is called through a closure is not built for these registers.
            let mut rows = [x.act256(j); N];
            for c in 1..N {
                rows[c] = x.act256(j + c);
            }
            let steps = if $wide { 8 } else { F::STEPS };
            // Wide sums without scales are one sum over the block; those of signed quants start with what makes up for their offset.
            let (one_sum, offsets_first) = ($wide && !F::SCALED, $wide && F::SIGNED);
            let mut acc = [[[no_floats(); N]; 4]; 2];
            for b in 0..packed[0].q.len() {
                let mut x: [&[i8; 256]; N] = [&rows[0].q.as_chunks().0[b]; N];
                let mut sums: [&[i16; 16]; N] = [&rows[0].sums.as_chunks().0[b]; N];
                for c in 1..N {
                    x[c] = &rows[c].q.as_chunks().0[b];
                    sums[c] = &rows[c].sums.as_chunks().0[b];
                }
                let mut offsets = [[0; 8]; N];
                if offsets_first {
                    for c in 0..N {
                        offsets[c] = tile::iq2_offsets(sums[c]);
                    }
                }
                let (low, high) = (&packed[0].q[b].0, &packed[1].q[b].0);
                let scales = [&packed[0].scales[b], &packed[1].scales[b]];
                let mut int = [[zero(); N]; 2];
                for g in 0..8 {
                    for part in 0..8 / steps {
                        let mut sum = if one_sum { int } else { [[zero(); N]; 2] };
                        if offsets_first {
                            for c in 0..N {
                                let offset = splat(offsets[c][g]);
                                (sum[0][c], sum[1][c]) = (offset, offset);
                            }
                        }
                        for k in steps * part..steps * (part + 1) {
                            let w = [load(&low[g][k]), load(&high[g][k])];
                            for c in 0..N {
                                let four = spread(x[c], if IN_PLANES { 8 * k + g } else { 8 * g + k });
                                sum[0][c] = products(sum[0][c], w[0], four);
                                sum[1][c] = products(sum[1][c], w[1], four);
                            }
                        }
                        if one_sum {
                            int = sum;
                            continue;
                        }
                        for h in 0..2 {
                            let scale = if F::SCALED { words(&scales[h][g]) } else { splat(0x0001_0001) };
                            for c in 0..N {
                                int[h][c] = add_scaled(int[h][c], sum[h][c], scale);
                            }
                        }
                    }
                }
                if F::SIGNED && !offsets_first {
                    let minima = minima_products(packed, b, sums);
                    for h in 0..2 {
                        for c in 0..N {
                            int[h][c] = subtract(int[h][c], minima[h][c]);
                        }
                    }
                }
                for h in 0..2 {
                    let d = scaled_floats(floats(&packed[h].d[b]), F::UNIT);
                    for c in 0..N {
                        let acc = &mut acc[h][b % 4][c];
                        *acc = add_block(*acc, int[h][c], scaled_floats(d, rows[c].d[b]));
                    }
                }
                // After the quants: there are not registers enough for both.
                if !F::SIGNED {
                    let minima = minima_products(packed, b, sums);
                    for h in 0..2 {
                        let dmin = floats(&packed[h].dmin[b]);
                        for c in 0..N {
                            let acc = &mut acc[h][b % 4][c];
                            *acc = subtract_block(*acc, minima[h][c], scaled_floats(dmin, rows[c].d[b]));
                        }
                    }
                }
            }
            put(&acc, j, out);
        }

        /// The same of Q8_0.
        #[target_feature(enable = $features)]
        fn columns_32<const N: usize>(
            packed: &[Packed32<LANES, PLANES>; 2],
            x: &Columns<'_>,
            j: usize,
            out: &mut Target<'_>,
        ) {
            let (mut rows, mut offsets) = ([x.act32(j); N], [x.offsets32(j); N]);
            for c in 1..N {
                rows[c] = x.act32(j + c);
                offsets[c] = x.offsets32(j + c);
            }
            let mut acc = [[[no_floats(); N]; 4]; 2];
            for (b, (Planes(low), Planes(high))) in packed[0].q.iter().zip(&packed[1].q).enumerate() {
                let mut x: [&[i8; 32]; N] = [&rows[0].q.as_chunks().0[b]; N];
                let mut int = [[zero(); N]; 2];
                for c in 0..N {
                    x[c] = &rows[c].q.as_chunks().0[b];
                    let offset = if Q8_MIDDLE == 0 { zero() } else { splat(offsets[c][b]) };
                    (int[0][c], int[1][c]) = (offset, offset);
                }
                for plane in 0..PLANES {
                    let mut sum = if $wide { int } else { [[zero(); N]; 2] };
                    for k in 0..8 {
                        let w = [load(&low[plane][k]), load(&high[plane][k])];
                        for c in 0..N {
                            let four = spread(x[c], k);
                            sum[0][c] = products(sum[0][c], w[0], four);
                            sum[1][c] = products(sum[1][c], w[1], four);
                        }
                    }
                    if $wide {
                        int = sum;
                        continue;
                    }
                    // The high nibbles are first.
                    let scale = splat(if plane == 0 { 0x0010_0010 } else { 0x0001_0001 });
                    for h in 0..2 {
                        for c in 0..N {
                            int[h][c] = add_scaled(int[h][c], sum[h][c], scale);
                        }
                    }
                }
                let d = [floats(&packed[0].d[b]), floats(&packed[1].d[b])];
                for c in 0..N {
                    for h in 0..2 {
                        let acc = &mut acc[h][b % 4][c];
                        *acc = add_block(*acc, int[h][c], scaled_floats(d[h], rows[c].d[b]));
                    }
                }
            }
            put(&acc, j, out);
        }

        /// Puts the sums of four sums of each vector of rows in columns `j..j + N`.
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn put<const V: usize, const N: usize>(
            acc: &[[[$floats; N]; 4]; V],
            j: usize,
            out: &mut Target<'_>,
        ) {
            for v in 0..V {
                for c in 0..N {
                    let sum = add_floats(
                        add_floats(acc[v][0][c], acc[v][1][c]),
                        add_floats(acc[v][2][c], acc[v][3][c]),
                    );
                    let column = out.column(j + c, V * LANES).as_chunks_mut().0;
                    store_floats(sum, &mut column[v]);
                }
            }
        }
    };
}
pub(in crate::kernels) use columns;
