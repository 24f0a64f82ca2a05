//! How well a model predicts a text, and how far another one's predictions are from it.

use std::collections::BTreeMap;

/// Logits as a distribution: what it takes to get probabilities from them.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    logits: &'a [f32],
    /// Logarithm of the sum of all exponentials.
    total: f64,
    /// The most probable token; of equal ones the lowest.
    pub best: usize,
}

impl<'a> Row<'a> {
    /// Logits of all tokens; one at least.
    pub fn new(logits: &'a [f32]) -> Self {
        let larger = |best: usize, (i, l): (usize, &f32)| if *l > logits[best] { i } else { best };
        let best = logits.iter().enumerate().fold(0, larger);
        let max = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        Row { logits, total: max + sum.ln(), best }
    }

    /// Natural logarithm of a token's probability.
    pub fn log_prob(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.total
    }

    /// Kullback-Leibler divergence of `other` from this one, in nats: what is lost by believing `other`.
    pub fn divergence(&self, other: &Row<'_>) -> f64 {
        let terms = self.logits.iter().zip(other.logits).map(|(&a, &b)| {
            let a = f64::from(a) - self.total;
            a.exp() * (a - (f64::from(b) - other.total))
        });
        // Rounding alone can make it negative.
        terms.sum::<f64>().max(0.0)
    }
}

/// Negative log-likelihood of tokens, in nats.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nll {
    /// Tokens.
    pub tokens: usize,
    sum: f64,
    squares: f64,
}

impl Nll {
    /// Adds a token by the logarithm of its probability.
    pub fn add(&mut self, log_prob: f64) {
        self.tokens += 1;
        self.sum -= log_prob;
        self.squares += log_prob * log_prob;
    }

    /// Mean per token.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens.max(1) as f64
    }

    /// Standard error of the mean.
    pub fn error(&self) -> f64 {
        let n = self.tokens.max(2) as f64;
        ((self.squares / n - self.mean() * self.mean()).max(0.0) / (n - 1.0)).sqrt()
    }

    /// Perplexity: how many equally likely tokens would be as hard to guess.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }
}

/// Two models on the same text.
#[derive(Clone, Debug, Default)]
pub struct Agreement {
    /// The model that is measured against.
    pub base: Nll,
    /// The other one.
    pub other: Nll,
    /// Positions whose most probable token is the same.
    pub same_best: usize,
    /// Divergence at each position.
    divergences: Vec<f64>,
    /// The first position, counted over the whole text, at which the most probable token is another: the position and both tokens.
    pub first_difference: Option<(usize, usize, usize)>,
}

impl Agreement {
    /// Adds a position that is followed by `next`.
    pub fn add(&mut self, base: &Row<'_>, other: &Row<'_>, next: usize) {
        self.base.add(base.log_prob(next));
        self.other.add(other.log_prob(next));
        if base.best == other.best {
            self.same_best += 1;
        } else if self.first_difference.is_none() {
            self.first_difference = Some((self.divergences.len(), base.best, other.best));
        }
        self.divergences.push(base.divergence(other));
    }

    /// Positions.
    pub fn positions(&self) -> usize {
        self.divergences.len()
    }

    /// Mean divergence in nats.
    pub fn mean_divergence(&self) -> f64 {
        self.divergences.iter().sum::<f64>() / self.divergences.len().max(1) as f64
    }

    /// The divergence that a share of the positions, 0 to 1, does not exceed.
    pub fn divergence_at(&self, share: f64) -> f64 {
        let mut sorted = self.divergences.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
        sorted.get(at).copied().unwrap_or(0.0)
    }
}

/// Errors of named intermediate results.
#[derive(Clone, Debug, Default)]
pub struct StepErrors {
    /// Sums of squares of the errors and of the values, by name.
    sums: BTreeMap<String, (f64, f64)>,
    order: Vec<String>,
}

impl StepErrors {
    /// Adds values of a step and what another model has instead.
    pub fn add(&mut self, name: &str, base: &[f32], other: &[f32]) {
        if !self.sums.contains_key(name) {
            self.order.push(name.into());
        }
        let (error, size) = self.sums.entry(name.into()).or_default();
        for (a, b) in base.iter().zip(other) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            *error += (a - b) * (a - b);
            *size += a * a;
        }
    }

    /// Names in the order of computation, each with the root mean square of the errors over that of the values.
    pub fn relative(&self) -> impl Iterator<Item = (&str, f64)> {
        self.order.iter().map(|name| {
            let (error, size) = self.sums.get(name).copied().unwrap_or_default();
            (name.as_str(), if error == 0.0 { 0.0 } else { (error / size.max(f64::MIN_POSITIVE)).sqrt() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln() + 3.0).collect();
        let row = Row::new(&logits);
        assert!((row.log_prob(1) - 0.25f64.ln()).abs() < 1e-6);
        assert_eq!(row.best, 0);
        assert_eq!(Row::new(&[1.0, 2.0, 2.0]).best, 1);
        assert_eq!(Row::new(&[f32::NEG_INFINITY, 1e30]).log_prob(1), 0.0);
    }

    #[test]
    fn divergence_of_known_distributions() {
        let ln = |p: [f32; 2]| p.map(f32::ln);
        let (a, b) = (ln([0.5, 0.5]), ln([0.9, 0.1]));
        let (a, b) = (Row::new(&a), Row::new(&b));
        let expected = 0.5 * (0.5f64 / 0.9).ln() + 0.5 * (0.5f64 / 0.1).ln();
        assert!((a.divergence(&b) - expected).abs() < 1e-6);
        assert_eq!(a.divergence(&a), 0.0);
    }

    #[test]
    fn agreement_counts_and_ranks() {
        let (a, b) = ([2.0, 1.0], [1.0, 2.0]);
        let (a, b) = (Row::new(&a), Row::new(&b));
        let mut agreement = Agreement::default();
        agreement.add(&a, &a, 0);
        agreement.add(&a, &b, 0);
        agreement.add(&b, &b, 1);
        assert_eq!((agreement.positions(), agreement.same_best), (3, 2));
        assert_eq!(agreement.first_difference, Some((1, 0, 1)));
        assert_eq!(agreement.divergence_at(0.5), 0.0);
        assert_eq!(agreement.divergence_at(1.0), a.divergence(&b));
        assert!(agreement.other.mean() > agreement.base.mean());
        assert!((agreement.base.perplexity() - (-a.log_prob(0)).exp()).abs() < 1e-9);
        assert!(agreement.base.error() < 1e-6, "all tokens are as likely");
    }

    #[test]
    fn errors_of_steps() {
        let mut errors = StepErrors::default();
        errors.add("z", &[3.0, 4.0], &[3.0, 4.0]);
        errors.add("a", &[3.0, 4.0], &[3.0, 4.5]);
        errors.add("z", &[0.0], &[1.0]);
        let all: Vec<_> = errors.relative().collect();
        assert_eq!(all, [("z", 0.2), ("a", 0.1)]);
    }
}
