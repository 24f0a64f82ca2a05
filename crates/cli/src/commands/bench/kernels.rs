//! `ds4 bench --kernels`: where the time of a prefill and of a decode step goes.

use super::{session_of, sync, tokens};
use crate::Result;
use crate::args::BenchArgs;
use crate::device::{Description, Device};
use ds4_engine::Engine;
use serde::Serialize;
use std::process::ExitCode;

/// A kernel's part in a prefill or a step.
#[derive(Debug, PartialEq, Serialize)]
struct Kernel {
    name: &'static str,
    /// Launches of a prefill or a step, on average.
    launches: f64,
    /// Of a launch.
    microseconds: f64,
    /// Of a prefill or a step.
    milliseconds: f64,
    /// Of the time of all kernels.
    share: f64,
}

#[derive(Serialize)]
struct Kernels {
    #[serde(flatten)]
    device: Description,
    prompt_tokens: usize,
    decode_tokens: usize,
    /// Of the prefill of the prompt.
    prefill: Vec<Kernel>,
    /// Of a decode step.
    decode: Vec<Kernel>,
}

pub(super) fn run<B: Device>(
    args: &BenchArgs,
    engine: &mut Engine<B>,
    device: Description,
) -> Result<ExitCode> {
    let vocab = engine.shape().vocab;
    let prompt = tokens(args.prompt.max(1), vocab);
    // Once without taking times: kernels are compiled at their first launch.
    let mut session = session_of(engine, prompt.len() + args.gen_tokens)?;
    sync(engine, &mut session, &prompt)?;
    for token in tokens(args.gen_tokens, vocab) {
        engine.step(&mut session, token)?;
    }
    let mut session = session_of(engine, prompt.len() + args.gen_tokens)?;
    engine.backend_mut().time_kernels(true);
    sync(engine, &mut session, &prompt)?;
    let prefill = parts(&engine.backend().kernel_times(), 1);
    // Switching on forgets what was seen.
    engine.backend_mut().time_kernels(true);
    for token in tokens(args.gen_tokens, vocab) {
        engine.step(&mut session, token)?;
    }
    let decode = parts(&engine.backend().kernel_times(), args.gen_tokens);
    engine.backend_mut().time_kernels(false);
    let (prompt_tokens, decode_tokens) = (prompt.len(), args.gen_tokens);
    let kernels = Kernels { device, prompt_tokens, decode_tokens, prefill, decode };
    if args.json {
        println!("{}", serde_json::to_string(&kernels)?);
    } else {
        print(&kernels);
    }
    Ok(ExitCode::SUCCESS)
}

/// Shares of times that were taken over some prefills or steps.
fn parts(times: &[(&'static str, usize, f64)], passes: usize) -> Vec<Kernel> {
    let total: f64 = times.iter().map(|(.., seconds)| seconds).sum();
    let passes = passes.max(1) as f64;
    let kernel = |&(name, launches, seconds): &(&'static str, usize, f64)| Kernel {
        name,
        launches: launches as f64 / passes,
        microseconds: 1e6 * seconds / launches.max(1) as f64,
        milliseconds: 1e3 * seconds / passes,
        share: if total > 0.0 { seconds / total } else { 0.0 },
    };
    times.iter().map(kernel).collect()
}

fn print(kernels: &Kernels) {
    if kernels.prefill.is_empty() && kernels.decode.is_empty() {
        println!("{}: no kernels to time, which only GPUs have", kernels.device);
        return;
    }
    println!("{}", kernels.device);
    let table = |what: &str, kernels: &[Kernel]| {
        println!("\n{what:28} {:>9} {:>10} {:>10} {:>7}", "launches", "us/launch", "ms", "share");
        for k in kernels {
            let Kernel { name, launches, microseconds, milliseconds, share } = k;
            println!(
                "  {name:26} {launches:9.1} {microseconds:10.1} {milliseconds:10.3} {:5.1} %",
                100.0 * share
            );
        }
        let launches: f64 = kernels.iter().map(|k| k.launches).sum();
        let milliseconds: f64 = kernels.iter().map(|k| k.milliseconds).sum();
        println!("  {:26} {launches:9.1} {:>10} {milliseconds:10.3}", "all", "");
    };
    table(&format!("prefill of {} tokens", kernels.prompt_tokens), &kernels.prefill);
    table("decode step", &kernels.decode);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_of_one_step() {
        let parts = parts(&[("down", 80, 0.03), ("norm", 20, 0.01)], 10);
        let down = &parts[0];
        assert_eq!((down.name, down.launches), ("down", 8.0));
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        near(down.microseconds, 375.0);
        near(down.milliseconds, 3.0);
        near(parts.iter().map(|p| p.share).sum(), 1.0);
        // Nothing was decoded, or nothing takes time.
        assert_eq!(super::parts(&[], 0), []);
        assert_eq!(super::parts(&[("norm", 1, 0.0)], 0)[0].share, 0.0);
    }
}
