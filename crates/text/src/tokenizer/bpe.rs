//! Byte-pair merging of one pre-token.

use rustc_hash::FxHashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rank and result of a merge, by pair.
#[derive(Default)]
pub(crate) struct Merges(FxHashMap<(u32, u32), (u32, u32)>);

/// Longest piece that is rescanned for every merge; longer ones use a heap.
const SHORT: usize = 48;

impl Merges {
    pub(crate) fn with_capacity(n: usize) -> Self {
        Merges(FxHashMap::with_capacity_and_hasher(n, rustc_hash::FxBuildHasher))
    }

    /// Adds a merge; of equal pairs the first counts.
    pub(crate) fn add(&mut self, pair: (u32, u32), rank: u32, merged: u32) {
        self.0.entry(pair).or_insert((rank, merged));
    }

    /// Merges `symbols` until no adjacent pair is known: always the pair of lowest rank, leftmost of equals.
    pub(crate) fn apply(&self, symbols: &mut Vec<u32>) {
        if symbols.len() <= SHORT { self.apply_short(symbols) } else { self.apply_long(symbols) }
    }

    fn apply_short(&self, symbols: &mut Vec<u32>) {
        loop {
            let pairs = symbols.windows(2).enumerate();
            let known =
                pairs.filter_map(|(i, w)| self.0.get(&(w[0], w[1])).map(|&(rank, merged)| (rank, i, merged)));
            let Some((_, i, merged)) = known.min() else { return };
            symbols[i] = merged;
            symbols.remove(i + 1);
        }
    }

    /// A linked list and a heap of candidate pairs: O(n log n) for a page without a space.
    fn apply_long(&self, symbols: &mut Vec<u32>) {
        const END: usize = usize::MAX;
        let n = symbols.len();
        let mut next: Vec<usize> = (1..n).chain([END]).collect();
        let mut previous: Vec<usize> = std::iter::once(END).chain(0..n - 1).collect();
        let mut alive = vec![true; n];
        let mut heap = BinaryHeap::new();
        let candidate = |symbols: &[u32], left: usize, right: usize| {
            let pair = (symbols[left], symbols[right]);
            self.0.get(&pair).map(|&(rank, merged)| Reverse((rank, left, right, pair, merged)))
        };
        heap.extend((0..n - 1).filter_map(|i| candidate(symbols, i, i + 1)));
        while let Some(Reverse((_, left, right, pair, merged))) = heap.pop() {
            // Out of date: one side has been merged since.
            if !alive[left] || !alive[right] || next[left] != right || (symbols[left], symbols[right]) != pair
            {
                continue;
            }
            symbols[left] = merged;
            alive[right] = false;
            next[left] = next[right];
            if next[left] != END {
                previous[next[left]] = left;
                heap.extend(candidate(symbols, left, next[left]));
            }
            if previous[left] != END {
                heap.extend(candidate(symbols, previous[left], left));
            }
        }
        let mut alive = alive.iter();
        symbols.retain(|_| *alive.next().unwrap_or(&false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_ways_agree(
            merges in prop::collection::vec((0u32..12, 0u32..12), 0..40),
            symbols in prop::collection::vec(0u32..6, 2..200),
        ) {
            let mut m = Merges::default();
            for (i, pair) in merges.into_iter().enumerate() {
                m.add(pair, i as u32, 6 + i as u32 % 6);
            }
            let (mut short, mut long) = (symbols.clone(), symbols);
            m.apply_short(&mut short);
            m.apply_long(&mut long);
            prop_assert_eq!(short, long);
        }
    }
}
