//! One answer on its way: choices, rules, pieces for the client.

use super::{Done, Failure, Job, OnBlock, Rules, TokenLogprobs, Update};
use crate::{
    Bounds, Chooser, Constraint, Engine, Event, Finish, Generation, Guide, Sampler, Session, TokenSet,
    log_probabilities,
};
use ds4_model::{Backend, Detail};
use ds4_text::{Delta, End, Marker, Parser, Phase, Tokenizer};
use std::collections::VecDeque;

/// An answer.
pub(super) struct Answer {
    generation: Generation,
    parser: Parser,
    rules: Rules,
    /// Tokens that come next without being chosen.
    forced: VecDeque<u32>,
    /// What bounds the next choice.
    allowed: Option<TokenSet>,
    /// Markers that have no meaning in the reasoning, and in the content.
    strays: (Vec<u32>, Vec<u32>),
    logprobs: Option<usize>,
    on_block: Option<OnBlock>,
    /// What belongs to the conversation on disk.
    notes: Vec<u8>,
    generated: usize,
    reasoning: usize,
}

/// What a step of an answer gave.
pub(super) enum Step {
    /// It goes on; there may be nothing new that is certain.
    More(Option<Update>),
    /// It is over: its last pieces, and how it ended.
    Over(Update, Done),
}

impl Answer {
    pub(super) fn new(chooser: Chooser, job: Job, tokenizer: &Tokenizer) -> Self {
        let Job { max_tokens, parser, rules, logprobs, on_block, .. } = job;
        // Where a marker means nothing it would reach the client as text.
        let but = |meant: &[Marker]| {
            let strays = Marker::ALL.into_iter().filter(|m| !meant.contains(m));
            strays.filter_map(|m| tokenizer.marker(m).ok()).collect()
        };
        let content: &[Marker] = match (job.raw, parser.tools) {
            (true, _) => &Marker::ALL,
            (_, true) => &[Marker::Eos, Marker::Dsml],
            (_, false) => &[Marker::Eos],
        };
        Answer {
            generation: Generation::by(chooser, max_tokens),
            parser: Parser::new(parser),
            rules,
            forced: VecDeque::new(),
            allowed: None,
            strays: (but(&[Marker::Eos, Marker::ThinkEnd]), but(content)),
            logprobs,
            on_block,
            notes: Vec::new(),
            generated: 0,
            reasoning: 0,
        }
    }

    /// What samples for a job, if nothing else chooses.
    pub(super) fn sampler(job: &Job) -> Chooser {
        Chooser::Sampler(Box::new(Sampler::new(job.sampling.clone())))
    }

    /// The token that the session lacks before the next choice, and what logits that needs.
    pub(super) fn pending<B: Backend>(&mut self, session: &mut Session<B>) -> Result<Option<u32>, Failure> {
        self.allowed = match self.rule() {
            Some(rule) => Some(rule.allowed().map_err(Failure::Grammar)?),
            None => None,
        };
        let detail = self.generation.detail(guide(&self.parser, self.allowed.as_ref(), &self.strays));
        session.set_detail(if self.logprobs.is_some() { Detail::All } else { detail });
        Ok(self.generation.take_pending())
    }

    /// The grammar that holds now.
    fn rule(&mut self) -> Option<&mut Constraint> {
        match self.parser.phase() {
            Phase::Reasoning => None,
            _ if self.rules.answer.is_some() => self.rules.answer.as_mut(),
            Phase::Calls => self.rules.calls.as_mut(),
            Phase::Content => None,
        }
    }

    /// Chooses the next token of a session that has all before.
    pub(super) fn step<B: Backend>(
        &mut self,
        engine: &mut Engine<B>,
        session: &mut Session<B>,
        tokenizer: &Tokenizer,
    ) -> Result<Step, Failure> {
        let failed = |e: crate::Error| Failure::Engine(e.to_string());
        let phase = self.parser.phase();
        if phase != Phase::Reasoning {
            self.forced.extend(self.rules.opening.drain(..));
        }
        let eos = tokenizer.eos();
        let mut event = match self.forced.pop_front() {
            Some(id) => self.generation.force(session, id, eos),
            None => {
                // At the first choice no mask is there yet.
                if self.allowed.is_none()
                    && let Some(rule) = self.rule()
                {
                    self.allowed = Some(rule.allowed().map_err(Failure::Grammar)?);
                }
                let guide = guide(&self.parser, self.allowed.as_ref(), &self.strays);
                self.generation.choose(engine, session, eos, guide).map_err(failed)?
            }
        };
        if phase == Phase::Reasoning
            && event == Event::End(Finish::EndOfSentence)
            && self.rules.oblige()
            && let Ok(end) = tokenizer.marker(Marker::ThinkEnd)
        {
            // The answer is still owed: the model has only thought enough.
            event = self.generation.replace(end);
        }
        match event {
            Event::Token(id) => {
                if let Some(rule) = self.rule() {
                    rule.take(id).map_err(Failure::Grammar)?;
                }
                self.token(id, phase, engine, session, tokenizer)
            }
            Event::End(finish) => Ok(self.end(finish)),
        }
    }

    fn token<B: Backend>(
        &mut self,
        id: u32,
        phase: Phase,
        engine: &mut Engine<B>,
        session: &mut Session<B>,
        tokenizer: &Tokenizer,
    ) -> Result<Step, Failure> {
        self.generated += 1;
        self.reasoning += usize::from(phase == Phase::Reasoning);
        let mut logprobs = Vec::new();
        if let Some(top) = self.logprobs.filter(|_| phase == Phase::Content) {
            engine.fetch_logits(session).map_err(|e| Failure::Engine(e.to_string()))?;
            let (chosen, top) = log_probabilities(session.logits(), id, top);
            logprobs.push(TokenLogprobs { chosen, top });
        }
        let deltas = self.parser.push_token(id, tokenizer);
        self.note_block();
        if self.parser.is_done() {
            return Ok(match self.end(Finish::EndOfSentence) {
                Step::Over(Update::Answer { deltas: last, generated, .. }, done) => {
                    let deltas = deltas.into_iter().chain(last).collect();
                    Step::Over(Update::Answer { deltas, logprobs, generated }, done)
                }
                other => other,
            });
        }
        if deltas.is_empty() && logprobs.is_empty() {
            return Ok(Step::More(None));
        }
        Ok(Step::More(Some(Update::Answer { deltas, logprobs, generated: self.generated })))
    }

    fn end(&mut self, finish: Finish) -> Step {
        let end = if finish == Finish::EndOfSentence { End::Turn } else { End::Cut };
        let is_inside_call = self.parser.phase() == Phase::Calls;
        let mut deltas = self.parser.finish(end);
        if is_inside_call {
            // The raw text of a call that was never whole is of no use to anybody.
            deltas.retain(|delta| !matches!(delta, Delta::Content(_)));
        }
        self.note_block();
        let done = Done {
            finish,
            stop: self.parser.stopped().map(str::to_owned),
            flaw: self.parser.flaw(),
            generated: self.generated,
            reasoning: self.reasoning,
            timings: super::Timings::default(),
        };
        Step::Over(Update::Answer { deltas, logprobs: Vec::new(), generated: self.generated }, done)
    }

    fn note_block(&mut self) {
        if let Some(block) = self.parser.block()
            && let Some(mut on_block) = self.on_block.take()
        {
            self.notes = on_block(block);
        }
    }

    /// What the session lacks of the turn that is over, with its end marker, where the conversation goes on behind it.
    pub(super) fn closing(&mut self, finish: Finish, eos: u32) -> Vec<u32> {
        if self.parser.stopped().is_some() {
            // What the client gets ends before the last tokens.
            return Vec::new();
        }
        let mut tokens: Vec<u32> = self.generation.take_pending().into_iter().collect();
        if finish == Finish::EndOfSentence && tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        tokens
    }

    /// What belongs to the conversation on disk.
    pub(super) fn take_notes(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.notes)
    }
}

/// What bounds the next choice.
fn guide<'a>(parser: &Parser, allowed: Option<&'a TokenSet>, strays: &'a (Vec<u32>, Vec<u32>)) -> Guide<'a> {
    let banned: &[u32] = match parser.phase() {
        Phase::Reasoning => &strays.0,
        Phase::Content => &strays.1,
        Phase::Calls => &[],
    };
    Guide { hint: parser.hint(), bounds: Bounds { allowed, banned } }
}
