//! One timeline of tokens with its cache.

use ds4_model::cache::Frontier;
use ds4_model::cache::Layout;
use ds4_model::{Backend, Best, Detail, Logits};
use std::sync::Arc;

/// A place to which a session can go back.
#[derive(Clone)]
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
    /// Logits after the last token; empty at the start, and where only the best came back.
    pub(crate) logits: Vec<f32>,
    /// What steps bring back.
    pub(crate) detail: Detail,
    /// The best tokens, where only those came back.
    pub(crate) best: Option<Best>,
    /// The engine's pass and the row of it that has the logits.
    pub(crate) computed: (u64, usize),
    /// Ascending by length, each valid for `tokens[..len]`.
    pub(crate) kept: Vec<Kept>,
    /// Lengths at which to keep a place, on the way to a prompt.
    pub(crate) places: Vec<usize>,
    /// Lengths at which blocks on disk end that hold these tokens' state.
    pub(crate) saved: Vec<usize>,
    /// What goes to disk with the next block.
    pub(crate) notes: Vec<u8>,
    /// Bytes that `kept` may take.
    pub(crate) keep_bytes: usize,
}

impl<B: Backend> Session<B> {
    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Logits for the next token; empty before the first, and where only the best came back: then
    /// [`Engine::fetch_logits`](crate::Engine::fetch_logits) gets the others.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The best tokens, where only those came back.
    pub fn best(&self) -> Option<&Best> {
        self.best.as_ref()
    }

    /// What steps bring back from now on. Prompts bring all.
    pub fn set_detail(&mut self, detail: Detail) {
        self.detail = detail;
    }

    /// Takes the logits of a row of the engine's pass `number`.
    pub(crate) fn take_logits(&mut self, logits: &mut Logits, row: usize, number: u64) {
        self.logits.clear();
        self.best = logits.best.get_mut(row).map(std::mem::take);
        if self.best.is_none() {
            self.logits.extend_from_slice(logits.row(row));
        }
        self.computed = (number, row);
    }

    /// Takes all logits, of which it had the best.
    pub(crate) fn take_all(&mut self, logits: &[f32]) {
        self.best = None;
        self.logits.extend_from_slice(logits);
    }

    /// Forgets the logits: tokens have changed.
    pub(crate) fn clear_logits(&mut self) {
        self.logits.clear();
        self.best = None;
    }

    /// Has the next block on disk carry these bytes: what belongs to the tokens since the last one, as the sampled text of
    /// tool calls. Whoever opens the store finds them in the blocks ([`ds4_kvstore::Section::Notes`]).
    pub fn attach(&mut self, notes: &[u8]) {
        self.notes.extend_from_slice(notes);
    }

    /// Has places kept at these lengths of the next prompt, besides its end: where other prompts are likely to go another
    /// way ([`ds4_text::Prompt::forks`]).
    pub fn keep_at(&mut self, places: Vec<usize>) {
        self.places = places;
    }

    /// Goes back to the start.
    pub(crate) fn clear(&mut self) {
        self.kept.clear();
        self.saved.clear();
        self.notes.clear();
        self.tokens.clear();
        self.clear_logits();
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

    /// Tokens that it has in common with a prompt.
    pub fn common(&self, prompt: &[u32]) -> usize {
        self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count()
    }

    /// Tokens from which it would go on to a prompt: all it has, or those before a kept place.
    pub fn usable(&self, prompt: &[u32]) -> usize {
        let common = self.common(prompt);
        if common == self.tokens.len() {
            return common;
        }
        self.kept_before(common).map_or(0, |i| self.kept[i].frontier.len)
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
