//! Bytes of weights per second of every kernel, beside the read bandwidth that bounds them, which is measured in the same process; and on
//! all cores, reading and multiplying the same weights in turns. `cargo bench -p ds4-cpu`.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ds4_cpu::kernels::{Columns, Input, Kernels, Level};
use ds4_cpu::{in_huge_pages, read_bandwidth, read_once};
use ds4_gguf::TensorType;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Width of Flash's model rows.
const WIDTH: usize = 4096;
/// Weight rows that meet many activation rows.
const MANY: usize = 32;
/// Well beyond the caches.
const BYTES: usize = 256 << 20;

/// Activations of `n` rows, in every form.
struct Panel {
    floats: Vec<f32>,
    q: Vec<i8>,
    d: Vec<f32>,
    sums: Vec<i16>,
    offsets: Vec<i32>,
    index: Vec<u32>,
}

impl Panel {
    /// In the form `input`.
    fn columns(&self, input: Input) -> Columns<'_> {
        let (q, d): (&[i8], &[f32]) = if input == Input::Float { (&[], &[]) } else { (&self.q, &self.d) };
        Columns {
            floats: &self.floats,
            q,
            d,
            sums: &self.sums,
            offsets: &self.offsets,
            stride: WIDTH,
            offset: 0,
            len: WIDTH,
            index: &self.index,
        }
    }
}

fn panel(n: usize) -> Panel {
    let len = n * WIDTH;
    Panel {
        floats: (0..len).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect(),
        q: (0..len).map(|i| (i % 255) as u8 as i8).map(|v| v.max(-127)).collect(),
        d: vec![0.01; len / 32],
        sums: vec![3; len / 16],
        offsets: vec![-768; len / 32],
        index: (0..n as u32).collect(),
    }
}

/// Rows of random blocks; the bits of scales are cleared so that no sum becomes NaN.
fn rows(ty: TensorType) -> (impl std::ops::Deref<Target = [u8]>, usize) {
    let row = ty.bytes_of(WIDTH as u64) as usize;
    let mut state = 1u32;
    let mut bytes = in_huge_pages(BYTES / row * row).unwrap();
    for byte in &mut bytes[..] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8 & 0x3f;
    }
    if ty == TensorType::F16 {
        bytes.iter_mut().skip(1).step_by(2).for_each(|b| *b &= 0x33);
    }
    (bytes, row)
}

/// Every format at every level: one activation row with weights from memory, bytes a second; and many rows with weights
/// from the second cache, multiply-adds a second.
fn kernels(c: &mut Criterion) {
    use TensorType as T;
    println!("one thread reads {:.1} GiB/s", read_bandwidth(1).unwrap() / f64::from(1 << 30));
    for ty in [T::Q8_0, T::Iq2Xxs, T::Q2K, T::Q4K, T::F16, T::F32] {
        let (weights, row) = rows(ty);
        for n in [1, 4, 64] {
            let (weights, what, throughput) = match n {
                1 => (&weights[..], "bytes of weights", Throughput::Bytes(weights.len() as u64)),
                n => {
                    let macs = (MANY * WIDTH * n) as u64;
                    (&weights[..MANY * row], "multiply-adds", Throughput::Elements(macs))
                }
            };
            let mut group = c.benchmark_group(format!("{ty} x {n} rows, {what}, one thread"));
            group.throughput(throughput).sample_size(10);
            for level in Level::available().into_iter().skip(1) {
                let product = Kernels::new(level).product(ty, false).unwrap();
                let p = panel(n);
                let columns = p.columns(product.input);
                group.bench_function(format!("{level:?}"), |b| {
                    b.iter_batched_ref(
                        || vec![0.0; weights.len() / row * n],
                        |out| product.multiply(weights, row, &columns, black_box(out)),
                        BatchSize::LargeInput,
                    );
                });
            }
            group.finish();
        }
    }
}

/// Seconds of `work` on all threads, from when the first begins to when the last is done.
fn together(everyone: &Barrier, work: impl FnOnce()) -> f64 {
    everyone.wait();
    let start = Instant::now();
    work();
    everyone.wait();
    start.elapsed().as_secs_f64()
}

/// One activation row on all cores: each reads its weights and multiplies them, in turns, as memory is faster at one time than at another.
fn all_cores(ty: TensorType, threads: usize) {
    const ROUNDS: usize = 11;
    const TASK: usize = 128;
    let everyone = Barrier::new(threads);
    let core = || {
        let (weights, row) = rows(ty);
        let product = Kernels::new(Level::best()).product(ty, false).unwrap();
        let (p, mut out) = (panel(1), vec![0.0; weights.len() / row]);
        let columns = p.columns(product.input);
        let (mut reading, mut multiplying) = ([0.0; ROUNDS], [0.0; ROUNDS]);
        for (read, multiplied) in reading.iter_mut().zip(&mut multiplying) {
            *read = together(&everyone, || {
                black_box(read_once(bytemuck::cast_slice(&weights[..weights.len() / 8 * 8])));
            });
            *multiplied = together(&everyone, || {
                for (rows, out) in weights.chunks(TASK * row).zip(out.chunks_mut(TASK)) {
                    product.multiply(rows, row, &columns, black_box(out));
                }
            });
        }
        (weights.len(), [reading, multiplying])
    };
    let cores: Vec<_> = std::thread::scope(|scope| {
        let cores: Vec<_> = (0..threads).map(|_| scope.spawn(core)).collect();
        cores.into_iter().map(|core| core.join().unwrap()).collect()
    });
    let (bytes, mut seconds) = cores[0];
    let [read, multiplied] = seconds.each_mut().map(|seconds| {
        seconds.sort_by(f64::total_cmp);
        (threads * bytes) as f64 / seconds[ROUNDS / 2] / 1e9
    });
    let share = 100.0 * multiplied / read;
    println!("{ty} x 1 row, {threads} threads: {multiplied:.1} GB/s of {read:.1} read, {share:.0} %");
}

fn cores(_: &mut Criterion) {
    use TensorType as T;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for ty in [T::Q8_0, T::Iq2Xxs, T::Q2K, T::Q4K, T::F16] {
        all_cores(ty, threads);
    }
}

criterion_group!(benches, cores, kernels);
criterion_main!(benches);
