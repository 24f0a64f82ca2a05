//! Every kernel, with the very comptime arguments that the forward pass gives it, compiles to Metal's language and to
//! CUDA's, and keeps within the limits of their devices. No such device is needed: the passes run on one that compiles and
//! does not compute. With `DS4_METAL_SOURCES=FOLDER` or `DS4_CUDA_SOURCES=FOLDER` the sources are written there.
#![allow(clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

#[path = "sources/device.rs"]
mod device;

use cubecl::client::Client;
use device::{Language, Launched};
use ds4_gguf::{Gguf, Metadata, Part, TensorInfo, TensorType};
use ds4_gpu::{Api, DeviceInfo, Gpu, Options};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Detail, Logits, Model, NoTap, Pass, Run, Shape, Tap, Want};
use ds4_testkit::{Fixture, Synthetic};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// Rows of the largest pass, as in the program.
const ROWS: usize = 2048;
/// Two whole chunks, after which rows are selected at Flash's shape, and some tokens more.
const CONTEXT: usize = 2 * ROWS + 128;

/// All formats of the cache, the usual one first.
const FORMATS: [KvFormat; 3] = [KvFormat::Packed, KvFormat::Rounded, KvFormat::Plain];
/// The usual one.
const USUAL: &[KvFormat] = &[KvFormat::Packed];

/// What devices of a language can have at most.
struct Limits {
    /// Slots for buffers of a kernel.
    buffers: usize,
    /// Bytes of shared memory of a cube.
    shared: usize,
    /// Units of a cube.
    units: usize,
    /// Cubes along a dimension.
    cubes: usize,
}

/// The kernel that only devices with copies of CUDA's kind run.
const FOR_CUDA: [&str; 2] = ["kernels::mixed::project_mixed", "kernels::output::attention_output"];

/// Of the slots for buffers, `wgpu` keeps two for itself.
const METAL: Limits = Limits { buffers: 29, shared: 32 << 10, units: 1024, cubes: 0xFFFF };
/// An H100's, and fewer buffers than it could take: the host's code is the same for all.
const CUDA: Limits = Limits { buffers: 29, shared: 227 << 10, units: 1024, cubes: 0xFFFF };

/// Looks at every step.
struct Watch;

impl Tap for Watch {
    fn rows(&mut self, _: &str, _: usize, _: &[f32]) {}
}

/// Runs passes of every form over a model.
fn run(client: &Client, file: &Gguf, draft: Option<&Gguf>, exact: bool, formats: &[KvFormat]) {
    let shape = Shape::from_gguf(file).unwrap();
    let devices = [DeviceInfo::of_client(Api::Metal, client.clone())];
    let options = Options { exact, max_rows: ROWS, ..Options::default() };
    let mut gpu = Gpu::new(&shape, &devices, options).unwrap();
    let model = Model::load(&mut gpu, file, draft).unwrap();
    let mut pass = Pass::new(&mut gpu, &shape, ROWS).unwrap();
    // Prefill; few rows, with and without the matrix units; steps, of which some are replayed.
    let unseen = [ROWS, ROWS, 17, 16, 8, 4, 3, 2, 1, 1, 1, 1].map(|n| (n, false));
    let seen = [17, 1].map(|n| (n, true));
    for &format in formats {
        let layout = Layout::new(&shape, format, draft.is_some(), CONTEXT, ROWS);
        let mut store = gpu.store(&layout).unwrap();
        let mut logits = Logits { detail: Detail::Best, ..Logits::default() };
        let tokens = vec![1; ROWS];
        let mut start = 0;
        for (n, seen) in unseen.into_iter().chain(seen) {
            let want = if n == ROWS { Want::Last } else { Want::All };
            let tap: &mut (dyn Tap + Send) = if seen { &mut Watch } else { &mut NoTap };
            let mut runs = [Run { store: &mut store, start, tokens: &tokens[..n], want }];
            pass.forward(&model, &mut gpu, &layout, &mut runs, &mut logits, tap).unwrap();
            if draft.is_some() {
                pass.draft(&model, &mut gpu, &layout, &mut runs, &mut logits, tap).unwrap();
            }
            start += n;
        }
    }
    gpu.bandwidth();
}

/// A tensor of zeros.
fn zeros(name: String, ty: TensorType, dims: Vec<u64>) -> Part {
    let bytes = ty.bytes_of(dims.iter().product());
    Part { name, dims, ty, data: Arc::new(vec![0; bytes as usize]) }
}

/// A draft block for a model, of the first layer's types and dimensions.
fn draft(file: &Gguf) -> Gguf {
    let width = Shape::from_gguf(file).unwrap().width as u64;
    let vectors = ["enorm", "hnorm", "norm"].map(|name| (name, TensorType::F32, vec![width]));
    let matrices = ["e_proj", "h_proj"].map(|name| (name, TensorType::Q8_0, vec![width; 2]));
    let own =
        vectors.into_iter().chain(matrices).map(|(name, ty, dims)| (format!("{name}.weight"), ty, dims));
    let others = file.tensors().iter().filter_map(|t| {
        let layer = t.name.strip_prefix("blk.0.").map(str::to_string);
        let head = || t.name.strip_prefix("output_hc_").map(|name| format!("hc_head_{name}"));
        Some((layer.or_else(head)?, t.ty, t.dims.clone()))
    });
    let parts = own.chain(others).map(|(name, ty, dims)| zeros(format!("mtp.0.{name}"), ty, dims));
    Gguf::from_parts("draft", Metadata::default(), parts.collect()).unwrap()
}

/// The model with its routed experts, and everything else in Q8_0, in another type.
fn retyped(file: &Gguf, experts: TensorType, others: TensorType) -> Gguf {
    let part = |t: &TensorInfo| {
        let ty = match t.ty {
            _ if t.name.contains("_exps.") => experts,
            TensorType::Q8_0 => others,
            TensorType::F16 if t.name.starts_with("token_embd") => TensorType::Q8_0,
            ty => ty,
        };
        zeros(t.name.clone(), ty, t.dims.clone())
    };
    let parts = file.tensors().iter().map(part).collect();
    Gguf::from_parts("retyped", file.metadata().clone(), parts).unwrap()
}

/// Flash's shape; no model has all of it, which would take minutes to convert.
fn flash(client: &Client) {
    // Layers of all kinds: sliding, indexed, compressed; routed by token and by score.
    let flash = Synthetic { vocab: 512, ..Synthetic::flash(4) };
    run(client, &flash.model().unwrap(), None, false, USUAL);
    // With few experts, and a draft block.
    let few = Synthetic { experts: 8, ..flash }.model().unwrap();
    for exact in [false, true] {
        run(client, &few, Some(&draft(&few)), exact, &FORMATS);
    }
    // Experts of the other types that a file may have.
    for experts in [TensorType::Q4K, TensorType::Q8_0, TensorType::F16] {
        run(client, &retyped(&few, experts, TensorType::Q8_0), None, false, USUAL);
    }
    // The router of all experts, without their size, in exact mode.
    run(client, &Synthetic { expert_width: 256, layers: 1, ..flash }.model().unwrap(), None, true, USUAL);
    // The whole vocabulary.
    let vocab = Synthetic { layers: 1, experts: 8, ..Synthetic::flash(1) }.model().unwrap();
    for exact in [false, true] {
        run(client, &vocab, None, exact, USUAL);
    }
}

/// The models in the repository, and matrices of every type.
fn small_models(client: &Client) {
    let small = Synthetic { q_rank: 256, out_rank: 128, ..Synthetic::tiny(4) }.model().unwrap();
    for ty in [TensorType::Q4K, TensorType::Q2K, TensorType::Iq2Xxs, TensorType::F16] {
        run(client, &retyped(&small, ty, ty), None, false, USUAL);
    }
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/ds4-nano/ds4-nano.gguf");
    let mut models = vec![(Gguf::open(nano).unwrap(), None)];
    for name in ["dev-f16", "dev-q2mix"] {
        let fixture = Fixture::shipped(name);
        models.push((fixture.model().unwrap(), fixture.draft().unwrap()));
    }
    for (file, draft) in models {
        for exact in [false, true] {
            run(client, &file, draft.as_ref(), exact, &FORMATS);
        }
    }
}

/// Kernels that exist: `kernels::file::name`.
fn declared() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let file = path.file_stem().unwrap().to_str().unwrap();
        for part in text.split("#[cube(launch").skip(1) {
            let name = part.split_once("fn ").unwrap().1.split(['(', '<']).next().unwrap();
            all.insert(format!("kernels::{file}::{name}"));
        }
    }
    all
}

/// What is wrong with a kernel.
fn problems(kernel: &Launched, limits: &Limits) -> Vec<String> {
    let mut problems = Vec::new();
    let mut limit = |what: &str, n: usize, most: usize| {
        if n > most {
            problems.push(format!("{n} {what}, at most {most} are possible"));
        }
    };
    // Scalars are in one more, which counts with those of the kernel if it is no uniform buffer.
    limit("buffers", kernel.buffers + usize::from(!kernel.uniform), limits.buffers);
    limit("units of a cube", kernel.units as usize, limits.units);
    limit("cubes", kernel.cubes as usize, limits.cubes);
    match &kernel.compiled {
        Ok(source) => limit("bytes of shared memory", source.shared, limits.shared),
        Err(e) => problems.push(e.clone()),
    }
    problems
}

/// For the devices' own compilers.
fn write_sources(folder: &Path, kernels: &[Launched], ending: &str) {
    for (i, kernel) in kernels.iter().enumerate() {
        if let Ok(source) = &kernel.compiled {
            let name = format!("{i:03}-{}.{}", kernel.path.replace("::", "-"), ending);
            std::fs::write(folder.join(name), format!("// {}\n{}", kernel.id, source.text)).unwrap();
        }
    }
}

/// What is wrong with the kernels that were launched.
fn check(kernels: &[Launched], limits: &Limits) -> Vec<String> {
    let buffers = kernels.iter().map(|k| k.buffers).max();
    let shared = kernels.iter().filter_map(|k| Some(k.compiled.as_ref().ok()?.shared)).max();
    let units = kernels.iter().map(|k| k.units).max();
    println!(
        "{} kernels, at most {units:?} units, {buffers:?} buffers and {shared:?} bytes of shared memory",
        kernels.len()
    );
    kernels
        .iter()
        .flat_map(|k| problems(k, limits).into_iter().map(move |p| format!("{}: {p}\n  {}", k.path, k.id)))
        .collect()
}

#[test]
fn every_kernel_compiles_for_metal() {
    let client = device::client(Language::Metal);
    small_models(&client);
    flash(&client);
    let kernels = device::kernels(&client, Language::Metal);
    if let Ok(folder) = std::env::var("DS4_METAL_SOURCES") {
        write_sources(Path::new(&folder), &kernels, "metal");
    }
    let mut wrong = check(&kernels, &METAL);
    let launched: BTreeSet<_> = kernels.iter().map(|k| k.path.clone()).collect();
    let not_launched =
        declared().into_iter().filter(|path| !launched.contains(path) && !FOR_CUDA.contains(&path.as_str()));
    wrong.extend(not_launched.map(|path| format!("{path}: no pass here launches it")));
    assert!(wrong.is_empty(), "{} problems of {} kernels:\n{}", wrong.len(), kernels.len(), wrong.join("\n"));
}

/// Where kernels are compiled to PTX they have instructions of their own.
#[test]
fn kernels_of_flash_compile_for_cuda() {
    let client = device::client(Language::Cuda);
    let few = Synthetic { vocab: 512, experts: 8, ..Synthetic::flash(4) }.model().unwrap();
    run(&client, &few, Some(&draft(&few)), false, &FORMATS);
    for experts in [TensorType::Q4K, TensorType::Q8_0, TensorType::F16] {
        run(&client, &retyped(&few, experts, TensorType::Q8_0), None, false, USUAL);
    }
    let kernels = device::kernels(&client, Language::Cuda);
    if let Ok(folder) = std::env::var("DS4_CUDA_SOURCES") {
        write_sources(Path::new(&folder), &kernels, "cu");
    }
    let wrong = check(&kernels, &CUDA);
    assert!(wrong.is_empty(), "{} problems of {} kernels:\n{}", wrong.len(), kernels.len(), wrong.join("\n"));
    let text = |path: &str| {
        let kernel = kernels.iter().find(|k| k.path == path).unwrap();
        &kernel.compiled.as_ref().unwrap().text
    };
    for instruction in ["prmt.b32", "ld.global.L1::no_allocate.v4.u32", "ld.shared.u32", "__dp4a"] {
        assert!(text("kernels::experts::hidden").contains(instruction), "{instruction}");
    }
    assert!(text("kernels::matmul::matmul").contains("mma.sync"));
    for path in FOR_CUDA {
        assert!(text(path).contains("cp.async.bulk"), "{path}");
    }
}

/// Caches that take what was said when the backend was made lie together, whatever the device adds to each: else no pass
/// could have them all.
#[test]
fn sessions_that_were_announced_make_one_pass() {
    const SESSIONS: usize = 16;
    let client = device::client(Language::Metal);
    let file = Synthetic::tiny(4).model().unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let layout = Layout::new(&shape, KvFormat::Packed, false, 1 << 20, ROWS);
    let kv_bytes = SESSIONS as u64 * layout.bytes();
    // More than any backend keeps without being told.
    assert!(kv_bytes > 256 << 20);
    let devices = [DeviceInfo::of_client(Api::Metal, client)];
    let mut gpu =
        Gpu::new(&shape, &devices, Options { max_rows: ROWS, kv_bytes, ..Options::default() }).unwrap();
    let model = Model::load(&mut gpu, &file, None).unwrap();
    let mut pass = Pass::new(&mut gpu, &shape, ROWS).unwrap();
    let mut stores: Vec<_> = (0..SESSIONS).map(|_| gpu.store(&layout).unwrap()).collect();
    let mut logits = Logits::default();
    let run = |store| Run { store, start: 0, tokens: &[1], want: Want::All };
    let mut runs: Vec<_> = stores.iter_mut().map(run).collect();
    pass.forward(&model, &mut gpu, &layout, &mut runs, &mut logits, &mut NoTap).unwrap();
}
