//! Opens a model: a file, or the one that is part of the program.

use crate::Result;
use crate::args::ModelArgs;
use crate::ui;
use ds4_cpu::{Cpu, Options};
use ds4_engine::{Engine, EngineOptions};
use ds4_gguf::Gguf;
use ds4_model::Shape;
use ds4_model::cache::KvFormat;
use ds4_text::Tokenizer;
use std::path::Path;

/// The file that is looked for where none is named.
const DEFAULT_FILE: &str = "ds4flash.gguf";

/// ds4-nano; `docs/nano.md` tells how it was made.
static NANO: &[u8] = include_bytes!("../../../models/ds4-nano/ds4-nano.gguf");

/// How to compute.
#[derive(Clone, Copy)]
pub(crate) struct Numbers {
    pub(crate) exact: bool,
    pub(crate) kv: KvFormat,
    pub(crate) max_rows: usize,
}

impl Default for Numbers {
    fn default() -> Self {
        Numbers { exact: false, kv: KvFormat::Packed, max_rows: 256 }
    }
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
    ui::note("model: ds4-nano, the small one inside this program (-m FILE for another)");
    Ok(Gguf::from_static(NANO)?)
}

/// A model and its tokenizer, ready to answer.
pub(crate) struct Loaded {
    pub(crate) engine: Engine<Cpu>,
    pub(crate) tokenizer: Tokenizer,
}

/// An engine without a tokenizer.
pub(crate) fn engine(file: &Gguf, args: &ModelArgs, numbers: Numbers) -> Result<Engine<Cpu>> {
    let mtp = args.mtp.as_ref().map(Gguf::open).transpose()?;
    let shape = Shape::from_gguf(file)?;
    let options = Options {
        threads: args.threads,
        exact: numbers.exact,
        max_rows: numbers.max_rows,
        ..Options::default()
    };
    let backend = Cpu::new(&shape, options)?;
    let options = EngineOptions { kv: numbers.kv, max_rows: numbers.max_rows, ..EngineOptions::default() };
    Ok(Engine::load(backend, file, mtp.as_ref(), options)?)
}

/// Loads everything, with a spinner where somebody watches.
pub(crate) fn load(args: &ModelArgs) -> Result<Loaded> {
    let file = open(args.model.as_deref())?;
    let spinner = ui::spinner("loading");
    let tokenizer = Tokenizer::from_gguf(file.metadata())?;
    let engine = engine(&file, args, Numbers::default())?;
    spinner.finish_and_clear();
    if tokenizer.vocab_len() != engine.shape().vocab {
        return Err(format!(
            "{}: the tokenizer has {} tokens, the model {}",
            file.source(),
            tokenizer.vocab_len(),
            engine.shape().vocab
        )
        .into());
    }
    Ok(Loaded { engine, tokenizer })
}
