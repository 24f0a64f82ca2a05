//! Notices a text that has fallen into a loop.

/// Longest period looked for, tokens.
const LONGEST: usize = 64;
/// A loop is this many tokens of pure repetition, and at least [`ROUNDS`] rounds.
const TOKENS: usize = 256;
const ROUNDS: usize = 12;

/// Watches tokens go by. Constant work a token.
#[derive(Default)]
pub(crate) struct Repetition {
    recent: std::collections::VecDeque<u32>,
    /// For each period, how many of the last tokens equal the one a period before.
    matched: Vec<usize>,
}

impl Repetition {
    /// Takes a token; true if the text is looping.
    pub(crate) fn push(&mut self, token: u32) -> bool {
        self.matched.resize(LONGEST, 0);
        let mut looping = false;
        for (i, matched) in self.matched.iter_mut().enumerate() {
            let before = self.recent.len().checked_sub(i + 1).and_then(|at| self.recent.get(at));
            *matched = if before == Some(&token) { *matched + 1 } else { 0 };
            looping |= *matched >= TOKENS.max((i + 1) * ROUNDS);
        }
        if self.recent.len() == LONGEST {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
        looping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_loops_of_any_period_and_nothing_else() {
        for period in [1, 2, 7, 64] {
            let mut r = Repetition::default();
            let at = (0..5000).position(|i| r.push(i % period)).unwrap() as u32;
            assert!(at >= TOKENS as u32 && at < 64 * 14, "period {period} noticed at {at}");
        }
        let mut r = Repetition::default();
        assert!(!(0..5000u32).any(|i| r.push(i % 65)));
        let mut r = Repetition::default();
        assert!(!(0..200).any(|_| r.push(5)));
    }
}
