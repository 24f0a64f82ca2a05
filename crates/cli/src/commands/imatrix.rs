//! `ds4 imatrix`: which columns of the weights matter.

use crate::args::ImatrixArgs;
use crate::device::{Description, Device};
use crate::load::{self, Wants, WithEngine};
use crate::texts::Texts;
use crate::{Result, ui};
use ds4_engine::Engine;
use ds4_gguf::Gguf;
use ds4_quantize::{Collector, Imatrix};
use ds4_text::{Profile, Tokenizer};
use std::process::ExitCode;

pub(crate) fn run(args: &ImatrixArgs) -> Result<ExitCode> {
    let file = load::open(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_gguf(file.metadata())?;
    let texts = Texts::read(&args.dataset, &tokenizer, Profile::of_file(file.metadata()), &args.text)?;
    let wants = Wants::scoring(args.text.exact, texts.longest());
    load::with_engine(&file, &args.model, wants, Job { args, file: &file, tokenizer, texts })
}

struct Job<'a> {
    args: &'a ImatrixArgs,
    file: &'a Gguf,
    tokenizer: Tokenizer,
    texts: Texts,
}

impl WithEngine for Job<'_> {
    fn run<B: Device>(self, mut engine: Engine<B>, _: Description) -> Result<ExitCode> {
        let Job { args, file, tokenizer, texts } = self;
        let mut collector = Collector::new(engine.shape());
        texts.run("imatrix", &mut engine, &tokenizer, true, &mut collector, &mut |_, _, _| Ok(()))?;
        // A draft block may come from a file of its own.
        let in_file = |name: &str| file.tensor(name).is_some() || name.starts_with("mtp.");
        let dataset = args.dataset.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let imatrix = Imatrix {
            datasets: vec![dataset],
            chunks: texts.sequences.len() as u32,
            chunk_size: args.text.ctx as u32,
            ..collector.finish(in_file)
        };
        imatrix.write(&args.out)?;
        for (name, missed, experts) in imatrix.never_hit() {
            ui::note(&format!(
                "{name}: {missed} of {experts} experts were never hit; quantize will go by the others' inputs"
            ));
        }
        let (sequences, tokens) = (texts.sequences.len(), texts.tokens());
        println!(
            "{}: {} tensors, {tokens} tokens in {sequences} sequences",
            args.out.display(),
            imatrix.tensors.len()
        );
        Ok(ExitCode::SUCCESS)
    }
}
