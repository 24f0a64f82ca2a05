//! Runs one kernel once in the function `measured`, whose instructions `.ci/counts` counts. Without a name: prints all names.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use ds4_cpu::kernels::index::IndexQuery;
use ds4_cpu::kernels::{Columns, Input, Kernels, Level, TILE, Tile};
use ds4_gguf::TensorType;
use ds4_quant::act::{quantize_32, quantize_256};
use std::hint::black_box;

/// Width of Flash's model rows.
const WIDTH: usize = 4096;
/// Weight rows.
const ROWS: usize = 16;

/// Keeps the work of a kernel apart from that of making its input.
#[inline(never)]
fn measured(work: impl FnOnce()) {
    work();
}

/// Bytes of no pattern, small enough that scales are sane.
fn bytes(n: usize) -> Vec<u8> {
    let next = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some((*state >> 24) as u8 & 0x3f)
    };
    std::iter::repeat_n((), n).scan(1, |state, ()| next(state)).collect()
}

fn floats(n: usize) -> Vec<f32> {
    bytes(n).into_iter().map(|b| f32::from(b) / 16.0 - 2.0).collect()
}

/// 16 weight rows of a type with `columns` activation rows.
fn product(kernels: &Kernels, ty: TensorType, columns: usize) {
    let row = ty.bytes_of(WIDTH as u64) as usize;
    let (weights, x) = (bytes(ROWS * row), floats(columns * WIDTH));
    let product = kernels.product(ty, false).unwrap();
    let (mut q, mut d) = (vec![0; x.len()], vec![0.0; x.len() / 32]);
    let mut sums = vec![0; x.len() / 16];
    match product.input {
        Input::Float => {}
        Input::Int32 => quantize_32(&x, &mut q, &mut d),
        Input::Int256 | Input::Planes256 => quantize_256(&x, &mut q, &mut d, &mut sums),
    }
    let offsets = vec![0; x.len() / 32];
    let index: Vec<u32> = (0..columns as u32).collect();
    let columns = Columns {
        floats: &x,
        q: &q,
        d: &d,
        sums: &sums,
        offsets: &offsets,
        stride: WIDTH,
        offset: 0,
        len: WIDTH,
        index: &index,
    };
    let mut out = vec![0.0; ROWS * index.len()];
    // Once before, so that the thread's buffers are there.
    product.multiply(&weights, row, &columns, &mut out);
    measured(|| product.multiply(black_box(&weights), row, &columns, black_box(&mut out)));
}

fn attention(kernels: &Kernels, weigh: bool) {
    let (width, heads) = (512, 64);
    let (q, rows) = (floats(heads * width), floats(TILE * width));
    let tile = Tile { rows: &rows, n: TILE, width, stride: width };
    let (mut scores, mut out) = (vec![0.5; heads * TILE], vec![0.0; heads * width]);
    if weigh {
        measured(|| (kernels.weigh)(black_box(&scores), &tile, black_box(&mut out)));
    } else {
        measured(|| (kernels.scores)(black_box(&q), &tile, black_box(&mut scores)));
    }
}

fn index(kernels: &Kernels) {
    let (heads, dim) = (64, 128);
    let unit = dim / 2 + dim / 32;
    let mut query = IndexQuery::default();
    query.load(&bytes(heads * unit), &floats(heads), dim);
    let (keys, mut scores) = (bytes(64 * unit), vec![0.0; 64]);
    measured(|| (kernels.index_scores)(&query, black_box(&keys), black_box(&mut scores)));
}

fn activations(per: Input) {
    let x = floats(WIDTH);
    let (mut q, mut d, mut sums) = (vec![0; WIDTH], vec![0.0; WIDTH / 32], vec![0; WIDTH / 16]);
    if per == Input::Int32 {
        measured(|| quantize_32(black_box(&x), &mut q, black_box(&mut d)));
    } else {
        measured(|| quantize_256(black_box(&x), &mut q, black_box(&mut d), &mut sums));
    }
}

fn main() {
    use TensorType as T;
    let types =
        [("q8_0", T::Q8_0), ("iq2_xxs", T::Iq2Xxs), ("q2_k", T::Q2K), ("q4_k", T::Q4K), ("f16", T::F16)];
    // Valgrind knows no wider registers.
    let kernels = Kernels::new(if cfg!(target_arch = "x86_64") { Level::Avx2 } else { Level::best() });
    let name = std::env::args().nth(1).unwrap_or_default();
    let (kind, columns) = name.rsplit_once("_x").unwrap_or((&name, ""));
    match (kind, types.iter().find(|t| t.0 == kind)) {
        (_, Some((_, ty))) => product(&kernels, *ty, columns.parse().unwrap_or(1)),
        ("scores", _) => attention(&kernels, false),
        ("weigh", _) => attention(&kernels, true),
        ("index", _) => index(&kernels),
        ("act32", _) => activations(Input::Int32),
        ("act256", _) => activations(Input::Int256),
        _ => {
            types.iter().for_each(|(name, _)| println!("{name}_x1\n{name}_x4\n{name}_x16"));
            println!("scores\nweigh\nindex\nact32\nact256");
        }
    }
}
