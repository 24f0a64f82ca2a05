//! Kernels that only NVIDIA's cards run, on this machine's CPU: their CUDA is compiled as C++ in which every unit is a fibre.
//! They must give, bit for bit, what the kernels give that all devices run.
#![cfg(all(feature = "cuda", target_arch = "x86_64", target_os = "linux"))]
#![allow(clippy::panic, clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "sources/device.rs"]
mod device;
#[path = "on_cpu/program.rs"]
mod program;

use device::{Language, Launched};
use ds4_gpu::{Api, DeviceInfo, Gpu, Options};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Logits, Model, NoTap, Pass, Run, Shape, Want};
use ds4_testkit::{Random, Synthetic};
use half::f16;
use program::Program;
use std::sync::OnceLock;

/// Experts of the model: few.
const EXPERTS: usize = 8;
/// Width of the model.
const WIDTH: usize = 4096;
/// Of the shared expert's hidden activations.
const HIDDEN: usize = 2048;
/// Values of all heads, and what the first output matrix makes of them.
const HEADS: usize = 32768;
const LOW: usize = 8192;
/// Streams, and numbers of them: controls, and products with each other.
const STREAMS: usize = 4;
const NUMBERS: usize = 24 + 10;
/// Cubes that join a sublayer's output into the streams.
const PARTS: usize = 128;

/// Every kernel of decode steps at Flash's shape, of one row and of a few.
fn kernels() -> &'static [Launched] {
    static KERNELS: OnceLock<Vec<Launched>> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let client = device::client(Language::Cuda);
        let file = Synthetic { vocab: 512, experts: EXPERTS, ..Synthetic::flash(4) }.model().unwrap();
        let shape = Shape::from_gguf(&file).unwrap();
        let devices = [DeviceInfo::of_client(Api::Cuda, client.clone())];
        let mut gpu = Gpu::new(&shape, &devices, Options { max_rows: 16, ..Options::default() }).unwrap();
        let model = Model::load(&mut gpu, &file, None).unwrap();
        let mut pass = Pass::new(&mut gpu, &shape, 16).unwrap();
        let layout = Layout::new(&shape, KvFormat::Packed, false, 1024, 16);
        let mut store = gpu.store(&layout).unwrap();
        let mut logits = Logits::default();
        // So many that attention is split.
        let mut start = 0;
        for n in [16; 40].into_iter().chain([2, 1]) {
            let mut runs = [Run { store: &mut store, start, tokens: &[1; 16][..n], want: Want::Last }];
            pass.forward(&model, &mut gpu, &layout, &mut runs, &mut logits, &mut NoTap).unwrap();
            start += n;
        }
        device::kernels(&client, Language::Cuda)
    })
}

/// The first of a file's kernels whose comptime arguments hold all of these.
fn program(path: &str, with: &[&str]) -> Program {
    let found = kernels().iter().find(|k| k.path == path && with.iter().all(|w| k.id.contains(w)));
    let kernel = found.unwrap_or_else(|| panic!("no pass launches {path} with {with:?}"));
    Program::new(&kernel.compiled.as_ref().unwrap().text, kernel.units)
}

/// Of `-1..1`.
fn float(random: &mut Random) -> f32 {
    random.value(1.0 / 3f32.sqrt())
}

fn bytes(random: &mut Random, n: usize) -> Vec<u8> {
    let mut out = vec![0; n];
    random.bytes(&mut out);
    out
}

fn floats(random: &mut Random, n: usize, scale: f32) -> Vec<u8> {
    (0..n).flat_map(|_| (scale * float(random)).to_le_bytes()).collect()
}

/// Scales, which are positive.
fn scales(random: &mut Random, n: usize, scale: f32) -> Vec<u8> {
    (0..n).flat_map(|_| f16::from_f32(scale * (0.75 + 0.5 * float(random))).to_le_bytes()).collect()
}

/// A row of activations in all forms: f32, int8, scales, sums, f16.
fn forms(width: usize) -> [Vec<u8>; 5] {
    [4 * width, width, width / 8, width / 4, 2 * width].map(|bytes| vec![0; bytes])
}

/// What a sublayer's output is joined into: streams, post and comb, control matrix, and what becomes of their products.
#[derive(Clone)]
struct Streams {
    streams: Vec<u8>,
    mix: Vec<u8>,
    control: Vec<u8>,
    partial: Vec<u8>,
}

impl Streams {
    fn new(random: &mut Random) -> Self {
        let mix = floats(random, 64, 1.0);
        Streams {
            streams: floats(random, STREAMS * WIDTH, 1.0),
            mix,
            control: scales(random, 24 * STREAMS * WIDTH, 0.1),
            partial: vec![0; 4 * PARTS * NUMBERS],
        }
    }
}

/// What cubes tell each other, and the number of the last launch.
fn told() -> [Vec<u8>; 2] {
    [vec![0; 1 << 17], vec![41, 0, 0, 0]]
}

#[test]
fn output_of_attention_in_one_kernel_is_that_in_three() {
    let combine = program("kernels::flash::combine", &["form: Quantized", "groups: 4"]);
    let project = program("kernels::project::project_quantized", &["per_cube: 32"]);
    let join = program("kernels::join::project_join", &["f16", "controls: 24"]);
    let one = program("kernels::output::attention_output", &["f16", "controls: 24"]);
    for splits in [13, 100] {
        let r = &mut Random::new(1);
        let mut partial = floats(r, splits * HEADS, 3.0);
        let mut stats: Vec<u8> = (0..64 * splits)
            .flat_map(|_| [2.0 * float(r), 0.1 + float(r).abs()])
            .flat_map(f32::to_le_bytes)
            .collect();
        let (mut sinks, mut angles) = (floats(r, 64, 1.0), floats(r, 256, 1.0));
        let (mut first, mut first_scales) = (bytes(r, LOW * 4096), scales(r, LOW * 128, 0.001));
        let (mut last, mut last_scales) = (bytes(r, WIDTH * LOW), scales(r, WIDTH * LOW / 32, 0.001));
        let mut expected = Streams::new(r);
        let mut got = expected.clone();
        let mut words = vec![0; 4096];

        let [mut values, mut quants, mut scales, mut sums, mut halves] = forms(HEADS);
        combine.run(
            [64, 1, 1],
            &[0, 8, splits as u32],
            &mut [
                &mut partial,
                &mut stats,
                &mut sinks,
                &mut angles,
                &mut values,
                &mut quants,
                &mut scales,
                &mut sums,
                &mut halves,
            ],
        );
        let [mut low, mut low_quants, mut low_scales, mut low_sums, mut low_halves] = forms(LOW);
        project.run(
            [LOW as u32 / 32, 1, 1],
            &[1],
            &mut [
                &mut values,
                &mut quants,
                &mut scales,
                &mut sums,
                &mut first,
                &mut first_scales,
                &mut words,
                &mut low,
                &mut low_quants,
                &mut low_scales,
                &mut low_sums,
                &mut low_halves,
            ],
        );
        let e = &mut expected;
        join.run(
            [PARTS as u32, 1, 1],
            &[1],
            &mut [
                &mut low,
                &mut low_quants,
                &mut low_scales,
                &mut low_sums,
                &mut last,
                &mut last_scales,
                &mut words,
                &mut e.streams,
                &mut e.mix,
                &mut e.control,
                &mut e.partial,
            ],
        );

        let [mut told, mut turn] = told();
        let g = &mut got;
        one.run(
            [PARTS as u32, 1, 1],
            &[8, splits as u32],
            &mut [
                &mut partial,
                &mut stats,
                &mut sinks,
                &mut angles,
                &mut first,
                &mut first_scales,
                &mut last,
                &mut last_scales,
                &mut told,
                &mut turn,
                &mut g.streams,
                &mut g.mix,
                &mut g.control,
                &mut g.partial,
            ],
        );
        assert_eq!(turn, [42, 0, 0, 0]);
        assert!(e.streams == g.streams, "{splits} splits: streams");
        assert!(e.partial == g.partial, "{splits} splits: products of the streams");
    }
}

/// The router, and gate and up of the shared expert.
fn products(random: &mut Random) -> [Vec<u8>; 5] {
    let mut q8 = || [bytes(random, HIDDEN * WIDTH), scales(random, HIDDEN * WIDTH / 32, 0.001)];
    let ([gate, gate_scales], [up, up_scales]) = (q8(), q8());
    [scales(random, EXPERTS * WIDTH, 0.1), gate, gate_scales, up, up_scales]
}

#[test]
fn products_that_mix_their_input_are_those_of_the_mix() {
    let r = &mut Random::new(1);
    let mut streams = floats(r, STREAMS * WIDTH, 1.0);
    let mut partial = floats(r, PARTS * NUMBERS, 1.0);
    // Products of streams with themselves are positive.
    for numbers in partial.chunks_exact_mut(4 * NUMBERS) {
        for pair in [0, 4, 7, 9] {
            numbers[4 * (24 + pair)..][..4].copy_from_slice(&100f32.to_le_bytes());
        }
    }
    let (mut control, mut norm) = (floats(r, 64, 0.5), floats(r, WIDTH, 1.0));
    let [mut router, mut gate, mut gate_scales, mut up, mut up_scales] = products(r);
    let outputs = || [vec![0; 4 * 64], vec![0; 4 * HIDDEN], vec![0; 4 * HIDDEN]];

    let ([mut values, mut quants, mut scales, mut sums, mut halves], mut totals) =
        (forms(WIDTH), vec![0; 4 * NUMBERS]);
    let mut mix = vec![0; 4 * 64];
    program("kernels::hyper::hc_mix", &["all: false", "form: Quantized"]).run(
        [1, 2, 1],
        &[],
        &mut [
            &mut streams,
            &mut partial,
            &mut control,
            &mut norm,
            &mut values,
            &mut quants,
            &mut scales,
            &mut sums,
            &mut halves,
            &mut mix,
            &mut totals,
        ],
    );
    let [mut logits, mut gated, mut upped] = outputs();
    // Eight planes of a cube have a row each.
    let cubes = [EXPERTS, HIDDEN, HIDDEN].map(|rows| rows as u32 / 8);
    let project =
        program("kernels::project::project", &["columns: 2", "format: F16", "rows: 8,", "rows: 2048"]);
    project.run(
        [cubes.iter().sum(), 1, 1],
        &[0, cubes[0], cubes[0] + cubes[1], 1],
        &mut [
            &mut values,
            &mut quants,
            &mut scales,
            &mut sums,
            &mut router,
            &mut logits,
            &mut gate,
            &mut gate_scales,
            &mut gated,
            &mut up,
            &mut up_scales,
            &mut upped,
            &mut vec![0; 4096],
        ],
    );

    let [mut mixed, mut mixed_quants, mut mixed_scales, mut mixed_sums, mut halves] = forms(WIDTH);
    let ([mut logits_mixed, mut gated_mixed, mut upped_mixed], mut totals_mixed) =
        (outputs(), vec![0; 4 * NUMBERS]);
    // Every processor has a row of every so many.
    let (processors, rows) = (132, [EXPERTS, HIDDEN].map(|rows| rows.div_ceil(132) as u32));
    program("kernels::mixed::project_mixed", &["rows: 8,", "rows: 2048"]).run(
        [processors, 1, 1],
        &[0, rows[0], rows[0] + rows[1]],
        &mut [
            &mut streams,
            &mut partial,
            &mut control,
            &mut norm,
            &mut totals_mixed,
            &mut mixed,
            &mut mixed_quants,
            &mut mixed_scales,
            &mut mixed_sums,
            &mut halves,
            &mut router,
            &mut logits_mixed,
            &mut gate,
            &mut gate_scales,
            &mut gated_mixed,
            &mut up,
            &mut up_scales,
            &mut upped_mixed,
        ],
    );
    assert!(totals == totals_mixed, "numbers of the streams");
    assert!(values == mixed, "the mix");
    assert!([quants, scales, sums] == [mixed_quants, mixed_scales, mixed_sums], "the mix in int8");
    assert!([logits, gated, upped] == [logits_mixed, gated_mixed, upped_mixed], "products");
}
