//! One timeline of tokens with its cache.

use ds4_model::Backend;
use ds4_model::cache::Frontier;
use ds4_model::cache::Layout;
use std::sync::Arc;

/// A place to which a session can go back.
pub(crate) struct Kept {
    pub(crate) frontier: Frontier,
    /// Logits after the frontier's last token.
    pub(crate) logits: Vec<f32>,
}

impl Kept {
    fn size(&self) -> usize {
        self.frontier.size() + 4 * self.logits.len()
    }
}

/// One timeline. Only the engine moves it.
pub struct Session<B: Backend> {
    pub(crate) layout: Arc<Layout>,
    pub(crate) store: B::Store,
    pub(crate) tokens: Vec<u32>,
    /// Logits after the last token; empty at the start.
    pub(crate) logits: Vec<f32>,
    /// Ascending by length, each valid for `tokens[..len]`.
    pub(crate) kept: Vec<Kept>,
    /// Bytes that `kept` may take.
    pub(crate) keep_bytes: usize,
}

impl<B: Backend> Session<B> {
    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Logits for the next token; empty before the first.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Most tokens the session can hold.
    pub fn context(&self) -> usize {
        self.layout.context
    }

    /// Tokens that still fit.
    pub fn room(&self) -> usize {
        self.layout.context - self.tokens.len()
    }

    /// Bytes of the cache when full.
    pub fn cache_bytes(&self) -> u64 {
        self.layout.bytes()
    }

    /// Lengths to which the session can go back.
    pub fn kept(&self) -> impl Iterator<Item = usize> + '_ {
        self.kept.iter().map(|k| k.frontier.len)
    }

    /// The last kept place at or before `len`.
    pub(crate) fn kept_before(&self, len: usize) -> Option<usize> {
        self.kept.iter().rposition(|k| k.frontier.len <= len)
    }

    /// Adds a place, and drops old ones beyond the budget: the one whose loss costs least, that is whose
    /// neighbours are closest. The newest always stays.
    pub(crate) fn keep(&mut self, kept: Kept) {
        let len = kept.frontier.len;
        self.kept.retain(|k| k.frontier.len < len);
        self.kept.push(kept);
        while self.kept.len() > 1 && self.kept.iter().map(Kept::size).sum::<usize>() > self.keep_bytes {
            let gap = |i: usize| {
                let before = if i == 0 { 0 } else { self.kept[i - 1].frontier.len };
                self.kept[i + 1].frontier.len - before
            };
            let least = (0..self.kept.len() - 1).min_by_key(|&i| gap(i)).unwrap_or(0);
            self.kept.remove(least);
        }
    }
}
