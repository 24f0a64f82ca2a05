//! From logits to a token.

use crate::TokenSet;
use ds4_model::{BEST_TOKENS, Best, Detail};
use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

/// How tokens are chosen. The default is that of the model's authors, with `min_p` cutting off the tail.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest.
    pub temperature: f32,
    /// Keeps the `top_k` most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most probable tokens that together reach this probability.
    pub top_p: f32,
    /// Keeps tokens with at least this fraction of the best one's probability.
    pub min_p: f32,
    /// Divides positive (multiplies negative) logits of tokens seen before; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens generated before.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for every time it was generated.
    pub frequency_penalty: f32,
    /// Added to logits, by token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed; the same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.05,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// The most probable token every time.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Which tokens may come at some point.
#[derive(Clone, Copy, Default)]
pub struct Bounds<'a> {
    /// Only these; all if `None`. There must be one.
    pub allowed: Option<&'a TokenSet>,
    /// And none of these.
    pub banned: &'a [u32],
}

/// Samples tokens; holds the random state and what was generated.
pub struct Sampler {
    options: Sampling,
    greedy: bool,
    random: ChaCha8Rng,
    /// How often each token was generated, for the penalties.
    counts: HashMap<u32, u32>,
    /// Candidates: weight (at first its logit) and token; reused from token to token.
    candidates: Vec<(f32, u32)>,
    /// Adjusted logits, reused from token to token.
    logits: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of a text.
    pub fn new(options: Sampling) -> Self {
        Sampler {
            random: ChaCha8Rng::seed_from_u64(options.seed),
            options,
            greedy: false,
            counts: HashMap::new(),
            candidates: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// Whether to take the most probable token from now on, whatever the temperature.
    pub fn set_greedy(&mut self, greedy: bool) {
        self.greedy = greedy;
    }

    fn takes_best(&self) -> bool {
        self.greedy || self.options.temperature <= 0.0
    }

    /// Which logits a choice needs, as a rule: then [`Sampler::sample_best`] may do.
    pub fn detail(&self) -> Detail {
        let o = &self.options;
        let few = self.takes_best() || (1..=BEST_TOKENS).contains(&o.top_k) || o.min_p > 0.0;
        if few && o.logit_bias.is_empty() && !o.has_penalties() { Detail::Best } else { Detail::All }
    }

    /// Chooses a token and counts it as generated. `logits` has a value per token of the vocabulary.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        self.sample_within(logits, Bounds::default())
    }

    /// The same among the tokens that may come.
    pub fn sample_within(&mut self, logits: &[f32], bounds: Bounds<'_>) -> u32 {
        let token = self.choose(logits, bounds);
        if self.options.has_penalties() {
            *self.counts.entry(token).or_default() += 1;
        }
        token
    }

    /// Chooses the same token from the best ones, unless others have to be considered.
    pub fn sample_best(&mut self, best: &Best, banned: &[u32]) -> Option<u32> {
        let may_come = |(token, _): &&(u32, f32)| !banned.contains(token);
        let (&(token, largest), &(_, smallest)) = (best.tokens.iter().find(may_come)?, best.tokens.last()?);
        if self.detail() == Detail::All {
            return None;
        }
        if self.takes_best() {
            return Some(token);
        }
        let (least, top_k) = (self.least(largest), self.options.top_k);
        if smallest >= least && !(1..=best.tokens.len()).contains(&top_k) {
            return None;
        }
        self.candidates.clear();
        let kept = best.tokens.iter().filter(may_come).filter(|(_, logit)| *logit >= least);
        self.candidates.extend(kept.map(|&(token, logit)| (logit, token)));
        // Of those that are left there may be fewer than top-k keeps.
        if self.candidates.len() < top_k.min(best.tokens.len()) && smallest >= least {
            return None;
        }
        Some(self.draw(token))
    }

    fn choose(&mut self, logits: &[f32], Bounds { allowed, banned }: Bounds<'_>) -> u32 {
        self.adjust(logits);
        for &token in banned {
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(allowed) = allowed {
            // The vocabulary of the model may be padded beyond that of the tokenizer.
            allowed.iter_unset_entries(|token| {
                if let Some(logit) = self.logits.get_mut(token) {
                    *logit = f32::NEG_INFINITY;
                }
            });
        }
        let best = argmax(&self.logits);
        // Logits without a largest: of what is allowed any will do.
        let best = match allowed {
            Some(allowed) if !allowed.get(best as usize) => allowed.first_bit_set().unwrap_or(0) as u32,
            _ => best,
        };
        if self.takes_best() || self.logits.get(best as usize).is_none_or(|&l| l == f32::NEG_INFINITY) {
            return best;
        }
        // min-p is a threshold on logits; it thins out the vocabulary before anything is sorted.
        let least = self.logits.get(best as usize).map_or(f32::NEG_INFINITY, |&largest| self.least(largest));
        self.candidates.clear();
        let kept = self.logits.iter().enumerate().filter(|(_, logit)| **logit >= least);
        self.candidates.extend(kept.map(|(token, &logit)| (logit, token as u32)));
        self.draw(best)
    }

    /// The least logit that min-p keeps.
    fn least(&self, largest: f32) -> f32 {
        largest + self.options.min_p.max(0.0).ln() * self.options.temperature
    }

    /// Draws from the candidates, whose weights are yet their logits; `best` if there is none.
    fn draw(&mut self, best: u32) -> u32 {
        self.weigh_candidates();
        let total: f32 = self.candidates.iter().map(|(p, _)| p).sum();
        let mut left = self.random.random::<f32>() * total;
        for &(p, token) in &self.candidates {
            left -= p;
            if left < 0.0 {
                return token;
            }
        }
        // Rounding left a crumb: the least likely candidate owns it.
        self.candidates.last().map_or(best, |c| c.1)
    }

    /// Logits after bias and penalties.
    fn adjust(&mut self, logits: &[f32]) {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for &(token, bias) in &self.options.logit_bias {
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let o = &self.options;
        for (&token, &count) in &self.counts {
            let Some(logit) = self.logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / o.repetition_penalty } else { *logit * o.repetition_penalty };
            *logit -= o.presence_penalty + o.frequency_penalty * count as f32;
        }
    }

    /// Keeps those of the candidates that top-k and top-p keep, best first, and makes their logits probabilities
    /// relative to the best.
    fn weigh_candidates(&mut self) {
        let o = &self.options;
        let by_logit = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if o.top_k > 0 && o.top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(o.top_k - 1, by_logit);
            self.candidates.truncate(o.top_k);
        }
        self.candidates.sort_unstable_by(by_logit);
        let largest = self.candidates.first().map_or(0.0, |c| c.0);
        self.candidates.iter_mut().for_each(|c| c.0 = ((c.0 - largest) / o.temperature).exp());
        if o.top_p < 1.0 {
            let total: f32 = self.candidates.iter().map(|(p, _)| p).sum();
            let mut sum = 0.0;
            let reached = self.candidates.iter().position(|(p, _)| {
                sum += p;
                sum >= o.top_p * total
            });
            self.candidates.truncate(reached.map_or(self.candidates.len(), |i| i + 1));
        }
    }
}

/// The token with the largest logit, the lowest id of equals.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// A token's log-probability under the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// Log-probabilities of `token` and of the `top` most probable tokens, before any sampling option.
pub fn log_probabilities(logits: &[f32], token: u32, top: usize) -> (Logprob, Vec<Logprob>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let log_sum = max + sum.ln() as f32;
    let of = |token: u32| Logprob {
        token,
        logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |l| l - log_sum),
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(ids.len());
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 && top < ids.len() {
        ids.select_nth_unstable_by(top - 1, by_logit);
    }
    ids.truncate(top);
    ids.sort_unstable_by(by_logit);
    (of(token), ids.into_iter().map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(options: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options);
        (0..n).map(|_| sampler.sample(logits)).collect()
    }

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(draw(Sampling::greedy(), &LOGITS, 3), [1, 1, 1]);
    }

    #[test]
    fn greedy_for_a_while() {
        let mut sampler = Sampler::new(Sampling { seed: 1, ..Sampling::default() });
        let logits = [1.0, 1.2, 1.1];
        sampler.set_greedy(true);
        assert_eq!(sampler.detail(), Detail::Best);
        assert!((0..50).all(|_| sampler.sample(&logits) == 1));
        sampler.set_greedy(false);
        assert!((0..50).any(|_| sampler.sample(&logits) != 1));
    }

    #[test]
    fn only_what_is_allowed() {
        let mut allowed = TokenSet::alloc(5);
        [2, 4].iter().for_each(|&t| allowed.allow_token(t));
        let seen = |options: Sampling, logits: &[f32]| {
            let mut sampler = Sampler::new(options);
            let mut seen: Vec<u32> = (0..500)
                .map(|_| sampler.sample_within(logits, Bounds { allowed: Some(&allowed), banned: &[] }))
                .collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(seen(Sampling::greedy(), &LOGITS), [2]);
        assert_eq!(seen(Sampling { min_p: 0.0, ..Sampling::default() }, &LOGITS), [2, 4]);
        assert_eq!(seen(Sampling::default(), &[f32::NAN; 5]), [2]);
        assert_eq!(seen(Sampling::default(), &[f32::NEG_INFINITY; 5]), [2]);
    }

    #[test]
    fn same_seed_same_tokens() {
        let with = |seed| draw(Sampling { seed, ..Default::default() }, &LOGITS, 200);
        assert_eq!(with(7), with(7));
        assert_ne!(with(7), with(8));
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let options = Sampling { min_p: 0.0, temperature: 1.5, ..Default::default() };
        let n = 40_000;
        let tokens = draw(options, &LOGITS, n);
        let weights: Vec<f32> = LOGITS.iter().map(|l| (l / 1.5).exp()).collect();
        let total: f32 = weights.iter().sum();
        for (t, w) in weights.iter().enumerate() {
            let got = tokens.iter().filter(|&&x| x as usize == t).count() as f32 / n as f32;
            assert!((got - w / total).abs() < 0.01, "token {t}: {got} vs {}", w / total);
        }
    }

    #[test]
    fn cuts() {
        let seen = |options: Sampling| {
            let mut seen = draw(options, &LOGITS, 2000);
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        let all = Sampling { min_p: 0.0, ..Default::default() };
        assert_eq!(seen(all.clone()), [0, 1, 2, 3, 4]);
        assert_eq!(seen(Sampling { top_k: 3, ..all.clone() }), [1, 2, 3]);
        assert_eq!(seen(Sampling { top_k: 1, ..all.clone() }), [1]);
        assert_eq!(seen(Sampling { min_p: 0.3, ..all.clone() }), [1, 2, 3]);
        assert_eq!(seen(Sampling { min_p: 0.9, ..all.clone() }), [1, 3]);
        assert_eq!(seen(Sampling { top_p: 0.5, ..all.clone() }), [1, 3]);
        assert_eq!(seen(Sampling { top_p: 0.0, ..all }), [1]);
    }

    #[test]
    fn the_best_are_enough_or_not_used() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let usual = Sampling::default();
        let cases = [
            Sampling::greedy(),
            usual.clone(),
            Sampling { min_p: 0.0, top_k: 40, ..usual.clone() },
            Sampling { min_p: 0.02, top_p: 0.8, temperature: 0.7, ..usual.clone() },
            Sampling { min_p: 0.0, top_p: 0.9, ..usual.clone() },
            Sampling { presence_penalty: 1.0, ..usual },
        ];
        // From peaked to so flat that min-p keeps more than come back.
        for spread in [300.0f32, 80.0, 0.5] {
            let logits: Vec<f32> = (0..1000).map(|_| spread * random.random::<f32>()).collect();
            let all: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, &l)| (i as u32, l)).collect();
            let mut best = Best::new(all);
            best.tokens.truncate(BEST_TOKENS);
            for options in &cases {
                let (mut one, mut other) = (Sampler::new(options.clone()), Sampler::new(options.clone()));
                let mut used = 0;
                for _ in 0..50 {
                    let token = one.sample(&logits);
                    let from_best = other.sample_best(&best, &[]);
                    used += usize::from(from_best.is_some());
                    assert_eq!(from_best.unwrap_or_else(|| other.sample(&logits)), token, "{options:?}");
                }
                let needs_all = options.detail_is_all() || (spread < 1.0 && options.keeps_many());
                assert_eq!(used, if needs_all { 0 } else { 50 }, "{options:?} at {spread}");
            }
        }
    }

    impl Sampling {
        fn detail_is_all(&self) -> bool {
            Sampler::new(self.clone()).detail() == Detail::All
        }

        /// Whether only min-p cuts, and so nothing where all tokens are about as probable.
        fn keeps_many(&self) -> bool {
            self.temperature > 0.0 && self.top_k == 0
        }
    }

    #[test]
    fn what_is_banned_never_comes() {
        let banned = [1, 3];
        let best = Best::new(LOGITS.iter().enumerate().map(|(i, &l)| (i as u32, l)).collect());
        for options in [Sampling::greedy(), Sampling::default(), Sampling { top_k: 2, ..Sampling::default() }]
        {
            let (mut one, mut other) = (Sampler::new(options.clone()), Sampler::new(options));
            for _ in 0..200 {
                let token = one.sample_within(&LOGITS, Bounds { banned: &banned, ..Bounds::default() });
                assert!(!banned.contains(&token));
                if let Some(from_best) = other.sample_best(&best, &banned) {
                    assert_eq!(from_best, token);
                }
            }
        }
        assert_eq!(Sampler::new(Sampling::greedy()).sample_best(&best, &[0, 1, 2, 3, 4]), None);
    }

    #[test]
    fn bias_and_penalties() {
        let greedy = Sampling::greedy();
        assert_eq!(
            draw(Sampling { logit_bias: vec![(4, 10.0), (99, 1.0)], ..greedy.clone() }, &LOGITS, 1),
            [4]
        );
        assert_eq!(draw(Sampling { presence_penalty: 1.5, ..greedy.clone() }, &LOGITS, 3), [1, 3, 2]);
        assert_eq!(draw(Sampling { frequency_penalty: 0.6, ..greedy.clone() }, &LOGITS, 5), [1, 3, 1, 3, 2]);
        assert_eq!(draw(Sampling { repetition_penalty: 2.0, ..greedy }, &LOGITS, 3), [1, 3, 2]);
    }

    #[test]
    fn logprobs_sum_to_one() {
        let (chosen, top) = log_probabilities(&LOGITS, 2, 5);
        assert_eq!(top.iter().map(|t| t.token).collect::<Vec<_>>(), [1, 3, 2, 0, 4]);
        assert_eq!(chosen, top[2]);
        let sum: f32 = top.iter().map(|t| t.logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5);
    }

    #[test]
    fn survives_odd_logits() {
        for logits in [vec![f32::NEG_INFINITY; 3], vec![f32::NAN; 3], vec![f32::INFINITY, 0.0, 1.0]] {
            assert!(draw(Sampling::default(), &logits, 10).iter().all(|&t| t < 3));
        }
    }
}
