//! The loaded model, and everything that moves a session.

use crate::Session;
use crate::disk::Disk;
use crate::session::Kept;
use ds4_gguf::Gguf;
use ds4_kvstore::Missing;
use ds4_model::cache::{Frontier, KvFormat, Layout, Snapshot, export_all, import_all};
use ds4_model::{Backend, BackendError, Detail, Logits, Model, NoTap, Pass, Run, Shape, Tap, Want};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Why the engine could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model or a pass.
    #[error(transparent)]
    Model(#[from] ds4_model::Error),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Nothing to compute from.
    #[error("a prompt needs at least one token")]
    EmptyPrompt,
    /// The prompt does not fit.
    #[error("the prompt has {tokens} tokens, the context holds {context}: raise --ctx or shorten the prompt")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens the session holds.
        context: usize,
    },
    /// The caller's progress function said stop. The session keeps what was computed.
    #[error("cancelled")]
    Cancelled,
    /// A snapshot of another model or context.
    #[error("the snapshot is of {tokens} tokens, the session holds {context}")]
    Snapshot {
        /// Tokens in the snapshot.
        tokens: usize,
        /// Tokens the session holds.
        context: usize,
    },
}

/// What the engine is to keep ready.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// How KV rows are rounded and stored.
    pub kv: KvFormat,
    /// Most rows of a pass: the size of a prefill chunk.
    pub max_rows: usize,
    /// Tokens between the places a session can go back to, within a long prompt.
    pub keep_every: usize,
    /// Bytes a session may use for such places.
    pub keep_bytes: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions { kv: KvFormat::Packed, max_rows: 256, keep_every: 2048, keep_bytes: 256 << 20 }
    }
}

/// Progress of a prefill: tokens done, tokens to do.
pub type Progress<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

/// Where the state after a prompt's tokens came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// Tokens that the session held, and went on from.
    pub live: usize,
    /// Tokens to which it went back, at a place kept in memory.
    pub kept: usize,
    /// Tokens beyond those that were loaded from disk.
    pub disk: usize,
    /// Tokens computed.
    pub computed: usize,
    /// The first token at which the prompt is another one than the session's, if it had to go back.
    pub differs_at: Option<usize>,
    /// Why there was not more on disk; none where nothing is kept there.
    pub missing: Option<Missing>,
}

impl Synced {
    /// Tokens that were not computed.
    pub fn reused(&self) -> usize {
        self.live + self.kept + self.disk
    }
}

/// One session's part of a batch.
pub struct Work<'a, B: Backend> {
    /// The session, which grows by `tokens`.
    pub session: &'a mut Session<B>,
    /// Tokens to append.
    pub tokens: &'a [u32],
}

/// A loaded model on a backend.
pub struct Engine<B: Backend> {
    pub(crate) backend: B,
    model: Model<B>,
    pass: Pass<B>,
    options: EngineOptions,
    logits: Logits,
    /// Passes so far.
    passes: u64,
    pub(crate) disk: Option<Disk>,
}

impl<B: Backend> Engine<B> {
    /// Loads the model of `file` (and the draft block of `mtp`) onto `backend`.
    pub fn load(backend: B, file: &Gguf, mtp: Option<&Gguf>, options: EngineOptions) -> Result<Self, Error> {
        Self::load_with(backend, file, mtp, options, &mut |_| {})
    }

    /// The same; `progress` is told the bytes of every matrix that the backend has taken.
    pub fn load_with(
        mut backend: B,
        file: &Gguf,
        mtp: Option<&Gguf>,
        options: EngineOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, Error> {
        let model = Model::load_with(&mut backend, file, mtp, progress)?;
        let pass = Pass::new(&mut backend, &model.shape, options.max_rows)?;
        Ok(Engine { backend, model, pass, options, logits: Logits::default(), passes: 0, disk: None })
    }

    /// Dimensions of the model.
    pub fn shape(&self) -> &Shape {
        &self.model.shape
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, to ask it something.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Whether the model has a draft block.
    pub fn has_draft(&self) -> bool {
        self.model.weights.mtp.is_some()
    }

    /// Most rows of a pass.
    pub fn max_rows(&self) -> usize {
        self.options.max_rows
    }

    /// The layout of a session of `context` tokens.
    pub fn layout(&self, context: usize) -> Layout {
        Layout::new(&self.model.shape, self.options.kv, self.has_draft(), context, self.options.max_rows)
    }

    /// An empty session of up to `context` tokens.
    pub fn session(&mut self, context: usize) -> Result<Session<B>, Error> {
        let layout = Arc::new(self.layout(context));
        Ok(Session {
            store: self.backend.store(&layout)?,
            layout,
            tokens: Vec::with_capacity(context),
            logits: Vec::new(),
            detail: Detail::All,
            best: None,
            computed: (0, 0),
            kept: Vec::new(),
            places: Vec::new(),
            saved: Vec::new(),
            notes: Vec::new(),
            keep_bytes: self.options.keep_bytes,
        })
    }

    /// Brings the session to exactly `prompt`, computing as little as possible, and keeps the place.
    ///
    /// `progress` is called before every chunk with (done, total) of the tokens to compute; if it breaks, the
    /// session stays where it is and [`Error::Cancelled`] is returned.
    pub fn sync(
        &mut self,
        session: &mut Session<B>,
        prompt: &[u32],
        progress: &mut Progress<'_>,
    ) -> Result<Synced, Error> {
        let synced = self.prepare(session, prompt)?;
        let reused = session.tokens.len();
        let total = prompt.len() - reused;
        while session.tokens.len() < prompt.len() {
            if progress(session.tokens.len() - reused, total).is_break() {
                return Err(Error::Cancelled);
            }
            self.advance(session, prompt, self.options.max_rows)?;
        }
        let _ = progress(total, total);
        Ok(synced)
    }

    /// The first half of [`Engine::sync`]: brings the session to as much of `prompt` as needs no computing. Until
    /// [`Engine::advance`] has computed the rest, the session is on its way.
    pub fn prepare(&mut self, session: &mut Session<B>, prompt: &[u32]) -> Result<Synced, Error> {
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let context = session.context();
        if prompt.len() > context {
            return Err(Error::PromptTooLong { tokens: prompt.len(), context });
        }
        let common = session.common(prompt);
        let mut synced = Synced::default();
        if common < session.tokens.len() {
            synced.differs_at = Some(common).filter(|&at| at < prompt.len());
            synced.kept = self.rewind(session, common)?;
        } else {
            synced.live = common;
        }
        (synced.disk, synced.missing) = self.load_saved(session, prompt)?;
        if session.tokens.len() == prompt.len() && !self.has_logits(session) {
            // A place inside an earlier prompt, kept without logits: they need one token to be computed again.
            (synced.live, synced.disk) = (0, 0);
            synced.kept = self.rewind(session, prompt.len() - 1)?;
        }
        synced.computed = prompt.len() - session.tokens.len();
        Ok(synced)
    }

    /// Computes one chunk of what the session lacks of `prompt`, of no more than `rows` tokens.
    pub fn advance(&mut self, session: &mut Session<B>, prompt: &[u32], rows: usize) -> Result<(), Error> {
        let done = session.tokens.len();
        // Chunks end where places are kept.
        let every = self.options.keep_every.max(1);
        let rows = rows.clamp(1, self.options.max_rows);
        let place = session.places.iter().copied().filter(|&place| place > done).min();
        let end = (done + rows).min(done / every * every + every).min(prompt.len());
        let end = end.min(place.unwrap_or(end));
        let keeps = end.is_multiple_of(every) || end == prompt.len() || Some(end) == place;
        // A kept place has its logits, so that a prompt that ends there needs no token computed again.
        let want = if keeps { Want::Last } else { Want::Nothing };
        self.extend(session, &prompt[done..end], want, Detail::All)?;
        if keeps {
            self.keep(session)?;
        }
        Ok(())
    }

    /// Makes `to` a copy of the first tokens of `from`, as many as a place is kept for that is not behind `len`; returns how
    /// many.
    pub fn fork(&mut self, from: &Session<B>, to: &mut Session<B>, len: usize) -> Result<usize, Error> {
        to.clear();
        let Some(kept) = from.kept_before(len).map(|i| &from.kept[i]) else { return Ok(0) };
        let len = kept.frontier.len;
        let mut rows = Vec::new();
        export_all(&mut self.backend, &from.store, from.layout.grown(0, len), &mut rows)?;
        import_all(&mut self.backend, &mut to.store, &to.layout, to.layout.grown(0, len), &rows)?;
        kept.frontier.put(&mut self.backend, &mut to.store, &to.layout)?;
        to.tokens.extend_from_slice(&from.tokens[..len]);
        to.logits.clone_from(&kept.logits);
        to.saved.extend(from.saved.iter().take_while(|&&end| end <= len));
        to.keep(kept.clone());
        Ok(len)
    }

    /// Appends a token and computes the logits for the next.
    pub fn step(&mut self, session: &mut Session<B>, token: u32) -> Result<(), Error> {
        let detail = session.detail;
        self.extend(session, &[token], Want::Last, detail)
    }

    fn extend(
        &mut self,
        session: &mut Session<B>,
        tokens: &[u32],
        want: Want,
        detail: Detail,
    ) -> Result<(), Error> {
        let layout = Arc::clone(&session.layout);
        self.start(detail);
        let mut runs = [Run { store: &mut session.store, start: session.tokens.len(), tokens, want }];
        self.pass.forward(
            &self.model,
            &mut self.backend,
            &layout,
            &mut runs,
            &mut self.logits,
            &mut NoTap,
        )?;
        session.tokens.extend_from_slice(tokens);
        session.clear_logits();
        if want == Want::Last {
            session.take_logits(&mut self.logits, 0, self.passes);
        }
        Ok(())
    }

    /// Starts a pass whose logits come back in some detail.
    fn start(&mut self, detail: Detail) {
        self.passes += 1;
        self.logits.detail = detail;
    }

    /// Gets all logits of a session of which only the best came back.
    ///
    /// The device has them until the next pass; after that the session has to compute its last token again.
    pub fn fetch_logits(&mut self, session: &mut Session<B>) -> Result<(), Error> {
        if session.best.is_none() {
            return Ok(());
        }
        let (pass, row) = session.computed;
        if pass != self.passes {
            return Err(
                BackendError::new("the logits of this session are gone: another pass came after it").into()
            );
        }
        if self.logits.values.is_empty() {
            self.pass.rest(&mut self.backend, &mut self.logits)?;
        }
        session.take_all(self.logits.row(row));
        Ok(())
    }

    /// Whether the session has all its logits now. Those that are gone are computed again when somebody wants them.
    fn has_logits(&mut self, session: &mut Session<B>) -> bool {
        let _gone = self.fetch_logits(session);
        !session.logits.is_empty()
    }

    /// Appends tokens to several sessions in one pass; afterwards each has logits for its next token.
    /// Every session gets, bit for bit, what it would get alone.
    pub fn batch(&mut self, work: &mut [Work<'_, B>]) -> Result<(), Error> {
        let mut work: Vec<_> = work.iter_mut().filter(|w| !w.tokens.is_empty()).collect();
        let Some(layout) =
            work.iter().max_by_key(|w| w.session.layout.context).map(|w| Arc::clone(&w.session.layout))
        else {
            return Ok(());
        };
        if let Some(w) = work.iter().find(|w| w.tokens.len() > w.session.room()) {
            let end = w.session.tokens.len() + w.tokens.len();
            return Err(ds4_model::Error::ContextFull { end, context: w.session.context() }.into());
        }
        let all = work.iter().any(|w| w.session.detail == Detail::All);
        self.start(if all { Detail::All } else { Detail::Best });
        let mut runs = Vec::with_capacity(work.len());
        for w in &mut work {
            let session = &mut *w.session;
            let start = session.tokens.len();
            runs.push(Run { store: &mut session.store, start, tokens: w.tokens, want: Want::Last });
        }
        self.pass.forward(
            &self.model,
            &mut self.backend,
            &layout,
            &mut runs,
            &mut self.logits,
            &mut NoTap,
        )?;
        for (i, w) in work.into_iter().enumerate() {
            w.session.tokens.extend_from_slice(w.tokens);
            w.session.take_logits(&mut self.logits, i, self.passes);
        }
        Ok(())
    }

    /// Appends tokens in one pass and returns the logits of every position: `[tokens, vocab]`. With a draft
    /// block and `next` (the token after the last), also the draft's logits for the tokens after these.
    pub fn score(
        &mut self,
        session: &mut Session<B>,
        tokens: &[u32],
        next: Option<u32>,
        tap: &mut (dyn Tap + Send),
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), Error> {
        let layout = Arc::clone(&session.layout);
        let start = session.tokens.len();
        self.start(Detail::All);
        let (model, backend) = (&self.model, &mut self.backend);
        let mut runs = [Run { store: &mut session.store, start, tokens, want: Want::All }];
        self.pass.forward(model, backend, &layout, &mut runs, &mut self.logits, tap)?;
        let scores = self.logits.values.clone();
        let draft = match next {
            Some(next) if model.weights.mtp.is_some() => {
                let shifted: Vec<u32> = tokens.iter().skip(1).copied().chain([next]).collect();
                let mut runs = [Run { store: &mut session.store, start, tokens: &shifted, want: Want::All }];
                self.pass.draft(model, backend, &layout, &mut runs, &mut self.logits, tap)?;
                Some(self.logits.values.clone())
            }
            _ => None,
        };
        session.tokens.extend_from_slice(tokens);
        session.clear_logits();
        session.logits = scores[scores.len() - self.model.shape.vocab..].to_vec();
        Ok((scores, draft))
    }

    /// Keeps the session's present place, so that it can come back to it.
    pub fn keep(&mut self, session: &mut Session<B>) -> Result<(), Error> {
        let len = session.tokens.len();
        if len == 0 || session.kept.last().is_some_and(|k| k.frontier.len == len && !k.logits.is_empty()) {
            return Ok(());
        }
        self.has_logits(session);
        let frontier = Frontier::take(&mut self.backend, &session.store, &session.layout, len)?;
        session.keep(Kept { frontier, logits: session.logits.clone() });
        let every = self.disk.as_ref().map_or(0, |disk| disk.save_every);
        self.save(session, every)
    }

    /// Goes back to the last kept place at or before `len`, or to the start; returns the new length.
    pub fn rewind(&mut self, session: &mut Session<B>, len: usize) -> Result<usize, Error> {
        if len >= session.tokens.len() {
            return Ok(session.tokens.len());
        }
        let Some(i) = session.kept_before(len) else {
            session.clear();
            return Ok(0);
        };
        session.kept.truncate(i + 1);
        let kept = &session.kept[i];
        kept.frontier.put(&mut self.backend, &mut session.store, &session.layout)?;
        session.best = None;
        session.logits.clone_from(&kept.logits);
        session.tokens.truncate(kept.frontier.len);
        session.saved.retain(|&end| end <= kept.frontier.len);
        Ok(kept.frontier.len)
    }

    /// Copies all of the session's state.
    pub fn snapshot(&mut self, session: &mut Session<B>) -> Result<SessionSnapshot, Error> {
        self.has_logits(session);
        let state = Snapshot::take(&mut self.backend, &session.store, &session.layout, session.tokens.len())?;
        Ok(SessionSnapshot { state, tokens: session.tokens.clone(), logits: session.logits.clone() })
    }

    /// Puts a snapshot into a session, which may be another one than it was taken from.
    pub fn restore(&mut self, session: &mut Session<B>, snapshot: &SessionSnapshot) -> Result<(), Error> {
        let (tokens, context) = (snapshot.tokens.len(), session.context());
        if tokens > context {
            return Err(Error::Snapshot { tokens, context });
        }
        // Not valid if putting fails half way; empty is.
        session.clear();
        snapshot.state.put(&mut self.backend, &mut session.store, &session.layout)?;
        session.tokens.extend_from_slice(&snapshot.tokens);
        session.logits.clone_from(&snapshot.logits);
        Ok(())
    }
}

/// A session's state in memory.
#[derive(Clone)]
pub struct SessionSnapshot {
    state: Snapshot,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}
