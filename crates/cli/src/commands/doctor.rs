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
use std::process::ExitCode;

/// Contexts to compare with memory.
const CONTEXTS: [(&str, usize); 4] =
    [("32k", 32 << 10), ("128k", 128 << 10), ("256k", 256 << 10), ("1M", 1_000_000)];

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let gpus = gpu::devices();
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
    let mut failed = prove("cpu", &OnCpu);
    for gpu in gpus {
        failed += prove(&gpu.to_string(), &OnGpu(gpu.clone()));
    }
    if failed == 0 {
        println!("\nall checks passed");
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

/// Runs all checks; returns how many failed.
fn prove<M: MakeBackend>(device: &str, maker: &M) -> usize {
    println!("\nchecks on {device}");
    let fixture = Fixture::embedded();
    let mut failed = 0;
    for check in Check::ALL {
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
