//! Which device computes: what there is, what fits where, and the choice.

use crate::args::{BackendArg, ComputeArgs};
use crate::ui::bytes;
use crate::{Result, gpu, ui};
use ds4_cpu::Cpu;
use ds4_model::Backend;
use ds4_model::memory::{Needs, Sizing, split_layers};
use serde::Serialize;
use std::fmt;

/// Rows of a prefill chunk: enough to share weights among, few enough to be interrupted.
pub(crate) const CPU_ROWS: usize = 256;
/// A GPU needs more of them to be busy.
pub(crate) const GPU_ROWS: usize = 2048;

/// A backend as this program uses it.
pub(crate) trait Device: Backend {
    /// Bytes of memory it can read in a second, if it measures that.
    fn bandwidth(&mut self) -> Option<f64> {
        None
    }

    /// Starts taking the time of every kernel anew, or stops; does nothing where there are none.
    fn time_kernels(&mut self, _on: bool) {}

    /// Name, launches and seconds of every kernel since times are taken, the longest first.
    fn kernel_times(&self) -> Vec<(&'static str, usize, f64)> {
        Vec::new()
    }
}

impl Device for Cpu {
    fn bandwidth(&mut self) -> Option<f64> {
        ds4_cpu::read_bandwidth(self.threads()).ok()
    }
}

/// What computes.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Description {
    pub(crate) device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) threads: Option<usize>,
    /// Memory nodes that the threads are bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_nodes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kernels: Option<String>,
    /// What it took to bring the weights to a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) load_seconds: Option<f64>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.threads, &self.kernels) {
            (Some(threads), Some(kernels)) => {
                let nodes = self.memory_nodes.map_or(String::new(), |n| format!(" on {n} memory nodes"));
                write!(f, "{threads} threads{nodes}, {kernels} kernels")
            }
            _ => f.write_str(&self.device),
        }
    }
}

impl Description {
    pub(crate) fn of_cpu(cpu: &Cpu) -> Self {
        Description {
            device: "cpu".into(),
            threads: Some(cpu.threads()),
            memory_nodes: Some(cpu.memory_nodes()).filter(|&n| n > 1),
            kernels: Some(format!("{:?}", cpu.level())),
            load_seconds: None,
        }
    }

    pub(crate) fn of_gpus(gpus: &[GpuInfo]) -> Self {
        let names: Vec<String> = gpus.iter().map(ToString::to_string).collect();
        Description {
            device: names.join(", "),
            threads: None,
            memory_nodes: None,
            kernels: None,
            load_seconds: None,
        }
    }
}

/// A way to reach GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Cuda,
    Vulkan,
    Metal,
}

impl Api {
    fn name(self) -> &'static str {
        match self {
            Api::Cuda => "cuda",
            Api::Vulkan => "vulkan",
            Api::Metal => "metal",
        }
    }

    /// Whether this program was built with it.
    fn compiled(self) -> bool {
        match self {
            Api::Cuda => cfg!(feature = "cuda"),
            Api::Vulkan => cfg!(feature = "vulkan"),
            Api::Metal => cfg!(any(feature = "metal", target_os = "macos")),
        }
    }
}

/// A GPU.
#[derive(Clone, Debug)]
pub(crate) struct GpuInfo {
    pub(crate) api: Api,
    pub(crate) index: usize,
    pub(crate) name: String,
    /// Bytes; 0 where unknown.
    pub(crate) memory: u64,
    /// Bytes nobody uses; 0 where unknown.
    pub(crate) free: u64,
    /// Whether it is a CPU in disguise.
    pub(crate) software: bool,
    pub(crate) matrix_units: bool,
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.api.name(), self.index, self.name)
    }
}

impl GpuInfo {
    /// Bytes that a model may use, if known: drivers and allocators keep a little.
    pub(crate) fn usable(&self) -> Option<u64> {
        let known = if self.free > 0 { self.free } else { self.memory };
        (known > 0).then(|| known - known / 32)
    }
}

/// What is to compute.
#[derive(Debug)]
pub(crate) enum Choice {
    Cpu,
    /// These GPUs together, the layers spread over them.
    Gpus(Vec<GpuInfo>),
}

/// Finds the device that the flags mean. `sizing` is the model, `context` the tokens of a session.
pub(crate) fn choose(args: &ComputeArgs, sizing: &Sizing<'_>, context: usize) -> Result<Choice> {
    let wanted = match args.backend {
        BackendArg::Auto => None,
        BackendArg::Cpu => {
            if !args.device.is_empty() {
                return Err("--device names GPUs; it does not go with --backend cpu".into());
            }
            return Ok(Choice::Cpu);
        }
        BackendArg::Cuda => Some(Api::Cuda),
        BackendArg::Vulkan => Some(Api::Vulkan),
        BackendArg::Metal => Some(Api::Metal),
    };
    match wanted {
        Some(api) if !api.compiled() => {
            let name = api.name();
            Err(format!(
                "this ds4 was built without {name}; build it with: cargo build --release --features {name}"
            )
            .into())
        }
        Some(api) => explicit(api, &gpu::devices(), &args.device, sizing, context),
        None => automatic(&gpu::devices(), &args.device, sizing, context),
    }
}

fn explicit(
    api: Api,
    all: &[GpuInfo],
    indices: &[usize],
    sizing: &Sizing<'_>,
    context: usize,
) -> Result<Choice> {
    match fitting(api, all, indices, sizing, context)? {
        Ok(chosen) => Ok(Choice::Gpus(chosen)),
        Err(why) => Err(format!("{why}; --backend cpu computes without a GPU").into()),
    }
}

fn automatic(all: &[GpuInfo], indices: &[usize], sizing: &Sizing<'_>, context: usize) -> Result<Choice> {
    let Some(first) = all.iter().find(|d| !d.software) else {
        if let Some(index) = indices.first() {
            return Err(format!("--device {index}: there is no GPU; ds4 doctor lists the devices").into());
        }
        return Ok(Choice::Cpu);
    };
    match fitting(first.api, all, indices, sizing, context)? {
        Ok(chosen) => Ok(Choice::Gpus(chosen)),
        // Who names a device wants that one.
        Err(why) if !indices.is_empty() => Err(why.into()),
        Err(why) => {
            ui::note(&format!("{why}; computing on the CPU"));
            Ok(Choice::Cpu)
        }
    }
}

/// The devices named; or the first, or what one does not hold, all of its kind together. Else why the model does not fit.
fn fitting(
    api: Api,
    all: &[GpuInfo],
    indices: &[usize],
    sizing: &Sizing<'_>,
    context: usize,
) -> Result<std::result::Result<Vec<GpuInfo>, String>> {
    let chosen = pick(api, all, indices)?;
    let Some(why) = shortage(&chosen, sizing, context) else { return Ok(Ok(chosen)) };
    let together: Vec<_> = all.iter().filter(|d| d.api == api && !d.software).cloned().collect();
    if indices.is_empty() && together.len() > 1 && shortage(&together, sizing, context).is_none() {
        return Ok(Ok(together));
    }
    Ok(Err(why))
}

/// The devices named, or the first real one.
fn pick(api: Api, all: &[GpuInfo], indices: &[usize]) -> Result<Vec<GpuInfo>> {
    let mut mine = all.iter().filter(|d| d.api == api);
    if indices.is_empty() {
        return match mine.find(|d| !d.software) {
            Some(device) => Ok(vec![device.clone()]),
            None => Err(format!("no {} device; ds4 doctor lists the devices", api.name()).into()),
        };
    }
    let named = indices.iter().map(|&index| match mine.clone().find(|d| d.index == index) {
        Some(device) => Ok(device.clone()),
        None => Err(format!("no device {} {index}; ds4 doctor lists the devices", api.name()).into()),
    });
    named.collect()
}

/// Why the model does not fit the devices; `None` if it does, or if nobody knows their memory.
fn shortage(devices: &[GpuInfo], sizing: &Sizing<'_>, context: usize) -> Option<String> {
    let memory = devices.iter().map(GpuInfo::usable).collect::<Option<Vec<u64>>>()?;
    if sizing.fit(&memory, context) {
        return None;
    }
    let parts = split_layers(sizing.shape.layers.len(), &memory);
    let short = devices.iter().zip(&memory).zip(parts).find_map(|((device, &memory), layers)| {
        let needs = sizing.needs_of(layers.clone(), context);
        let of = match devices.len() {
            1 => String::new(),
            _ => format!(" for layers {} to {}", layers.start, layers.end - 1),
        };
        let sum = arithmetic(&needs);
        let free = bytes(memory);
        (!needs.fit(memory))
            .then(|| format!("{device}: {sum}{of} at {context} tokens do not fit the {free} free"))
    });
    Some(format!("{}; {}", short.unwrap_or_default(), what_fits(sizing, &memory)))
}

/// The sum in words.
pub(crate) fn arithmetic(needs: &Needs) -> String {
    let [weights, cache, work, total] = [needs.weights, needs.cache, needs.work, needs.total()].map(bytes);
    format!("weights {weights} + cache {cache} + work buffers {work} = {total}")
}

/// What would fit instead.
fn what_fits(sizing: &Sizing<'_>, memory: &[u64]) -> String {
    match sizing.largest_context(memory) {
        0 if sizing.weights > memory.iter().sum() => "the weights alone are too large".into(),
        0 => "no context fits".into(),
        context => format!("a context of {context} tokens would fit (--ctx {context})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_model::Shape;
    use ds4_model::cache::KvFormat;
    use ds4_testkit::Synthetic;

    const GB: u64 = 1_000_000_000;

    fn gpu(api: Api, index: usize, gigabytes: u64, software: bool) -> GpuInfo {
        let memory = gigabytes * GB;
        GpuInfo { api, index, name: "X".into(), memory, free: 0, software, matrix_units: true }
    }

    fn with_flash<T>(f: impl FnOnce(&Sizing<'_>) -> T) -> T {
        let flash = Synthetic::flash(43);
        let shape = Shape::from_gguf(&flash.header().unwrap()).unwrap();
        let (format, weights) = (KvFormat::Packed, flash.bytes());
        f(&Sizing { shape: &shape, weights, format, draft: false, max_rows: GPU_ROWS, sessions: 1 })
    }

    fn names(choice: Result<Choice>) -> Vec<String> {
        match choice {
            Ok(Choice::Cpu) => vec!["cpu".into()],
            Ok(Choice::Gpus(gpus)) => gpus.iter().map(ToString::to_string).collect(),
            Err(e) => vec![format!("error: {e}")],
        }
    }

    #[test]
    fn automatic_takes_the_first_real_gpu_that_fits() {
        with_flash(|s| {
            let auto = |all: &[GpuInfo], indices: &[usize]| names(automatic(all, indices, s, 32_768));
            let big = |index| gpu(Api::Cuda, index, 141, false);
            let (soft, small) = (gpu(Api::Vulkan, 0, 1000, true), gpu(Api::Cuda, 0, 24, false));
            assert_eq!(auto(&[], &[]), ["cpu"]);
            assert_eq!(auto(std::slice::from_ref(&soft), &[]), ["cpu"]);
            assert_eq!(auto(&[soft, big(0), big(1)], &[]), ["cuda 0 (X)"]);
            assert_eq!(auto(&[big(0), big(1)], &[1]), ["cuda 1 (X)"]);
            assert_eq!(auto(std::slice::from_ref(&small), &[]), ["cpu"]);
            assert!(auto(&[small], &[0])[0].contains("the weights alone are too large"));
            assert!(auto(&[big(0)], &[7])[0].contains("no device cuda 7"));
            assert!(auto(&[], &[0])[0].contains("--device 0: there is no GPU"));
        });
    }

    #[test]
    fn explicit_devices_share_the_model() {
        with_flash(|s| {
            let all: Vec<_> = (0..4).map(|i| gpu(Api::Cuda, i, 50, false)).collect();
            let run = |indices: &[usize], context| names(explicit(Api::Cuda, &all, indices, s, context));
            assert_eq!(run(&[1, 3], 32_768), ["cuda 1 (X)", "cuda 3 (X)"]);
            // Nobody named one, and the first does not hold it.
            assert_eq!(run(&[], 32_768).len(), 4);
            let error = &run(&[0], 32_768)[0];
            for part in ["weights 86.7", " + cache ", " + work buffers ", "at 32768 tokens", "48.44 GB free"]
            {
                assert!(error.contains(part), "{part} in {error}");
            }
            let error = &run(&[0, 1], 1 << 20)[0];
            assert!(!error.contains("error") || error.contains("would fit (--ctx "), "{error}");
            let none = names(explicit(Api::Metal, &all, &[], s, 1000));
            assert!(none[0].contains("no metal device"), "{none:?}");
            // Nobody knows how much memory it has: try.
            let unknown = [gpu(Api::Vulkan, 0, 0, false)];
            assert_eq!(names(explicit(Api::Vulkan, &unknown, &[], s, 1000)), ["vulkan 0 (X)"]);
        });
    }
}
