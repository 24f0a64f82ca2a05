//! `ds4 doctor`: the devices, what fits on them, and whether they compute right.

use crate::args::DoctorArgs;
use crate::device::{CPU_ROWS, GPU_ROWS, GpuInfo, arithmetic};
use crate::gpu::{self, OnGpu};
use crate::load::{self, DEFAULT_FILE};
use crate::ui::bytes;
use crate::{Result, ui};
use ds4_cpu::kernels::Level;
use ds4_cpu::{Cpu, Options};
use ds4_gguf::Gguf;
use ds4_model::cache::KvFormat;
use ds4_model::memory::Sizing;
use ds4_model::{BackendError, Shape};
use ds4_testkit::conformance::{Check, MakeBackend};
use ds4_testkit::{Fixture, Synthetic};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

/// Contexts to compare with memory.
const CONTEXTS: [(&str, usize); 4] =
    [("32k", 32 << 10), ("128k", 128 << 10), ("256k", 256 << 10), ("1M", 1_000_000)];

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let gpus = gpu::devices();
    if let Some(part) = &args.part {
        return prove_part(&gpus, part);
    }
    let memory = main_memory();
    println!("devices");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let of_memory = memory.map_or(String::new(), |(all, free)| in_use(all, free));
    println!("  cpu: {cores} cores, {:?} kernels{of_memory}", Level::best());
    for gpu in &gpus {
        let units = if gpu.matrix_units { ", matrix units" } else { "" };
        let software = if gpu.software { ", a CPU in disguise" } else { "" };
        println!("  {gpu}{}{units}{software}", in_use(gpu.memory, gpu.free));
    }
    if gpus.is_empty() {
        println!("  no GPU (compiled in: {})", compiled());
    }
    fitting(args, memory.map(|(_, free)| free), &gpus)?;
    if args.no_tests {
        return Ok(ExitCode::SUCCESS);
    }
    let start = Instant::now();
    let parts: Vec<Vec<Child>> = (0..gpus.len()).map(parts_of).collect::<Result<_>>()?;
    println!("\nchecks on cpu");
    let mut failed = prove(&OnCpu, &Check::ALL);
    for (gpu, parts) in gpus.iter().zip(parts) {
        println!("\nchecks on {gpu}");
        for part in parts {
            failed += finish(part)?;
        }
    }
    let seconds = start.elapsed().as_secs();
    if failed == 0 {
        println!("\nall checks passed in {seconds} s");
        return Ok(ExitCode::SUCCESS);
    }
    println!("\n{failed} checks FAILED");
    Ok(ExitCode::FAILURE)
}

fn in_use(all: u64, free: u64) -> String {
    match (all, free) {
        (0, _) => String::new(),
        (all, 0) => format!(", {}", bytes(all)),
        (all, free) => format!(", {} ({} free)", bytes(all), bytes(free)),
    }
}

fn compiled() -> String {
    let apis = [
        ("cuda", cfg!(feature = "cuda")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("metal", cfg!(any(feature = "metal", target_os = "macos"))),
    ];
    let names: Vec<&str> = apis.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    if names.is_empty() { "none; see README".into() } else { names.join(", ") }
}

/// Total and available bytes, where the system tells.
fn main_memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// Which contexts fit where.
fn fitting(args: &DoctorArgs, main: Option<u64>, gpus: &[GpuInfo]) -> Result<()> {
    let named = args.model.as_deref().or_else(|| Some(Path::new(DEFAULT_FILE)).filter(|p| p.exists()));
    let (shape, [on_disk, weights], draft) = match named {
        Some(path) => {
            let file = Gguf::open(path)?;
            println!("\nmemory for {}", file.source());
            let weights = [load::file_bytes(&file), load::gpu_bytes(&file, false)];
            (Shape::from_gguf(&file)?, weights, file.tensor("mtp.0.e_proj.weight").is_some())
        }
        None => {
            println!("\nmemory for DeepSeek V4 Flash, the published 2-bit file (-m FILE for another)");
            let flash = Synthetic::flash(43);
            let weights = flash.bytes_as(|name, ty, dims| gpu::tensor_bytes(name, ty, dims, false));
            (Shape::from_gguf(&flash.header()?)?, [flash.bytes(), weights], false)
        }
    };
    let sizing = |weights, max_rows| {
        let format = KvFormat::Packed;
        Sizing { shape: &shape, weights, format, draft, max_rows, sessions: 1 }
    };
    let (on_cpu, on_gpu) = (sizing(on_disk, CPU_ROWS), sizing(weights, GPU_ROWS));
    for (name, context) in CONTEXTS {
        println!("  {name:>4}: {}", arithmetic(&on_gpu.needs(context)));
    }
    let line = |device: &str, sizing: &Sizing<'_>, memory: Option<u64>| {
        let Some(memory) = memory else {
            println!("  {device}: unknown memory");
            return;
        };
        let fits = CONTEXTS.map(|(name, context)| {
            format!("{name} {}", if sizing.needs(context).fit(memory) { "fits" } else { "does not fit" })
        });
        println!("  {device}: {}", fits.join(", "));
    };
    line("cpu (weights may stay on disk, slowly)", &on_cpu, main);
    for gpu in gpus {
        line(&gpu.to_string(), &on_gpu, gpu.usable());
    }
    Ok(())
}

struct OnCpu;

impl MakeBackend for OnCpu {
    type Backend = Cpu;

    fn make(&self, shape: &Shape, exact: bool, max_rows: usize) -> std::result::Result<Cpu, BackendError> {
        Cpu::new(shape, Options { exact, max_rows, ..Options::default() })
    }
}

/// Runs checks; returns how many failed.
fn prove<M: MakeBackend>(maker: &M, checks: &[Check]) -> usize {
    let fixture = Fixture::embedded();
    let mut failed = 0;
    for check in checks {
        let spinner = ui::spinner(check.name());
        let outcome = check.run(maker, &fixture);
        spinner.finish_and_clear();
        match outcome {
            Ok(measured) => println!("  ok    {}: {measured}", check.name()),
            Err(why) => {
                println!("  FAIL  {}: {why}", check.name());
                failed += 1;
            }
        }
    }
    failed
}

/// Checks of a GPU that run one after the other, since they need the same kernels. Nearly all time goes into compiling
/// those the first time, which a process does on one core: so each group has its own, all at once. And a driver that
/// dies takes only its own group along.
const GROUPS: [&[Check]; 4] = [
    &[Check::Exact, Check::Rounding, Check::Draft, Check::ChunksExact, Check::BatchesExact],
    &[Check::Default, Check::ChunksDefault, Check::BatchesDefault],
    &[Check::Widths],
    &[Check::EmptyPass, Check::Restore, Check::Rewind],
];

/// Starts all checks of a GPU.
fn parts_of(gpu: usize) -> Result<Vec<Child>> {
    let program = std::env::current_exe()?;
    let start = |group: usize| {
        let mut part = Command::new(&program);
        part.args(["doctor", "--part", &gpu.to_string(), &group.to_string()]);
        part.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    Ok((0..GROUPS.len()).map(start).collect::<std::io::Result<_>>()?)
}

/// One group of checks, in a process of its own.
fn prove_part(gpus: &[GpuInfo], part: &[usize]) -> Result<ExitCode> {
    let &[gpu, group] = part else { return Err("--part takes two numbers".into()) };
    let (Some(gpu), Some(checks)) = (gpus.get(gpu), GROUPS.get(group)) else {
        return Err(format!("there is no part {group} of GPU {gpu}").into());
    };
    let failed = prove(&OnGpu(gpu.clone()), checks);
    Ok(ExitCode::from(u8::try_from(failed).unwrap_or(u8::MAX)))
}

/// Prints what a group found when it has ended; returns how many of its checks failed.
fn finish(part: Child) -> Result<usize> {
    let spinner = ui::spinner("checks");
    let found = part.wait_with_output()?;
    spinner.finish_and_clear();
    let text = String::from_utf8_lossy(&found.stdout);
    print!("{text}");
    let failed = text.lines().filter(|line| line.starts_with("  FAIL")).count();
    // It ended in another way than by having run them all.
    if found.status.code() != i32::try_from(failed).ok() {
        println!("  FAIL  {}: {}", found.status, String::from_utf8_lossy(&found.stderr).trim());
        return Ok(failed + 1);
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_in_a_group() {
        let grouped: Vec<Check> = GROUPS.concat();
        assert_eq!(grouped.len(), Check::ALL.len());
        assert!(Check::ALL.iter().all(|check| grouped.contains(check)));
    }
}
