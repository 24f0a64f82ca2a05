//! Sampling tokens until something ends them.

use crate::repetition::Repetition;
use crate::{Engine, Error, Sampler, Session};
use ds4_model::{Backend, Detail};
use ds4_text::{Hint, Tokenizer};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn.
    EndOfSentence,
    /// The token limit.
    Length,
    /// The session is full.
    ContextFull,
    /// The text fell into a loop.
    Repetition,
}

/// What a step of a generation gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A token.
    Token(u32),
    /// The end.
    End(Finish),
}

/// An answer being sampled. Borrows nothing: several can take turns on one engine.
pub struct Generation {
    sampler: Sampler,
    max_tokens: usize,
    repetition: Repetition,
    generated: usize,
    /// Sampled and handed out, but not yet part of the session.
    pending: Option<u32>,
}

impl Generation {
    /// An answer of at most so many tokens that continues a session whose logits are those of its prompt.
    pub fn new(sampler: Sampler, max_tokens: usize) -> Self {
        Generation { sampler, max_tokens, repetition: Repetition::default(), generated: 0, pending: None }
    }

    /// Tokens sampled so far, the end marker included.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// The next token or the end. The token handed out last joins the session at the next call, so that a
    /// caller who stops has not computed in vain. In syntax the most probable token is taken.
    pub fn next<B: Backend>(
        &mut self,
        engine: &mut Engine<B>,
        session: &mut Session<B>,
        tokenizer: &Tokenizer,
        hint: Hint,
    ) -> Result<Event, Error> {
        self.sampler.set_greedy(hint == Hint::Syntax);
        session.set_detail(self.sampler.detail());
        if let Some(token) = self.pending.take() {
            engine.step(session, token)?;
        }
        if self.generated >= self.max_tokens {
            return Ok(Event::End(Finish::Length));
        }
        if session.room() == 0 {
            return Ok(Event::End(Finish::ContextFull));
        }
        let id = match session.best().and_then(|best| self.sampler.sample_best(best)) {
            Some(id) => id,
            None => {
                engine.fetch_logits(session)?;
                self.sampler.sample(session.logits())
            }
        };
        self.generated += 1;
        if id == tokenizer.eos() {
            // Part of the conversation: the next turn continues behind it, and others may run before.
            session.set_detail(Detail::All);
            engine.step(session, id)?;
            return Ok(Event::End(Finish::EndOfSentence));
        }
        self.pending = Some(id);
        if self.repetition.push(id) {
            return Ok(Event::End(Finish::Repetition));
        }
        Ok(Event::Token(id))
    }
}
