//! Logits of a pass, whole or only the best.

/// Tokens that come back of a row where only the best are asked for.
pub const BEST_TOKENS: usize = 64;

/// How the logits of a pass come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// Every token's.
    #[default]
    All,
    /// Only those of the best tokens, where the backend finds them faster than it can hand over all.
    Best,
}

/// The most probable tokens of a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Best {
    /// Tokens with their logits, the largest first; of equal ones the lowest token.
    pub tokens: Vec<(u32, f32)>,
}

impl Best {
    /// From tokens in any order.
    pub fn new(mut tokens: Vec<(u32, f32)>) -> Self {
        tokens.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Best { tokens }
    }
}

/// Logits of the wanted rows of a pass, in order: [`Logits::values`] or [`Logits::best`].
#[derive(Debug, Default)]
pub struct Logits {
    /// What is asked for.
    pub detail: Detail,
    /// Every token's, row-major, `vocab` values each; empty where only the best came back.
    pub values: Vec<f32>,
    /// The best of each row, or empty.
    pub best: Vec<Best>,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl Logits {
    /// Logits of the `i`th wanted row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocab..(i + 1) * self.vocab]
    }

    /// Number of rows with all their logits.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.vocab).unwrap_or(0)
    }
}
