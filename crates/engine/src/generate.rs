//! Sampling tokens until something ends them.

use crate::repetition::Repetition;
use crate::script::Scripted;
use crate::{Bounds, Engine, Error, Sampler, Session};
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

/// What bounds the choice of a token.
#[derive(Clone, Copy)]
pub struct Guide<'a> {
    /// What the text so far says.
    pub hint: Hint,
    /// Which tokens may come.
    pub bounds: Bounds<'a>,
}

impl From<Hint> for Guide<'_> {
    fn from(hint: Hint) -> Self {
        Guide { hint, bounds: Bounds::default() }
    }
}

/// What chooses the tokens.
pub enum Chooser {
    /// The model.
    Sampler(Box<Sampler>),
    /// A text that is known, for tests.
    Script(Scripted),
}

/// An answer being sampled. Borrows nothing: several can take turns on one engine.
pub struct Generation {
    chooser: Chooser,
    max_tokens: usize,
    repetition: Repetition,
    generated: usize,
    /// Sampled and handed out, but not yet part of the session.
    pending: Option<u32>,
}

impl Generation {
    /// An answer of at most so many tokens that continues a session whose logits are those of its prompt.
    pub fn new(sampler: Sampler, max_tokens: usize) -> Self {
        Generation::by(Chooser::Sampler(Box::new(sampler)), max_tokens)
    }

    /// The same, its tokens chosen by something else.
    pub fn by(chooser: Chooser, max_tokens: usize) -> Self {
        Generation { chooser, max_tokens, repetition: Repetition::default(), generated: 0, pending: None }
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
        session.set_detail(self.detail(hint.into()));
        if let Some(token) = self.take_pending() {
            engine.step(session, token)?;
        }
        let event = self.choose(engine, session, tokenizer.eos(), hint.into())?;
        if event == Event::End(Finish::EndOfSentence)
            && let Some(eos) = self.take_pending()
        {
            // Part of the conversation: the next turn continues behind it, and others may run before.
            session.set_detail(Detail::All);
            engine.step(session, eos)?;
        }
        Ok(event)
    }

    /// The token that the session lacks, for a caller who appends it: with many sessions' in one pass.
    pub fn take_pending(&mut self) -> Option<u32> {
        self.pending.take()
    }

    /// Which logits the next choice needs.
    pub fn detail(&mut self, guide: Guide<'_>) -> Detail {
        match &mut self.chooser {
            Chooser::Sampler(sampler) => {
                sampler.set_greedy(guide.hint == Hint::Syntax);
                if guide.bounds.allowed.is_some() { Detail::All } else { sampler.detail() }
            }
            Chooser::Script(_) => Detail::Best,
        }
    }

    /// The next token or the end, of a session that holds all tokens before. The token is then the pending one; so is the
    /// end marker.
    pub fn choose<B: Backend>(
        &mut self,
        engine: &mut Engine<B>,
        session: &mut Session<B>,
        eos: u32,
        guide: Guide<'_>,
    ) -> Result<Event, Error> {
        if let Some(end) = self.is_over(session) {
            return Ok(Event::End(end));
        }
        let id = match &mut self.chooser {
            Chooser::Script(script) => script.next(guide.bounds.allowed),
            Chooser::Sampler(sampler) => {
                sampler.set_greedy(guide.hint == Hint::Syntax);
                let best = session.best().filter(|_| guide.bounds.allowed.is_none());
                match best.and_then(|best| sampler.sample_best(best, guide.bounds.banned)) {
                    Some(id) => id,
                    None => {
                        engine.fetch_logits(session)?;
                        sampler.sample_within(session.logits(), guide.bounds)
                    }
                }
            }
        };
        Ok(self.take(id, eos))
    }

    /// Goes on with a token that is no choice.
    pub fn force<B: Backend>(&mut self, session: &Session<B>, id: u32, eos: u32) -> Event {
        if let Some(end) = self.is_over(session) {
            return Event::End(end);
        }
        if let Chooser::Script(script) = &mut self.chooser {
            script.pass(id);
        }
        self.take(id, eos)
    }

    /// Takes this token instead of the one chosen last.
    pub fn replace(&mut self, id: u32) -> Event {
        self.pending = Some(id);
        Event::Token(id)
    }

    fn is_over<B: Backend>(&self, session: &Session<B>) -> Option<Finish> {
        if self.generated >= self.max_tokens {
            Some(Finish::Length)
        } else if session.room() == 0 {
            Some(Finish::ContextFull)
        } else {
            None
        }
    }

    fn take(&mut self, id: u32, eos: u32) -> Event {
        self.generated += 1;
        self.pending = Some(id);
        if id == eos {
            Event::End(Finish::EndOfSentence)
        } else if self.repetition.push(id) {
            Event::End(Finish::Repetition)
        } else {
            Event::Token(id)
        }
    }
}
