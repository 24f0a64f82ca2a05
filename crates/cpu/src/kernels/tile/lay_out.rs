//! Lays formats out.

/// What lays out each format at a level, whose registers hold `$lanes` words. `PAIRED`: scales are in both halves of a word.
///
/// In scope must be, besides plain instructions on whole vectors:
/// * `words_of_rows(at)`: words 0 to 15 of all rows, `at` giving the 64 bytes of one;
/// * `words_of_halves(at)`: the same, of twice 32 bytes;
/// * `Q8_MIDDLE`: what makes weights of Q8_0 unsigned, 128, or 0 where they are multiplied as signed bytes.
macro_rules! lay_outs {
    ($features:literal, $lanes:literal, $vector:ty) => {
        /// Lays out all blocks of Q8_0, two blocks of each row at a time.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn lay_out_q8_0<const PLANES: usize>(
            packed: &mut Packed32<$lanes, PLANES>,
            rows: &[&[BlockQ8_0]; $lanes],
        ) {
            let behind = tile::bytes_of_rows(rows);
            let (middle, nibble) = (splat_bytes(Q8_MIDDLE), splat_bytes(15));
            for (pair, (q, d)) in packed.q.chunks_mut(2).zip(packed.d.chunks_mut(2)).enumerate() {
                let mut scales = [[[0; 2]; $lanes]; 2];
                let [low, high] = [2 * pair, 2 * pair + q.len() - 1];
                for r in 0..$lanes {
                    ask_second_cache(rows[r][low].d.as_ptr().wrapping_add(behind));
                    (scales[0][r], scales[1][r]) = (rows[r][low].d, rows[r][high].d);
                }
                let words = words_of_halves(|r| {
                    [bytemuck::cast_ref(&rows[r][low].q), bytemuck::cast_ref(&rows[r][high].q)]
                });
                for i in 0..2 {
                    // Not a loop over those that are there: words stay in registers.
                    let Some(Planes(q)) = q.get_mut(i) else { break };
                    for k in 0..8 {
                        let bytes = xor(words[8 * i + k], middle);
                        if PLANES == 1 {
                            store(bytes, &mut q[0][k]);
                        } else {
                            store(and(right_16::<4>(bytes), nibble), &mut q[0][k]);
                            store(and(bytes, nibble), &mut q[1][k]);
                        }
                    }
                }
                for (d, scales) in d.iter_mut().zip(&scales) {
                    *d = halves(scales);
                }
            }
        }

        /// Lays out all blocks of Q2_K, quants times scales.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn lay_out_q2_k(packed: &mut Packed<$lanes>, rows: &[&[BlockQ2K]; $lanes]) {
            for b in 0..rows[0].len() {
                let blocks = tile::blocks(rows, b);
                let (nibble, three) = (splat_bytes(15), splat_bytes(3));
                // The scales are a block's first 16 bytes.
                let scales = words_of_rows(|r| {
                    bytemuck::bytes_of(blocks[r]).as_chunks().0.first().unwrap_or(&[0; 64])
                });
                let mut by_sub_block = [zero(); 16];
                for i in 0..4 {
                    let minima = and(right_16::<4>(scales[i]), nibble);
                    store(shuffle(minima, &tile::PAIRS[0]), &mut packed.minima[b][2 * i]);
                    store(shuffle(minima, &tile::PAIRS[1]), &mut packed.minima[b][2 * i + 1]);
                    let scales = and(scales[i], nibble);
                    for k in 0..4 {
                        by_sub_block[4 * i + k] = shuffle(scales, &tile::BOTH_HALVES[k]);
                    }
                }
                let words = words_of_rows(|r| &blocks[r].q);
                for t in 0..16 {
                    let (half, column, mut bits) = (t / 8, t % 8, words[t]);
                    for plane in 0..4 {
                        // At most 3 * 15: no byte of two reaches into the other.
                        let scaled =
                            multiply_16(and(bits, three), by_sub_block[8 * half + 2 * plane + column / 4]);
                        bits = right_16::<2>(bits);
                        store(scaled, &mut packed.q[b].0[4 * half + plane][column]);
                    }
                }
                let (mut d, mut dmin) = ([[0; 2]; $lanes], [[0; 2]; $lanes]);
                for r in 0..$lanes {
                    (d[r], dmin[r]) = (blocks[r].d, blocks[r].dmin);
                }
                (packed.d[b], packed.dmin[b]) = (halves(&d), halves(&dmin));
            }
        }

        /// Lays out all blocks of Q4_K.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn lay_out_q4_k<const PAIRED: bool>(
            packed: &mut Packed<$lanes>,
            rows: &[&[BlockQ4K]; $lanes],
        ) {
            for b in 0..rows[0].len() {
                let blocks = tile::blocks(rows, b);
                let nibble = splat_bytes(15);
                for half in 0..2 {
                    let words = words_of_rows(|r| &blocks[r].q.as_chunks().0[half]);
                    for t in 0..16 {
                        let (pair, column) = (2 * half + t / 8, t % 8);
                        store(and(words[t], nibble), &mut packed.q[b].0[2 * pair][column]);
                        store(and(right_16::<4>(words[t]), nibble), &mut packed.q[b].0[2 * pair + 1][column]);
                    }
                }
                let (mut d, mut dmin) = ([[0; 2]; $lanes], [[0; 2]; $lanes]);
                let mut groups = [[[0; 32]; 2]; $lanes];
                for r in 0..$lanes {
                    let (scales, minima) = tile::scales_mins(&blocks[r].scales);
                    let scales = if PAIRED { q4_k::twice(scales) } else { q4_k::words(scales) };
                    groups[r] = [bytemuck::cast(scales), bytemuck::cast(q4_k::twice(minima))];
                    (d[r], dmin[r]) = (blocks[r].d, blocks[r].dmin);
                }
                let words = words_of_halves(|r| [&groups[r][0], &groups[r][1]]);
                for g in 0..8 {
                    store(words[g], &mut packed.scales[b][g]);
                    store(words[8 + g], &mut packed.minima[b][g]);
                }
                (packed.d[b], packed.dmin[b]) = (halves(&d), halves(&dmin));
            }
        }

        /// Lays out all blocks of IQ2_XXS: magnitudes are looked up row by row and turned to columns, which get their signs.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn lay_out_iq2_xxs<const PAIRED: bool>(
            packed: &mut Packed<$lanes>,
            rows: &[&[BlockIq2Xxs]; $lanes],
        ) {
            for b in 0..rows[0].len() {
                let blocks = tile::blocks(rows, b);
                let words = words_of(&blocks);
                lay_out_groups::<PAIRED>(packed, b, &blocks, &words);
                let mut magnitudes = [[[0; 32]; 8]; $lanes];
                for r in 0..$lanes {
                    for g in 0..8 {
                        magnitudes[r][g] = bytemuck::cast(iq2_xxs::magnitudes(blocks[r].groups[g]));
                    }
                }
                let middle = splat_bytes(IQ2_MIDDLE);
                let bits = [splat(0x0804_0201), splat(0x0804_0201 << 4)];
                for part in 0..4 {
                    let columns =
                        words_of_halves(|r| [&magnitudes[r][2 * part], &magnitudes[r][2 * part + 1]]);
                    for half in 0..2 {
                        let g = 2 * part + half;
                        let signs = signs_of(words[2 * g + 1]);
                        let q = &mut packed.q[b].0[g];
                        for v in 0..4 {
                            let signs = shuffle(signs, &tile::EVERYWHERE[v]);
                            let [low, high] = [columns[8 * half + 2 * v], columns[8 * half + 2 * v + 1]];
                            store(add_bytes(middle, negative(low, signs, bits[0])), &mut q[2 * v]);
                            store(add_bytes(middle, negative(high, signs, bits[1])), &mut q[2 * v + 1]);
                        }
                    }
                }
            }
        }

        /// The eight sign bits of each of a group's four codes, a byte each, from seven.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn signs_of(sevens: $vector) -> $vector {
            let low = or(and(sevens, splat(0x7f)), and(left_32::<1>(sevens), splat(0x7f00)));
            let high = and(left_32::<2>(sevens), splat(0x7f_0000));
            let high = or(high, and(left_32::<3>(sevens), splat(0x7f00_0000)));
            let bits = or(low, high);
            let fours = and(xor(bits, right_16::<4>(bits)), splat_bytes(15));
            or(bits, look_up(&tile::PARITY, fours))
        }

        /// Codes and signs of each group of each row of IQ2_XXS.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn words_of(blocks: &[&BlockIq2Xxs; $lanes]) -> [$vector; 16] {
            words_of_rows(|r| bytemuck::cast_ref(&blocks[r].groups))
        }

        /// `2 s + 1` of a group of each row.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn scales_of(signs: $vector) -> $vector {
            // The bit below a scale becomes the one.
            or(right_32::<27>(signs), splat(1))
        }

        /// Scales of each row's groups, whose codes and signs `words` has side by side; and, where sums of products are in pairs, what the
        /// quants' offset adds in each of 32 of them, for either half of these.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn lay_out_groups<const PAIRED: bool>(
            packed: &mut Packed<$lanes>,
            b: usize,
            blocks: &[&BlockIq2Xxs; $lanes],
            words: &[$vector; 16],
        ) {
            const { assert!(IQ2_MIDDLE == 1 << 6) };
            for g in 0..8 {
                let scales = scales_of(words[2 * g + 1]);
                let twice = or(scales, left_32::<16>(scales));
                store(if PAIRED { twice } else { scales }, &mut packed.scales[b][g]);
                if PAIRED {
                    store(left_32::<6>(twice), &mut packed.minima[b][g]);
                }
            }
            let mut d = [[0; 2]; $lanes];
            for r in 0..$lanes {
                d[r] = blocks[r].d;
            }
            packed.d[b] = halves(&d);
        }
    };
}
pub(in crate::kernels) use lay_outs;
