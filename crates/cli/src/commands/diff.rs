//! `ds4 diff`: the first step at which two runs differ, and by how much.

use crate::Result;
use crate::args::DiffArgs;
use ds4_testkit::{compare, read_npy};
use std::process::ExitCode;

pub(crate) fn run(args: &DiffArgs) -> Result<ExitCode> {
    let order = args.a.join("order.txt");
    let names = std::fs::read_to_string(&order)
        .map_err(|e| format!("{}: {e}; was the folder written with `ds4 logits --taps`?", order.display()))?;
    let mut first = None;
    println!("{:28} {:>12} {:>12} {:>10}", "step", "max abs", "rel rms", "differing");
    for name in names.lines() {
        let file = format!("{name}.npy");
        if !args.b.join(&file).exists() {
            println!("{name:28} only in {}", args.a.display());
            continue;
        }
        let (a, b) = (read_npy(&args.a.join(&file))?, read_npy(&args.b.join(&file))?);
        let Some(d) = compare(&a.values, &b.values) else {
            return Err(format!("{name}: shapes {:?} and {:?}", a.shape, b.shape).into());
        };
        println!("{name:28} {:12.3e} {:12.3e} {:10}", d.max_abs, d.relative_rms, d.differing);
        if d.max_abs > args.tolerance && first.is_none() {
            let width = a.shape.get(1).copied().unwrap_or(1).max(1);
            first = Some(format!(
                "first difference: {name}, row {}, channel {}: {} and {}",
                d.at / width,
                d.at % width,
                a.values[d.at],
                b.values[d.at]
            ));
        }
    }
    match first {
        None => {
            println!("equal");
            Ok(ExitCode::SUCCESS)
        }
        Some(first) => {
            println!("{first}");
            Ok(ExitCode::FAILURE)
        }
    }
}
