//! Milliseconds of every step of a decode step and of a prefill at the widths of Flash, the weights a step reads, and
//! the share of the read bandwidth that this is, which is measured in the same process on as many threads.
//! `cargo bench -p ds4-cpu --bench steps`, of a file instead of random weights with `-- FILE.gguf`: it lies in larger pages.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use ds4_cpu::{Cpu, Options, read_bandwidth};
use ds4_gguf::Gguf;
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Logits, Model, Pass, Run, Tap, Want};
use ds4_testkit::Synthetic;
use std::time::Instant;

/// The names that a tap sees, in order: what ends there, and the tensors that it reads.
const STEPS: [(&str, &str, &[&str]); 12] = [
    ("attn_in", "mixing, norm", &["hc_attn_fn"]),
    (
        "q_low",
        "projections of the input, cache",
        &["attn_q_a.", "attn_kv.", "compressor_kv", "compressor_gate", "indexer.proj"],
    ),
    ("q", "queries", &["attn_q_b", "indexer.attn_q_b"]),
    ("index_rows", "selection", &[]),
    ("heads", "attention", &[]),
    ("out_low", "output, first half", &["attn_output_a"]),
    ("attn_out", "output, second half", &["attn_output_b"]),
    ("ffn_in", "joining, mixing, norm", &["hc_ffn_fn"]),
    ("router_ids", "router", &["ffn_gate_inp"]),
    ("hidden", "experts", &["_exps.", "_shexp."]),
    ("streams", "joining", &[]),
    ("output_in", "output mixing, norm", &["output_hc_fn"]),
];
const HEAD: usize = STEPS.len();

/// Adds up the time from one name to the next.
struct Stopwatch {
    last: Instant,
    seconds: [f64; HEAD + 1],
}

impl Stopwatch {
    fn new() -> Self {
        Stopwatch { last: Instant::now(), seconds: [0.0; HEAD + 1] }
    }

    fn lap(&mut self, step: usize) {
        self.seconds[step] += self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
    }
}

impl Tap for Stopwatch {
    fn wants(&self, _: &str) -> bool {
        false
    }
    fn passed(&mut self, name: &str) {
        let step = name.rsplit('.').next().unwrap_or(name);
        // What is not counted apart belongs to what comes next.
        if let Some(step) = STEPS.iter().position(|(s, ..)| *s == step) {
            self.lap(step);
        }
    }
    fn rows(&mut self, _: &str, _: usize, _: &[f32]) {}
}

/// Bytes of weights that a pass of `rows` rows reads in each step.
fn bytes(file: &Gguf, rows: usize, used: f64) -> [f64; HEAD + 1] {
    let mut out = [0.0; HEAD + 1];
    let touched = 1.0 - (1.0 - used).powi(rows as i32);
    for t in file.tensors() {
        let share = if t.name.contains("_exps.") { touched } else { 1.0 };
        let step = STEPS.iter().position(|(_, _, names)| names.iter().any(|n| t.name.contains(n)));
        let step = if t.name.starts_with("output.") { Some(HEAD) } else { step };
        if let Some(step) = step {
            out[step] += share * t.bytes as f64;
        }
    }
    out
}

struct Bench {
    cpu: Cpu,
    model: Model<Cpu>,
    layout: Layout,
    pass: Pass<Cpu>,
    logits: Logits,
}

impl Bench {
    fn forward(
        &mut self,
        store: &mut <Cpu as Backend>::Store,
        start: usize,
        n: usize,
        watch: &mut Stopwatch,
    ) {
        let vocab = self.model.shape.vocab as u64;
        let token = |i: usize| ((i as u64).wrapping_mul(2_654_435_761) >> 7) % vocab;
        let tokens: Vec<u32> = (start..start + n).map(|i| token(i) as u32).collect();
        let mut runs = [Run { store, start, tokens: &tokens, want: Want::Last }];
        watch.last = Instant::now();
        self.pass
            .forward(&self.model, &mut self.cpu, &self.layout, &mut runs, &mut self.logits, watch)
            .unwrap();
        watch.lap(HEAD);
    }
}

fn print(what: &str, watch: &Stopwatch, passes: usize, bytes: &[f64], bandwidth: f64) {
    println!("\n{what:34} {:>9} {:>9} {:>9} {:>7}", "ms", "MB", "GB/s", "of read");
    let names = STEPS.iter().map(|(_, name, _)| *name).chain(["output"]);
    let line = |name: &str, seconds: f64, bytes: f64| {
        let rate = bytes / seconds;
        let (ms, mb) = (1e3 * seconds, bytes / 1e6);
        println!("  {name:32} {ms:9.3} {mb:9.1} {:9.1} {:5.0} %", rate / 1e9, 100.0 * rate / bandwidth);
    };
    let seconds = watch.seconds.map(|s| s / passes as f64);
    for ((name, seconds), bytes) in names.zip(seconds).zip(bytes) {
        line(name, seconds, *bytes);
    }
    line("all", seconds.iter().sum(), bytes.iter().sum());
}

fn main() {
    let synthetic = Synthetic { experts: 64, vocab: 16_384, ..Synthetic::flash(4) };
    let file = match std::env::args().find(|arg| arg.ends_with(".gguf")) {
        Some(path) => Gguf::open(path).unwrap(),
        None => synthetic.model().unwrap(),
    };
    let (context, rows) = (4096, 256);
    let shape = ds4_model::Shape::from_gguf(&file).unwrap();
    let mut cpu = Cpu::new(&shape, Options { max_rows: rows, ..Options::default() }).unwrap();
    let bandwidth = read_bandwidth(cpu.threads()).unwrap();
    println!("{} threads, {:?} kernels; reads {:.1} GB/s", cpu.threads(), cpu.level(), bandwidth / 1e9);
    let model = Model::load(&mut cpu, &file, None).unwrap();
    let layout = Layout::new(&shape, KvFormat::Packed, false, context, rows);
    let pass = Pass::new(&mut cpu, &shape, rows).unwrap();
    let mut store = cpu.store(&layout).unwrap();
    let mut bench = Bench { cpu, model, layout, pass, logits: Logits::default() };
    let used = shape.experts_used as f64 / shape.experts as f64;

    bench.forward(&mut store, 0, rows, &mut Stopwatch::new());
    let mut prefill = Stopwatch::new();
    const PREFILLS: usize = 8;
    for i in 1..=PREFILLS {
        bench.forward(&mut store, i * rows, rows, &mut prefill);
    }
    const STEPS_TIMED: usize = 64;
    let end = (PREFILLS + 1) * rows;
    let mut decode = Stopwatch::new();
    (0..8).for_each(|i| bench.forward(&mut store, end + i, 1, &mut Stopwatch::new()));
    for i in 0..STEPS_TIMED {
        bench.forward(&mut store, end + 8 + i, 1, &mut decode);
    }
    print(&format!("decode at {end} tokens"), &decode, STEPS_TIMED, &bytes(&file, 1, used), bandwidth);
    let bytes = bytes(&file, rows, used);
    print(&format!("prefill, {rows} tokens a pass"), &prefill, PREFILLS, &bytes, bandwidth);
}
