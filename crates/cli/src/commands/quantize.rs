//! `ds4 quantize`: a checkpoint becomes a model file.

use crate::Result;
use crate::args::{QuantizeArgs, RecipeArg};
use crate::ui;
use ds4_quantize::{Checkpoint, Recipe, convert};
use std::process::ExitCode;

pub(crate) fn run(args: &QuantizeArgs) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => args
            .checkpoint
            .canonicalize()?
            .file_name()
            .map_or("model".into(), |n| n.to_string_lossy().into_owned()),
    };
    let recipe = match args.recipe {
        RecipeArg::Q2 => Recipe::Q2,
        RecipeArg::Q2Q4 => Recipe::Q2Q4,
        RecipeArg::Q4 => Recipe::Q4,
        RecipeArg::Q8 => Recipe::Q8,
    };
    let bar = ui::items("tensors");
    convert(&checkpoint, &args.out, &name, recipe, &mut |done, total, tensor| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message(tensor.to_owned());
    })?;
    bar.finish_and_clear();
    let size = std::fs::metadata(&args.out)?.len();
    ui::note(&format!("{}: {}", args.out.display(), ui::bytes(size)));
    Ok(ExitCode::SUCCESS)
}
