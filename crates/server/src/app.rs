//! What all requests share.

use crate::error::{ApiError, Kind};
use crate::metrics::Metrics;
use crate::responses::Items;
use crate::trace::Trace;
use ds4_engine::scheduler::{Limits, Scheduler};
use ds4_engine::{Constraint, Grammars};
use ds4_text::{GrammarError, Profile, Replay, Tokenizer, Wanted, grammar};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Semaphore;

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model's name in requests and lists.
    pub model: String,
    /// Its name for people.
    pub display_name: String,
    /// Most tokens of an answer where the client names no limit; as many as fit if `None`.
    pub max_tokens: Option<usize>,
    /// Keys of which each request must bring one; none are asked for if there are none.
    pub keys: Vec<String>,
    /// Whether pages of other origins may use the server.
    pub cors: bool,
    /// File to which requests and answers are written.
    pub trace: Option<PathBuf>,
}

/// Bytes of bodies that are read at the same time.
const BODIES_KIB: usize = 256 << 10;

/// The server's state.
pub struct App {
    pub(crate) options: Options,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) profile: Profile,
    pub(crate) scheduler: Scheduler,
    pub(crate) metrics: Metrics,
    pub(crate) trace: Option<Trace>,
    /// KiB of bodies that may yet be read.
    pub(crate) bodies: Semaphore,
    /// Prompts that may yet be made at the same time.
    pub(crate) preparing: Semaphore,
    grammars: Grammars,
    replay: Mutex<Replay>,
    items: Mutex<Items>,
    ready: AtomicBool,
    stopping: AtomicBool,
}

impl App {
    /// A server's state. Requests are refused until [`App::set_ready`].
    ///
    /// # Errors
    /// A vocabulary that grammars cannot be made for, a trace file that cannot be written.
    pub fn new(
        options: Options,
        tokenizer: Arc<Tokenizer>,
        profile: Profile,
        scheduler: Scheduler,
        replay: Replay,
    ) -> Result<Arc<Self>, Box<dyn std::error::Error + Send + Sync>> {
        let grammars = Grammars::new(&tokenizer)?;
        let trace = options.trace.as_deref().map(Trace::open).transpose()?;
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Arc::new(App {
            options,
            tokenizer,
            profile,
            scheduler,
            metrics: Metrics::new(),
            trace,
            bodies: Semaphore::new(BODIES_KIB),
            preparing: Semaphore::new(cores),
            grammars,
            replay: Mutex::new(replay),
            items: Mutex::default(),
            ready: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }))
    }

    /// The model is there: requests are answered from now on. Its sessions take so many bytes.
    pub fn set_ready(&self, kv_bytes: u64) {
        self.metrics.kv_bytes.set(kv_bytes as i64);
        self.ready.store(true, Ordering::Release);
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    pub(crate) fn set_stopping(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// What answers depend on besides the request.
    pub(crate) fn fingerprint(&self) -> String {
        format!("ds4-{}", env!("CARGO_PKG_VERSION"))
    }

    /// How much is done at once.
    pub fn limits(&self) -> Limits {
        self.scheduler.limits()
    }

    /// Tokens that a prompt and its answer may have.
    pub(crate) fn context(&self) -> usize {
        self.limits().context
    }

    pub(crate) fn replay(&self) -> MutexGuard<'_, Replay> {
        // Every change of it is whole.
        self.replay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn items(&self) -> MutexGuard<'_, Items> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The grammar of what is wanted; `param` is where the client said so.
    pub(crate) fn constraint(&self, wanted: &Wanted<'_>, param: &str) -> Result<Constraint, ApiError> {
        let refuse =
            |message: String| ApiError { param: Some(param.to_owned()), ..ApiError::invalid(message) };
        let lark = grammar(wanted, &self.tokenizer).map_err(|e| match e {
            GrammarError::Schema { .. } => refuse(e.to_string()),
            GrammarError::Vocabulary(e) => ApiError::new(Kind::Inside, e),
        })?;
        self.grammars.constraint(lark).map_err(|e| refuse(format!("cannot be enforced: {e}")))
    }
}
