//! The importance matrix: how large the inputs of each weight matrix are, column by column, on real text.
//!
//! An error in a column of a matrix costs as much as the square of what it is multiplied with. So for each matrix, and each expert of a
//! stack, the matrix holds the sum of the squares of its inputs, and over how many tokens it was taken.

mod collect;
mod file;

pub use collect::Collector;

use std::collections::BTreeMap;

/// Second moments of the inputs of a matrix, or of each of a stack of matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Sums of squares `[matrices, width]`.
    pub sums: Vec<f32>,
    /// Tokens of each matrix.
    pub counts: Vec<f32>,
}

/// Second moments by the name of the weight tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// Files of text they were taken over.
    pub datasets: Vec<String>,
    /// Sequences.
    pub chunks: u32,
    /// Most tokens of a sequence.
    pub chunk_size: u32,
    /// The moments.
    pub tensors: BTreeMap<String, Moments>,
}

/// Tokens that what is known of an expert beforehand weighs: an expert that was hit a few times is not judged by these alone.
const PRIOR_TOKENS: f64 = 4.0;

impl Moments {
    /// Values of a row.
    pub fn width(&self) -> usize {
        self.sums.len().checked_div(self.counts.len()).unwrap_or(0)
    }

    /// Matrices that no token met.
    pub fn never_hit(&self) -> impl Iterator<Item = usize> {
        self.counts.iter().enumerate().filter(|(_, n)| **n <= 0.0).map(|(i, _)| i)
    }

    /// The importance of each column of matrix `i`: the mean square of its inputs.
    ///
    /// Matrices of a stack that few tokens met lean on `prior`, and those that none met have nothing else.
    fn importances(&self, i: usize, prior: &[f64]) -> Vec<f32> {
        let width = self.width();
        let weight = if self.counts.len() > 1 { PRIOR_TOKENS } else { 0.0 };
        let count = f64::from(self.counts[i]) + weight;
        let sums = &self.sums[i * width..(i + 1) * width];
        let mean =
            |(s, p): (&f32, &f64)| ((f64::from(*s) + weight * p) / count.max(f64::MIN_POSITIVE)) as f32;
        sums.iter().zip(prior).map(mean).collect()
    }

    /// What is known of any matrix of the stack: the mean over all of them. Column by column only where the columns mean the
    /// same for all; each expert has its own hidden activations.
    fn prior(&self, shared_columns: bool) -> Vec<f64> {
        let width = self.width();
        let tokens = self.counts.iter().map(|&c| f64::from(c)).sum::<f64>().max(1.0);
        let mut prior = vec![0f64; width];
        for row in self.sums.chunks_exact(width.max(1)) {
            prior.iter_mut().zip(row).for_each(|(p, s)| *p += f64::from(*s) / tokens);
        }
        if !shared_columns {
            let mean = prior.iter().sum::<f64>() / width.max(1) as f64;
            prior.fill(mean);
        }
        prior
    }
}

/// Importances of one tensor's columns, for each of its matrices.
pub(crate) struct Importances<'a> {
    moments: &'a Moments,
    prior: Vec<f64>,
}

impl Importances<'_> {
    /// Those of matrix `i`.
    pub(crate) fn of(&self, i: usize) -> Vec<f32> {
        self.moments.importances(i, &self.prior)
    }

    /// Matrices, and values of a row.
    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.moments.counts.len(), self.moments.width())
    }
}

impl Imatrix {
    /// The importances of a weight tensor's columns, if there are any.
    pub(crate) fn importances(&self, tensor: &str) -> Option<Importances<'_>> {
        let moments = self.tensors.get(tensor).filter(|m| m.counts.iter().any(|&c| c > 0.0))?;
        let prior = moments.prior(!tensor.contains("ffn_down_exps"));
        Some(Importances { moments, prior })
    }

    /// Stacks of experts of which some were never hit: name, how many, of how many.
    pub fn never_hit(&self) -> impl Iterator<Item = (&str, usize, usize)> {
        self.tensors.iter().filter_map(|(name, m)| {
            let missed = m.never_hit().count();
            (missed > 0).then_some((name.as_str(), missed, m.counts.len()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(name: &str, sums: Vec<f32>, counts: Vec<f32>) -> Imatrix {
        Imatrix { tensors: [(name.to_owned(), Moments { sums, counts })].into(), ..Imatrix::default() }
    }

    #[test]
    fn means_of_a_single_matrix() {
        let m = matrix("a.weight", vec![8.0, 2.0], vec![4.0]);
        assert_eq!(m.importances("a.weight").unwrap().of(0), [2.0, 0.5]);
        assert!(m.importances("b.weight").is_none());
        assert!(matrix("a.weight", vec![0.0], vec![0.0]).importances("a.weight").is_none());
    }

    #[test]
    fn experts_never_hit_lean_on_the_others() {
        let sums = vec![4000.0, 1000.0, 0.0, 0.0];
        let gate = matrix("blk.0.ffn_gate_exps.weight", sums.clone(), vec![1000.0, 0.0]);
        let of = gate.importances("blk.0.ffn_gate_exps.weight").unwrap();
        assert_eq!(of.of(1), [4.0, 1.0], "the same inputs reach all experts");
        assert!((of.of(0)[0] - 4.0).abs() < 1e-6);
        let down = matrix("blk.0.ffn_down_exps.weight", sums, vec![1000.0, 0.0]);
        assert_eq!(down.importances("blk.0.ffn_down_exps.weight").unwrap().of(1), [2.5, 2.5]);
        assert_eq!(down.never_hit().collect::<Vec<_>>(), [("blk.0.ffn_down_exps.weight", 1, 2)]);
    }
}
