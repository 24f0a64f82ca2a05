//! Many requests on one engine.
//!
//! One thread computes: [`Worker::run`] is its loop. Requests come as [`Job`]s through a [`Scheduler`], and each is answered
//! by [`Update`]s in a channel of its own; whoever drops the channel's end has cancelled the request, wherever it is. In turn
//! the loop decodes a token of every answer in one pass, and computes one chunk of one prompt: a long prompt holds up
//! running answers for no more than that.
//!
//! Sessions are made at the start, so the memory they take never changes. A request goes on from the session that has most of
//! its prompt, or from a copy of it ([`pool`] says when), or from what is on disk.

mod answer;
mod pool;
mod worker;

pub use worker::Worker;

use crate::{Constraint, Finish, Logprob, Sampling, Script, Synced};
use ds4_text::{Block, Delta, Flaw, ParserOptions, Prompt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc as std_mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Updates that wait for a slow reader before its answer pauses.
const UPDATES: usize = 64;

/// What is asked for.
pub struct Job {
    /// The prompt.
    pub prompt: Prompt,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Whether the prompt is text as it is, in which markers may come as they like.
    pub raw: bool,
    /// How the answer is read.
    pub parser: ParserOptions,
    /// What the answer must be.
    pub rules: Rules,
    /// How many alternatives to each token of the content are wanted, with the logarithms of their probabilities.
    pub logprobs: Option<usize>,
    /// Told every block of tool calls as it was sampled; what it returns is kept on disk with the conversation.
    pub on_block: Option<OnBlock>,
}

/// See [`Job::on_block`].
pub type OnBlock = Box<dyn FnMut(&Block) -> Vec<u8> + Send>;

/// What an answer must be.
#[derive(Default)]
pub struct Rules {
    /// From behind the reasoning on.
    pub answer: Option<Constraint>,
    /// From behind the tag that opens a block of tool calls on.
    pub calls: Option<Constraint>,
    /// Tokens that begin the answer, behind the reasoning.
    pub opening: Vec<u32>,
}

impl Rules {
    /// Whether something must come behind the reasoning.
    fn oblige(&self) -> bool {
        self.answer.is_some() || !self.opening.is_empty()
    }
}

/// What becomes of a job.
#[derive(Debug)]
pub enum Update {
    /// It has a session, which holds this much of its prompt.
    Started(Synced),
    /// Tokens of the prompt that are computed, of those that have to be.
    Prefill {
        /// Done.
        done: usize,
        /// To do.
        total: usize,
    },
    /// More of the answer.
    Answer {
        /// Pieces that are certain.
        deltas: Vec<Delta>,
        /// Of the tokens of the content among them, where wanted.
        logprobs: Vec<TokenLogprobs>,
        /// Tokens of the answer so far.
        generated: usize,
    },
    /// The end. Nothing follows.
    Done(Done),
    /// The end, by a fault. Nothing follows.
    Failed(Failure),
}

/// Probabilities at one token.
#[derive(Clone, Debug)]
pub struct TokenLogprobs {
    /// The token that was chosen.
    pub chosen: Logprob,
    /// The most probable ones.
    pub top: Vec<Logprob>,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub struct Done {
    /// What ended it.
    pub finish: Finish,
    /// The stop string that did.
    pub stop: Option<String>,
    /// What is odd about the answer.
    pub flaw: Option<Flaw>,
    /// Tokens of the answer, the end marker not counted.
    pub generated: usize,
    /// Of them, tokens of the reasoning.
    pub reasoning: usize,
    /// How long it took.
    pub timings: Timings,
}

/// How long a request took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Until it had a session.
    pub queued: Duration,
    /// Until its prompt was computed.
    pub prefill: Duration,
    /// Until the answer was whole.
    pub decode: Duration,
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The engine.
    #[error("{0}")]
    Engine(String),
    /// The answer could not follow its grammar.
    #[error("the answer cannot follow its grammar: {0}")]
    Grammar(String),
    /// Nobody took the answer for too long.
    #[error("the client takes nothing")]
    Stalled,
    /// The program ends.
    #[error("shutting down")]
    ShuttingDown,
}

/// Why a job is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait.
    #[error("{0} requests wait already")]
    QueueFull(usize),
    /// The program ends.
    #[error("shutting down")]
    ShuttingDown,
}

/// How much is done at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that are computed at once.
    pub parallel: usize,
    /// Requests that may wait.
    pub queue: usize,
    /// Tokens of a session.
    pub context: usize,
}

impl Limits {
    /// Sessions that are kept in memory: one for each of the requests that run, and two more, which small requests use, so
    /// that a title or a probe never costs a long conversation its state.
    pub fn sessions(&self) -> usize {
        self.parallel + pool::RESERVED
    }
}

/// Hands jobs to the thread that computes.
#[derive(Clone)]
pub struct Scheduler {
    messages: std_mpsc::Sender<Message>,
    counts: Arc<Counts>,
    limits: Limits,
}

/// What is going on.
#[derive(Debug, Default)]
struct Counts {
    queued: AtomicUsize,
    running: AtomicUsize,
    /// Tokens that the sessions hold.
    tokens: AtomicUsize,
}

enum Message {
    Job(Box<Queued>),
    /// No more comes; what runs may go on until then.
    Stop(Instant),
}

/// A job that waits.
struct Queued {
    job: Job,
    updates: mpsc::Sender<Update>,
    since: Instant,
}

impl Scheduler {
    /// A scheduler and the worker that does what it is given, in some thread. With a script the worker computes, but the
    /// answers are the script's.
    pub fn new(limits: Limits, script: Option<Script>) -> (Scheduler, Worker) {
        let (messages, receiver) = std_mpsc::channel();
        let counts = Arc::new(Counts::default());
        let worker = Worker::new(receiver, Arc::clone(&counts), limits, script);
        (Scheduler { messages, counts, limits }, worker)
    }

    /// Hands over a job.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn submit(&self, job: Job) -> Result<mpsc::Receiver<Update>, Refused> {
        let most = self.limits.queue + self.limits.parallel.saturating_sub(self.running());
        let room = |queued: usize| (queued < most).then_some(queued + 1);
        let counted = self.counts.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room);
        counted.map_err(Refused::QueueFull)?;
        let (updates, receiver) = mpsc::channel(UPDATES);
        let queued = Box::new(Queued { job, updates, since: Instant::now() });
        self.messages.send(Message::Job(queued)).map_err(|_| {
            self.counts.queued.fetch_sub(1, Ordering::Relaxed);
            Refused::ShuttingDown
        })?;
        Ok(receiver)
    }

    /// Lets what runs go on for so long, and then ends the worker, which keeps what there is.
    pub fn shut_down(&self, grace: Duration) {
        // It may have ended already.
        let _ = self.messages.send(Message::Stop(Instant::now() + grace));
    }

    /// Requests that wait.
    pub fn queued(&self) -> usize {
        self.counts.queued.load(Ordering::Relaxed)
    }

    /// Requests that are computed.
    pub fn running(&self) -> usize {
        self.counts.running.load(Ordering::Relaxed)
    }

    /// Tokens whose state is in memory.
    pub fn live_tokens(&self) -> usize {
        self.counts.tokens.load(Ordering::Relaxed)
    }

    /// How much is done at once.
    pub fn limits(&self) -> Limits {
        self.limits
    }
}
