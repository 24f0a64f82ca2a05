//! Opens a model: a file, or the one that is part of the program.

use crate::args::ModelArgs;
use crate::device::{self, CPU_ROWS, Choice, Description, Device, GPU_ROWS};
use crate::{Result, gpu, ui};
use ds4_cpu::{Cpu, Options};
use ds4_engine::{Engine, EngineOptions};
use ds4_gguf::Gguf;
use ds4_model::cache::KvFormat;
use ds4_model::memory::Sizing;
use ds4_model::{Backend, Shape};
use ds4_text::Tokenizer;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// The file that is looked for where none is named.
pub(crate) const DEFAULT_FILE: &str = "ds4flash.gguf";

/// Bytes that all sessions together may use for places to go back to.
const KEEP_BYTES: usize = 1 << 30;

/// ds4-nano; `docs/nano.md` tells how it was made.
#[cfg(feature = "nano")]
static NANO: Option<&[u8]> = Some(include_bytes!("../../../models/ds4-nano/ds4-nano.gguf"));
#[cfg(not(feature = "nano"))]
static NANO: Option<&[u8]> = None;

/// How to compute, and for what.
#[derive(Clone, Copy)]
pub(crate) struct Wants {
    pub(crate) exact: bool,
    pub(crate) kv: KvFormat,
    /// Most rows of a pass, if the device is not to decide.
    pub(crate) max_rows: Option<usize>,
    /// Tokens of a session.
    pub(crate) context: usize,
    /// Sessions that are open at once.
    pub(crate) sessions: usize,
}

impl Wants {
    /// One session in the default numbers.
    pub(crate) fn session(context: usize) -> Self {
        Wants { exact: false, kv: KvFormat::Packed, max_rows: None, context, sessions: 1 }
    }

    /// The same in the reference's numbers, if `exact`.
    pub(crate) fn scoring(exact: bool, context: usize) -> Self {
        let kv = if exact { KvFormat::Rounded } else { KvFormat::Packed };
        Wants { exact, kv, ..Wants::session(context) }
    }
}

/// What to do with an engine, whatever it computes on.
pub(crate) trait WithEngine {
    /// Does it. `device` is what computes.
    fn run<B: Device>(self, engine: Engine<B>, device: Description) -> Result<ExitCode>;
}

/// The model file named, or the default one, or the embedded one; says which if none was named.
pub(crate) fn open(model: Option<&Path>) -> Result<Gguf> {
    if let Some(path) = model {
        return Ok(Gguf::open(path)?);
    }
    if Path::new(DEFAULT_FILE).exists() {
        ui::note(&format!("model: ./{DEFAULT_FILE}"));
        return Ok(Gguf::open(DEFAULT_FILE)?);
    }
    let nano = nano()?;
    ui::note("model: ds4-nano, the small one inside this program (-m FILE for another)");
    Ok(nano)
}

/// The model that is part of this program.
pub(crate) fn nano() -> Result<Gguf> {
    let nano = NANO.ok_or("this program was built without ds4-nano: name a model file with -m FILE")?;
    Ok(Gguf::from_static(nano)?)
}

/// Bytes of a file's tensors.
pub(crate) fn file_bytes(file: &Gguf) -> u64 {
    file.tensors().iter().map(|t| t.bytes).sum()
}

/// Bytes that they take on a GPU.
pub(crate) fn gpu_bytes(file: &Gguf, exact: bool) -> u64 {
    file.tensors().iter().map(|t| gpu::tensor_bytes(&t.name, t.ty, &t.dims, exact)).sum()
}

/// Loads a model onto the device that the flags mean and goes on with `job`: the one place that knows all
/// backends.
pub(crate) fn with_engine(
    file: &Gguf,
    args: &ModelArgs,
    wants: Wants,
    job: impl WithEngine,
) -> Result<ExitCode> {
    let draft = args.mtp.as_ref().map(Gguf::open).transpose()?;
    let shape = Shape::from_gguf(file)?;
    let files = || std::iter::once(file).chain(&draft);
    let in_files: u64 = files().map(file_bytes).sum();
    let sizing = Sizing {
        shape: &shape,
        weights: files().map(|f| gpu_bytes(f, wants.exact)).sum(),
        format: wants.kv,
        draft: draft.is_some() || file.tensor("mtp.0.e_proj.weight").is_some(),
        max_rows: wants.max_rows.unwrap_or(GPU_ROWS),
        sessions: wants.sessions,
    };
    let keep_bytes = EngineOptions::default().keep_bytes.min(KEEP_BYTES / wants.sessions.max(1));
    let options = |max_rows| EngineOptions { kv: wants.kv, max_rows, keep_bytes, ..EngineOptions::default() };
    let bar = ui::loading(in_files);
    let start = Instant::now();
    let mut progress = |bytes| bar.inc(bytes);
    match device::choose(&args.compute, &sizing, wants.context)? {
        Choice::Cpu => {
            let (exact, max_rows) = (wants.exact, wants.max_rows.unwrap_or(CPU_ROWS));
            let cpu = Options { threads: args.compute.threads, exact, max_rows, ..Options::default() };
            let cpu = Cpu::new(&shape, cpu)?;
            let device = Description::of_cpu(&cpu);
            let engine = Engine::load_with(cpu, file, draft.as_ref(), options(max_rows), &mut progress)?;
            bar.finish_and_clear();
            job.run(engine, device)
        }
        Choice::Gpus(gpus) => {
            let mut device = Description::of_gpus(&gpus);
            let (max_rows, cache) = (sizing.max_rows, sizing.needs(wants.context).cache);
            let hint = |e: ds4_engine::Error| format!("{device}: {e}; --backend cpu computes without it");
            let gpu = gpu::open(&shape, &gpus, wants.exact, max_rows, cache).map_err(|e| hint(e.into()))?;
            let engine = Engine::load_with(gpu, file, draft.as_ref(), options(max_rows), &mut progress);
            let engine = engine.map_err(hint)?;
            bar.finish_and_clear();
            let seconds = start.elapsed().as_secs_f64();
            let rate = ui::bytes((in_files as f64 / seconds) as u64);
            let loaded = ui::bytes(in_files);
            ui::note(&format!("computing on {device}: {loaded} loaded in {seconds:.1} s, {rate}/s"));
            device.load_seconds = Some(seconds);
            job.run(engine, device)
        }
    }
}

/// A model and its tokenizer, ready to answer.
pub(crate) struct Loaded<B: Device> {
    pub(crate) engine: Engine<B>,
    pub(crate) tokenizer: Tokenizer,
}

impl<B: Device> Loaded<B> {
    /// Checks that both belong together.
    pub(crate) fn new(engine: Engine<B>, tokenizer: Tokenizer) -> Result<Self> {
        check_vocabulary(&engine, &tokenizer)?;
        Ok(Loaded { engine, tokenizer })
    }
}

/// Checks that a tokenizer is that of a model.
pub(crate) fn check_vocabulary<B: Backend>(engine: &Engine<B>, tokenizer: &Tokenizer) -> Result<()> {
    let (tokens, vocab) = (tokenizer.vocab_len(), engine.shape().vocab);
    if tokens != vocab {
        return Err(format!("the file's tokenizer has {tokens} tokens, its model {vocab}").into());
    }
    Ok(())
}
