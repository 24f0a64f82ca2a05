//! `ds4 quantize`: a checkpoint becomes a model file.

use crate::Result;
use crate::args::QuantizeArgs;
use crate::ui;
use ds4_gguf::Gguf;
use ds4_quantize::{Checkpoint, Compared, Content, Imatrix, Options, Plan, Progress, Tallies, compare};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn run(args: &QuantizeArgs) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let folder = args.checkpoint.canonicalize()?;
    let folder = folder.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
    let imatrix = args.imatrix.as_deref().map(Imatrix::read).transpose()?;
    let imatrix_name =
        args.imatrix.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let plan = |content| {
        let options = Options {
            name: args.name.as_deref().unwrap_or(&folder),
            recipe: args.recipe.into(),
            overrides: &args.overrides,
            imatrix: imatrix.as_ref().map(|m| (m, &*imatrix_name)),
            content,
        };
        Plan::new(&checkpoint, &options)
    };
    let out = args.out.as_deref().unwrap_or(Path::new("model"));
    let mut files = Vec::new();
    match args.mtp_out.as_deref() {
        None => files.push((plan(Content::Whole)?, out)),
        Some(mtp_out) => files.extend([(plan(Content::Model)?, out), (plan(Content::Draft)?, mtp_out)]),
    }
    for (plan, out) in &files {
        if args.dry_run {
            show(plan, out);
            continue;
        }
        let bar = ui::weights(plan.tensors().iter().map(ds4_quantize::Planned::weights).sum());
        let tallies = plan.write(out, &mut |p: Progress<'_>| {
            if bar.position() == 0 && p.resumed > 0 {
                bar.suspend(|| ui::note("going on where an interrupted run stopped"));
                // What was there already says nothing about how fast this run is.
                bar.set_position(p.resumed);
                bar.reset_eta();
            }
            bar.set_position(p.done);
            if bar.message() != p.tensor {
                bar.set_message(p.tensor.to_owned());
            }
        })?;
        bar.finish_and_clear();
        report(out, &tallies)?;
    }
    if let Some(other) = &args.compare {
        print(&checkpoint, out, other)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What would be written: a line for each kind of tensor.
fn show(plan: &Plan<'_>, out: &Path) {
    struct Kind {
        tensors: usize,
        dims: Vec<u64>,
        bytes: u64,
        weighted: bool,
    }
    let mut kinds: Vec<(String, Kind)> = Vec::new();
    for tensor in plan.tensors() {
        let name = match tensor.name().strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((_, rest)) => format!("blk.*.{rest}"),
            None => tensor.name().to_owned(),
        };
        let key = format!("{name:42} {:8}", tensor.ty.name());
        let new = Kind { tensors: 0, dims: tensor.dims.clone(), bytes: 0, weighted: tensor.is_weighted() };
        let at = kinds.iter().position(|(k, kind)| *k == key && kind.dims == tensor.dims);
        let at = at.unwrap_or_else(|| {
            kinds.push((key, new));
            kinds.len() - 1
        });
        kinds[at].1.tensors += 1;
        kinds[at].1.bytes += tensor.bytes;
    }
    println!("{}", out.display());
    for (key, kind) in &kinds {
        let weighted = if kind.weighted { "  by importance" } else { "" };
        let (n, size) = (kind.tensors, ui::bytes(kind.bytes));
        println!("  {key} {n:4} x {:24} {size:>10}{weighted}", format!("{:?}", kind.dims));
    }
    let bytes = plan.tensors().iter().map(|t| t.bytes).sum();
    println!("  {} tensors, {}", plan.tensors().len(), ui::bytes(bytes));
}

/// What was written, and how fast.
fn report(out: &Path, tallies: &Tallies) -> Result<()> {
    let size = std::fs::metadata(out)?.len();
    println!("{}: {}", out.display(), ui::bytes(size));
    println!(
        "{:8} {:>7} {:>12} {:>9} {:>14} {:>14}",
        "type", "tensors", "weights", "seconds", "read", "written"
    );
    for (ty, t) in tallies {
        let rate = |bytes: u64| format!("{}/s", ui::bytes((bytes as f64 / t.seconds.max(1e-9)) as u64));
        let (read, written) = (rate(t.read), rate(t.written));
        println!("{ty:8} {:7} {:12} {:9.1} {read:>14} {written:>14}", t.tensors, t.weights, t.seconds);
    }
    Ok(())
}

/// How far each tensor is from the checkpoint in the file written and in another.
fn print(checkpoint: &Checkpoint, ours: &Path, other: &Path) -> Result<()> {
    let files = [Gguf::open(ours)?, Gguf::open(other)?];
    println!("\n{:42} {:>8} {:>8} {:>10} {:>10}", "relative error", "written", "other", "written", "other");
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    compare(checkpoint, [&files[0], &files[1]], &mut |c: Compared| {
        let types = c.types.map(|t| t.map_or("-", ds4_gguf::TensorType::name));
        let errors = c.errors.map(|e| e.map_or("-".into(), |e| format!("{e:.3e}")));
        let verdict = match c.errors {
            _ if c.same => "same",
            [Some(a), Some(b)] if a < b => "closer",
            [Some(a), Some(b)] if a > b => "farther",
            _ => "",
        };
        *kinds.entry(verdict).or_default() += 1;
        println!(
            "{:42} {:>8} {:>8} {:>10} {:>10} {verdict}",
            c.name, types[0], types[1], errors[0], errors[1]
        );
    })?;
    let count = |verdict| kinds.get(verdict).copied().unwrap_or(0);
    println!(
        "same bytes: {}; closer to the checkpoint: {}; farther: {}",
        count("same"),
        count("closer"),
        count("farther")
    );
    Ok(())
}
