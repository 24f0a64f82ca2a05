//! The loop of the thread that computes.

use super::answer::{Answer, Step};
use super::pool::{Place, Pool};
use super::{Counts, Failure, Job, Limits, Message, Queued, Timings, Update};
use crate::{Chooser, Engine, Error, Script, Work};
use ds4_model::Backend;
use ds4_text::{Prompt, Tokenizer};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// Room that an answer's channel must have for a step.
const ROOM: usize = 2;
/// Time after which an answer that nobody takes is given up.
const STALLED: Duration = Duration::from_secs(60);
/// A chunk of a prompt is this much smaller while answers are decoded, so that they do not wait long.
const SHARE: usize = 8;
/// Time that answers get after a chunk of a prompt, as a part of the time that the chunk took.
const FOR_ANSWERS: f64 = 0.5;
/// Tokens of a prompt that another request is computing, for which it is worth to wait.
const WORTH_WAITING: usize = 128;
/// Most tokens of a pass that decodes answers.
const CLOSING: usize = 2;

/// Computes what a scheduler is given.
pub struct Worker {
    messages: mpsc::Receiver<Message>,
    counts: Arc<Counts>,
    limits: Limits,
    script: Option<Script>,
}

/// A request that has a session.
struct Running {
    slot: usize,
    updates: Sender<Update>,
    state: State,
    timings: Timings,
    since: Instant,
    /// Since when nobody takes what comes.
    blocked: Option<Instant>,
}

enum State {
    Prefill {
        job: Box<Job>,
        reused: usize,
    },
    Decode(Box<Answer>),
    /// The client has everything; the session lacks these tokens.
    Closing {
        tokens: Vec<u32>,
        notes: Vec<u8>,
    },
}

impl State {
    fn nothing_left() -> Self {
        State::Closing { tokens: Vec::new(), notes: Vec::new() }
    }
}

impl Worker {
    pub(super) fn new(
        messages: mpsc::Receiver<Message>,
        counts: Arc<Counts>,
        limits: Limits,
        script: Option<Script>,
    ) -> Self {
        Worker { messages, counts, limits, script }
    }

    /// Computes until the scheduler is shut down or gone. `ready` is called when the sessions are there.
    ///
    /// # Errors
    /// There is no memory for the sessions.
    pub fn run<B: Backend>(
        self,
        engine: &mut Engine<B>,
        tokenizer: &Tokenizer,
        ready: impl FnOnce(),
    ) -> Result<(), Error> {
        let pool = Pool::new(engine, self.limits.sessions(), self.limits.context)?;
        ready();
        let mut running = Loop {
            worker: self,
            engine,
            tokenizer,
            pool,
            queue: VecDeque::new(),
            running: Vec::new(),
            turn: 0,
            answers_first: Instant::now(),
            stop: None,
        };
        while running.turn() {}
        running.checkpoint();
        Ok(())
    }
}

struct Loop<'a, B: Backend> {
    worker: Worker,
    engine: &'a mut Engine<B>,
    tokenizer: &'a Tokenizer,
    pool: Pool<B>,
    queue: VecDeque<Queued>,
    running: Vec<Running>,
    /// Whose prompt is next.
    turn: usize,
    /// Until when prompts wait for the answers that are decoded.
    answers_first: Instant,
    stop: Option<Instant>,
}

impl<B: Backend> Loop<'_, B> {
    /// One round; false at the end.
    fn turn(&mut self) -> bool {
        let alive = self.receive();
        if let Some(stop) = self.stop {
            for waiting in self.queue.drain(..) {
                let _ = waiting.updates.try_send(Update::Failed(Failure::ShuttingDown));
            }
            if self.running.is_empty() || Instant::now() >= stop {
                self.count();
                return false;
            }
        } else if !alive && self.running.is_empty() && self.queue.is_empty() {
            return false;
        }
        self.drop_the_gone();
        self.admit();
        self.decode();
        self.prefill();
        self.count();
        true
    }

    fn count(&self) {
        let counts = &self.worker.counts;
        counts.running.store(self.running.len(), Ordering::Relaxed);
        let tokens = self.pool.slots.iter().map(|s| s.session.tokens().len()).sum();
        counts.tokens.store(tokens, Ordering::Relaxed);
    }

    /// Takes what has come; waits where there is nothing to do. False when nobody can send any more.
    fn receive(&mut self) -> bool {
        loop {
            let message = if !self.has_work() && self.stop.is_none() {
                self.worker.messages.recv().map_err(|_| mpsc::TryRecvError::Disconnected)
            } else if self.running.iter().all(|r| r.blocked.is_some()) && self.stop.is_none() {
                // All wait for their readers.
                self.worker.messages.recv_timeout(Duration::from_millis(2)).map_err(|e| match e {
                    mpsc::RecvTimeoutError::Timeout => mpsc::TryRecvError::Empty,
                    mpsc::RecvTimeoutError::Disconnected => mpsc::TryRecvError::Disconnected,
                })
            } else {
                self.worker.messages.try_recv()
            };
            match message {
                Ok(Message::Job(job)) => self.queue.push_back(*job),
                Ok(Message::Stop(at)) => self.stop = Some(self.stop.map_or(at, |s| s.min(at))),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.queue.is_empty()
    }

    /// Lets go of requests whose clients have gone.
    fn drop_the_gone(&mut self) {
        let counts = Arc::clone(&self.worker.counts);
        let before = self.queue.len();
        self.queue.retain(|q| !q.updates.is_closed());
        counts.queued.fetch_sub(before - self.queue.len(), Ordering::Relaxed);
        for i in (0..self.running.len()).rev() {
            let r = &mut self.running[i];
            if matches!(r.state, State::Closing { .. }) {
                continue;
            }
            let is_blocked = matches!(r.state, State::Decode(_)) && r.updates.capacity() < ROOM;
            r.blocked = is_blocked.then(|| r.blocked.unwrap_or_else(Instant::now));
            if r.updates.is_closed() {
                self.release(i);
            } else if r.blocked.is_some_and(|since| since.elapsed() > STALLED) {
                self.fail(i, Failure::Stalled);
            }
        }
    }

    /// Ends a request; its session stays where it is.
    fn release(&mut self, i: usize) {
        let r = self.running.remove(i);
        self.pool.give_back(r.slot);
    }

    fn fail(&mut self, i: usize, failure: Failure) {
        let _ = self.running[i].updates.try_send(Update::Failed(failure));
        self.release(i);
    }

    /// Gives sessions to those that wait, the longest waiting first; one that has to wait does not hold up the next.
    fn admit(&mut self) {
        let mut i = 0;
        while self.running.len() < self.worker.limits.parallel && i < self.queue.len() {
            self.follow_samples(i);
            let tokens = &self.queue[i].job.tokens;
            let place = self.pool.place(tokens);
            match place.filter(|place| !self.is_being_computed(tokens, place)) {
                Some(place) => {
                    if let Some(queued) = self.queue.remove(i) {
                        self.worker.counts.queued.fetch_sub(1, Ordering::Relaxed);
                        self.start(queued, place);
                    }
                }
                None => i += 1,
            }
        }
    }

    /// Cuts a prompt's text into the tokens that a session already has for its beginning.
    fn follow_samples(&mut self, i: usize) {
        let job = &mut self.queue[i].job;
        for slot in self.pool.slots.iter().filter(|s| !s.busy) {
            let session = &slot.session;
            if session.common(&job.tokens) < session.tokens().len()
                && let Some(tokens) = job.prompt.to_tokens_after(session.tokens(), self.tokenizer)
                && tokens.len() <= session.context()
            {
                job.tokens = tokens;
                return;
            }
        }
    }

    /// Whether another request is computing the beginning of this prompt just now.
    fn is_being_computed(&self, tokens: &[u32], place: &Place) -> bool {
        let have = match *place {
            Place::Own(slot) => self.pool.slots[slot].session.usable(tokens),
            Place::Copy { len, .. } => len,
        };
        self.running.iter().any(|r| match &r.state {
            State::Prefill { job, .. } => {
                let common = job.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
                common >= have + WORTH_WAITING
            }
            _ => false,
        })
    }

    fn start(&mut self, queued: Queued, place: Place) {
        let Queued { job, updates, since } = queued;
        let prepared = self.pool.take(self.engine, place).and_then(|slot| {
            let session = &mut self.pool.slots[slot].session;
            session.keep_at(Prompt::forks(&job.tokens, self.tokenizer));
            Ok((slot, self.engine.prepare(session, &job.tokens)?))
        });
        match prepared {
            Ok((slot, synced)) => {
                let reused = job.tokens.len() - synced.computed;
                let _ = updates.try_send(Update::Started(synced));
                let timings = Timings { queued: since.elapsed(), ..Timings::default() };
                let state = State::Prefill { job: Box::new(job), reused };
                let running = Running { slot, updates, state, timings, since: Instant::now(), blocked: None };
                self.running.push(running);
                // All there already: nothing to wait for.
                self.begin_if_ready(self.running.len() - 1);
            }
            Err(e) => {
                let (Place::Own(slot) | Place::Copy { to: slot, .. }) = place;
                self.pool.slots[slot].session.clear();
                self.pool.give_back(slot);
                let _ = updates.try_send(Update::Failed(Failure::Engine(e.to_string())));
            }
        }
    }

    /// Computes a chunk of a prompt, of one request after the other.
    fn prefill(&mut self) {
        let is_prefill = |r: &Running| matches!(r.state, State::Prefill { .. });
        let waiting: Vec<usize> =
            self.running.iter().enumerate().filter(|(_, r)| is_prefill(r)).map(|(i, _)| i).collect();
        let Some(&i) = waiting.iter().find(|&&i| i >= self.turn).or(waiting.first()) else { return };
        let decodes = self.running.iter().any(|r| matches!(r.state, State::Decode(_)) && r.blocked.is_none());
        let begun = Instant::now();
        if decodes && begun < self.answers_first {
            return;
        }
        self.turn = i + 1;
        let most = self.engine.max_rows();
        let rows = if decodes { (most / SHARE).max(1) } else { most };
        let r = &mut self.running[i];
        let State::Prefill { job, reused } = &r.state else { return };
        let (reused, total) = (*reused, job.tokens.len());
        let session = &mut self.pool.slots[r.slot].session;
        if let Err(e) = self.engine.advance(session, &job.tokens, rows) {
            session.clear();
            self.fail(i, Failure::Engine(e.to_string()));
            return;
        }
        self.answers_first = Instant::now() + begun.elapsed().mul_f64(FOR_ANSWERS);
        if r.updates.capacity() > ROOM {
            let done = session.tokens().len() - reused;
            let _ = r.updates.try_send(Update::Prefill { done, total: total - reused });
        }
        self.begin_if_ready(i);
    }

    /// Lets a request whose prompt is computed choose its first token.
    fn begin_if_ready(&mut self, i: usize) {
        let r = &mut self.running[i];
        let session = &self.pool.slots[r.slot].session;
        if !matches!(&r.state, State::Prefill { job, .. } if session.tokens().len() == job.tokens.len()) {
            return;
        }
        let State::Prefill { job, .. } = std::mem::replace(&mut r.state, State::nothing_left()) else {
            return;
        };
        let chooser = match &self.worker.script {
            Some(script) => {
                let answer = script.answer(&job.prompt.to_text(), job.parser.start, self.tokenizer);
                Chooser::Script(answer)
            }
            None => Answer::sampler(&job),
        };
        r.timings.prefill = r.since.elapsed();
        r.since = Instant::now();
        r.state = State::Decode(Box::new(Answer::new(chooser, *job, self.tokenizer)));
        self.choose(i);
    }

    /// Decodes a token of every answer in one pass; sessions whose turn is over get its last tokens in the same.
    fn decode(&mut self) {
        let mut tokens: Vec<(usize, usize, Vec<u32>)> = Vec::new();
        let mut rows = 0;
        for i in (0..self.running.len()).rev() {
            let r = &mut self.running[i];
            let session = &mut self.pool.slots[r.slot].session;
            let more = match &mut r.state {
                State::Decode(_) if r.updates.capacity() < ROOM => continue,
                State::Decode(answer) => match answer.pending(session) {
                    Ok(token) => token.into_iter().collect(),
                    Err(failure) => {
                        let _ = r.updates.try_send(Update::Failed(failure));
                        r.state = State::nothing_left();
                        Vec::new()
                    }
                },
                State::Closing { tokens, .. } => {
                    tokens.truncate(session.room());
                    tokens.clone()
                }
                State::Prefill { .. } => continue,
            };
            rows += more.len();
            tokens.push((i, r.slot, more));
            if rows + CLOSING > self.engine.max_rows() {
                break;
            }
        }
        if tokens.is_empty() {
            return;
        }
        if let Err(e) = self.pass(&tokens) {
            let failure = Failure::Engine(e.to_string());
            for (i, slot, _) in tokens {
                self.pool.slots[slot].session.clear();
                self.fail(i, failure.clone());
            }
            return;
        }
        // From the last to the first, so that those that end do not move the others.
        for (i, ..) in tokens {
            match self.running[i].state {
                State::Closing { .. } => self.close(i),
                _ => self.choose(i),
            }
        }
    }

    fn pass(&mut self, tokens: &[(usize, usize, Vec<u32>)]) -> Result<(), Error> {
        let of_slot = |slot: usize| tokens.iter().find(|(_, s, _)| *s == slot);
        let slots = self.pool.slots.iter_mut().enumerate();
        let mut work: Vec<Work<'_, B>> = slots
            .filter_map(|(i, slot)| {
                let (_, _, tokens) = of_slot(i)?;
                Some(Work { session: &mut slot.session, tokens })
            })
            .collect();
        self.engine.batch(&mut work)
    }

    /// Has an answer choose its next token, and tells the client.
    fn choose(&mut self, i: usize) {
        let r = &mut self.running[i];
        let session = &mut self.pool.slots[r.slot].session;
        let State::Decode(answer) = &mut r.state else { return };
        match answer.step(self.engine, session, self.tokenizer) {
            Ok(Step::More(update)) => {
                if let Some(update) = update {
                    let _ = r.updates.try_send(update);
                }
            }
            Ok(Step::Over(last, mut done)) => {
                r.timings.decode = r.since.elapsed();
                done.timings = r.timings;
                let tokens = answer.closing(done.finish, self.tokenizer.eos());
                let notes = answer.take_notes();
                let _ = r.updates.try_send(last);
                let _ = r.updates.try_send(Update::Done(done));
                r.state = State::Closing { tokens, notes };
            }
            Err(failure) => self.fail(i, failure),
        }
    }

    /// Keeps the place behind a turn, where the next request goes on.
    fn close(&mut self, i: usize) {
        let r = &mut self.running[i];
        let session = &mut self.pool.slots[r.slot].session;
        if let State::Closing { notes, .. } = &r.state {
            session.attach(notes);
        }
        if self.engine.keep(session).is_err() {
            session.clear();
        }
        self.release(i);
    }

    /// At the end: keeps what there is, in memory or on disk.
    fn checkpoint(&mut self) {
        for r in self.running.drain(..) {
            let _ = r.updates.try_send(Update::Failed(Failure::ShuttingDown));
            // A place in the middle of a prompt or of an answer.
            let _ = self.engine.keep(&mut self.pool.slots[r.slot].session);
        }
        for slot in &mut self.pool.slots {
            // What cannot be kept is computed again some day.
            let _ = self.engine.keep_last(&mut slot.session);
        }
        self.engine.disk().inspect(|disk| disk.store.flush());
    }
}
