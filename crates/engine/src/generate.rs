//! Sampling a text until something ends it.

use crate::repetition::Repetition;
use crate::stops::Stops;
use crate::{Engine, Error, Sampler, Session};
use ds4_model::{Backend, Detail};
use ds4_text::{Tokenizer, Utf8Stream};

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn.
    EndOfSentence,
    /// A stop string came; the text ends before it.
    Stop(String),
    /// The token limit.
    Length,
    /// The session is full.
    ContextFull,
    /// The text fell into a loop.
    Repetition,
}

/// What ends a text besides the model itself.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most tokens.
    pub max_tokens: usize,
    /// Strings that end the text.
    pub stop: Vec<String>,
}

/// What a step of a generation gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A token, and the text that is now certain (perhaps none: a part of a character, or of a stop string).
    Token {
        /// Its id.
        id: u32,
        /// Text to append.
        text: String,
    },
    /// The end, with the last text.
    End {
        /// Text that was held back.
        text: String,
        /// Why.
        finish: Finish,
    },
}

/// A text being sampled. Borrows nothing: several can take turns on one engine.
pub struct Generation {
    sampler: Sampler,
    limits: Limits,
    utf8: Utf8Stream,
    stops: Stops,
    repetition: Repetition,
    generated: usize,
    /// Sampled and handed out, but not yet part of the session.
    pending: Option<u32>,
}

impl Generation {
    /// A text that continues a session whose logits are those of its prompt.
    pub fn new(sampler: Sampler, limits: Limits) -> Self {
        Generation {
            sampler,
            stops: Stops::new(limits.stop.clone()),
            limits,
            utf8: Utf8Stream::default(),
            repetition: Repetition::default(),
            generated: 0,
            pending: None,
        }
    }

    /// Tokens sampled so far, the end marker included.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// The next token or the end. The token handed out last joins the session at the next call, so that a
    /// caller who stops has not computed in vain.
    pub fn next<B: Backend>(
        &mut self,
        engine: &mut Engine<B>,
        session: &mut Session<B>,
        tokenizer: &Tokenizer,
    ) -> Result<Event, Error> {
        session.set_detail(self.sampler.detail());
        if let Some(token) = self.pending.take() {
            engine.step(session, token)?;
        }
        if self.generated >= self.limits.max_tokens {
            return Ok(self.end(Finish::Length));
        }
        if session.room() == 0 {
            return Ok(self.end(Finish::ContextFull));
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
            return Ok(self.end(Finish::EndOfSentence));
        }
        self.pending = Some(id);
        let text = self.utf8.push(tokenizer.token_bytes(id));
        let (text, stop) = self.stops.push(&text);
        if let Some(stop) = stop {
            return Ok(Event::End { text, finish: Finish::Stop(stop) });
        }
        if self.repetition.push(id) {
            let held = self.stops.finish();
            return Ok(Event::End { text: text + &held, finish: Finish::Repetition });
        }
        Ok(Event::Token { id, text })
    }

    fn end(&mut self, finish: Finish) -> Event {
        let rest = self.utf8.finish();
        let (mut text, _) = self.stops.push(&rest);
        text.push_str(&self.stops.finish());
        Event::End { text, finish }
    }
}
