//! The whole model against logits and activations of independent implementations.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use ds4_cpu::{Cpu, Options};
use ds4_gguf::Gguf;
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Logits, Model, NoTap, Pass, Run, Shape, Tap, Want};
use ds4_testkit::{Fixture, Taps};

struct Loaded {
    backend: Cpu,
    model: Model<Cpu>,
    pass: Pass<Cpu>,
    layout: Layout,
}

const MAX_ROWS: usize = 256;

fn load(fixture: &Fixture, exact: bool, kv: KvFormat) -> Loaded {
    let file = Gguf::open(fixture.path("model.gguf")).unwrap();
    let mtp = fixture.path("mtp.gguf");
    let mtp = mtp.exists().then(|| Gguf::open(mtp).unwrap());
    let shape = Shape::from_gguf(&file).unwrap();
    let mut backend = Cpu::new(&shape, Options { exact, max_rows: MAX_ROWS, ..Options::default() }).unwrap();
    let model = Model::load(&mut backend, &file, mtp.as_ref()).unwrap();
    let pass = Pass::new(&mut backend, &shape, MAX_ROWS).unwrap();
    let layout = Layout::new(&shape, kv, model.weights.mtp.is_some(), 4096, MAX_ROWS);
    Loaded { backend, model, pass, layout }
}

impl Loaded {
    /// Logits of every position, in chunks of the given sizes (the last repeats).
    fn run(&mut self, tokens: &[u32], chunks: &[usize], tap: &mut (dyn Tap + Send)) -> Vec<f32> {
        let mut store = self.backend.store(&self.layout).unwrap();
        let (mut all, mut logits, mut start) = (Vec::new(), Logits::default(), 0);
        let mut sizes = chunks.iter().chain(std::iter::repeat(chunks.last().unwrap()));
        while start < tokens.len() {
            let end = (start + sizes.next().unwrap()).min(tokens.len());
            let mut runs = [Run { store: &mut store, start, tokens: &tokens[start..end], want: Want::All }];
            self.pass
                .forward(&self.model, &mut self.backend, &self.layout, &mut runs, &mut logits, tap)
                .unwrap();
            all.extend_from_slice(&logits.values);
            start = end;
        }
        all
    }
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap()
}

/// Largest difference at each stored position, and the share of equal argmax.
fn against(got: &[f32], fixture: &Fixture, name: &str) -> (Vec<f32>, f64) {
    let want = fixture.array(name).unwrap();
    let positions = fixture.array("logit_positions").unwrap().ids();
    let vocab = want.shape[1];
    let mut agree = 0;
    let mut worst: Vec<f32> = Vec::new();
    for (i, p) in positions.iter().enumerate() {
        let (got, want) = (&got[p * vocab..(p + 1) * vocab], want.row(i));
        worst.push(got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max));
        agree += usize::from(argmax(got) == argmax(want));
    }
    worst.sort_by(f32::total_cmp);
    (worst, agree as f64 / positions.len() as f64)
}

fn percentile(sorted: &[f32], p: f64) -> f32 {
    sorted[((sorted.len() - 1) as f64 * p) as usize]
}

fn exact_without_rounding(fixture: &Fixture) {
    let mut m = load(fixture, true, KvFormat::Plain);
    let tokens = fixture.tokens().unwrap();
    let mut taps = Taps::default();
    let logits = m.run(&tokens, &[MAX_ROWS], &mut taps);
    let (worst, agree) = against(&logits, fixture, "logits");
    println!(
        "exact: median {:.1e}, worst {:.1e}, argmax {agree}",
        percentile(&worst, 0.5),
        worst.last().unwrap()
    );
    assert!(*worst.last().unwrap() < 1e-4, "worst {worst:?}");
    assert_eq!(agree, 1.0);
    activations(fixture, &taps, &m.model.shape);
}

fn activations(fixture: &Fixture, taps: &Taps, shape: &Shape) {
    let probes = fixture.array("probe_positions").unwrap().ids();
    let near = |name: &str, p: usize, want: &[f32]| {
        let got = taps.row(name, p);
        assert_eq!(got.len(), want.len(), "{name}");
        let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{name} at position {p}: {worst}");
    };
    let streams = fixture.array("streams").unwrap();
    let (attn, ffn) = (fixture.array("attn_out").unwrap(), fixture.array("ffn_out").unwrap());
    for (i, &p) in probes.iter().enumerate() {
        let width = shape.streams_width();
        near("embed", p, &streams.row(0)[i * width..(i + 1) * width]);
        for l in 0..shape.layers.len() {
            near(&format!("blk.{l}.streams"), p, &streams.row(l + 1)[i * width..(i + 1) * width]);
            near(&format!("blk.{l}.attn_out"), p, &attn.row(l)[i * shape.width..(i + 1) * shape.width]);
            near(&format!("blk.{l}.ffn_out"), p, &ffn.row(l)[i * shape.width..(i + 1) * shape.width]);
        }
    }
    let routes = fixture.array("router_ids").unwrap();
    for l in 0..shape.layers.len() {
        for (p, want) in routes.row(l).chunks(shape.experts_used).enumerate() {
            let mut want = want.to_vec();
            want.sort_by(f32::total_cmp);
            assert_eq!(taps.row(&format!("blk.{l}.router_ids"), p), want, "layer {l} position {p}");
        }
    }
    let mut dropped = 0;
    for (l, p, want) in fixture.indexer_rows().unwrap() {
        // Positions that see no more than top_k rows attend to all; nothing is selected there.
        if (p + 1) / 4 > shape.index_top_k {
            let got: Vec<usize> =
                taps.row(&format!("blk.{l}.index_rows"), p).iter().map(|&v| v as usize).collect();
            assert_eq!(got, want, "layer {l} position {p}");
            dropped += 1;
        }
    }
    assert!(dropped > 0, "the fixture exercises selection");
}

fn with_model_rounding(fixture: &Fixture) {
    let mut m = load(fixture, true, KvFormat::Rounded);
    let logits = m.run(&fixture.tokens().unwrap(), &[MAX_ROWS], &mut NoTap);
    let (worst, agree) = against(&logits, fixture, "logits_qat");
    let (median, p95) = (percentile(&worst, 0.5), percentile(&worst, 0.95));
    println!("rounded: median {median:.1e}, 95 % {p95:.1e}, argmax {agree}");
    assert!(median < 5e-3 && p95 < 5e-2 && agree >= 0.99, "median {median}, 95 % {p95}, argmax {agree}");
}

/// The default mode can only be judged as a distribution (architecture A.14).
fn default_mode(fixture: &Fixture) {
    let mut m = load(fixture, false, KvFormat::Packed);
    let logits = m.run(&fixture.tokens().unwrap(), &[MAX_ROWS], &mut NoTap);
    let (worst, agree) = against(&logits, fixture, "logits_qat");
    let (median, p95) = (percentile(&worst, 0.5), percentile(&worst, 0.95));
    println!("int8: median {median:.2}, 95 % {p95:.2}, argmax {agree}");
    assert!(median < 0.6 && p95 < 2.0 && agree >= 0.85, "median {median}, 95 % {p95}, argmax {agree}");
}

/// One token at a time, odd chunks and whole chunks give the same bits.
fn chunking_changes_nothing(fixture: &Fixture, exact: bool, kv: KvFormat, tokens: usize) {
    let mut m = load(fixture, exact, kv);
    let tokens = &fixture.tokens().unwrap()[..tokens];
    let whole = m.run(tokens, &[MAX_ROWS], &mut NoTap);
    for chunks in [&[1][..], &[1, 2, 3, 5, 130, 7, 64, 31, 4, 1, 1, 9]] {
        let parts = m.run(tokens, chunks, &mut NoTap);
        let first = whole.iter().zip(&parts).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(
            first.map(|i| i / m.model.shape.vocab),
            None,
            "chunks {chunks:?}: first differing position"
        );
    }
}

/// A batch of sessions at different places gives every session what it gets alone.
fn batching_changes_nothing(fixture: &Fixture, exact: bool, kv: KvFormat) {
    let mut m = load(fixture, exact, kv);
    let tokens = fixture.tokens().unwrap();
    let vocab = m.model.shape.vocab;
    // Three timelines: the fixture's, its reverse, and one that starts in its middle.
    let lines: [Vec<u32>; 3] =
        [tokens[..300].to_vec(), tokens[..300].iter().rev().copied().collect(), tokens[20..320].to_vec()];
    let alone: Vec<Vec<f32>> = lines.iter().map(|l| m.run(l, &[MAX_ROWS], &mut NoTap)).collect();
    let mut stores: Vec<_> = (0..3).map(|_| m.backend.store(&m.layout).unwrap()).collect();
    let mut done = [0usize; 3];
    let mut logits = Logits::default();
    // Prefill chunks of some beside single tokens of others.
    let shares = [[100, 1, 0], [1, 50, 3], [30, 1, 1], [1, 1, 1], [0, 120, 1], [68, 1, 90]];
    for share in shares {
        let mut runs: Vec<_> = Vec::new();
        for (i, store) in stores.iter_mut().enumerate().filter(|(i, _)| share[*i] > 0) {
            let tokens = &lines[i][done[i]..done[i] + share[i]];
            runs.push(Run { store, start: done[i], tokens, want: Want::All });
        }
        m.pass.forward(&m.model, &mut m.backend, &m.layout, &mut runs, &mut logits, &mut NoTap).unwrap();
        let mut at = 0;
        for i in (0..3).filter(|&i| share[i] > 0) {
            let n = share[i] * vocab;
            let want = &alone[i][done[i] * vocab..done[i] * vocab + n];
            assert!(
                want.iter().zip(&logits.values[at..at + n]).all(|(a, b)| a.to_bits() == b.to_bits()),
                "timeline {i}"
            );
            at += n;
            done[i] += share[i];
        }
    }
}

fn draft_block(fixture: &Fixture) {
    let mut m = load(fixture, true, KvFormat::Plain);
    let tokens = fixture.tokens().unwrap();
    let mut store = m.backend.store(&m.layout).unwrap();
    let (mut all, mut logits) = (Vec::new(), Logits::default());
    let last = tokens.len() - 1;
    for start in (0..last).step_by(100) {
        let end = (start + 100).min(last);
        let mut runs = [Run { store: &mut store, start, tokens: &tokens[start..end], want: Want::Nothing }];
        m.pass.forward(&m.model, &mut m.backend, &m.layout, &mut runs, &mut logits, &mut NoTap).unwrap();
        let mut runs =
            [Run { store: &mut store, start, tokens: &tokens[start + 1..end + 1], want: Want::All }];
        m.pass.draft(&m.model, &mut m.backend, &m.layout, &mut runs, &mut logits, &mut NoTap).unwrap();
        all.extend_from_slice(&logits.values);
    }
    let want = fixture.array("mtp_logits").unwrap();
    let vocab = m.model.shape.vocab;
    for (i, p) in fixture.array("mtp_positions").unwrap().ids().into_iter().enumerate() {
        let got = &all[p * vocab..(p + 1) * vocab];
        let worst = got.iter().zip(want.row(i)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "position {p}: {worst}");
    }
}

macro_rules! fixture_tests {
    ($($module:ident: $name:literal;)*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn exact_equals_the_reference() {
                exact_without_rounding(&Fixture::shipped($name));
            }

            #[test]
            fn rounding_equals_the_reference() {
                with_model_rounding(&Fixture::shipped($name));
            }

            #[test]
            fn default_mode_is_near() {
                default_mode(&Fixture::shipped($name));
            }

            #[test]
            fn chunks_in_exact_mode() {
                chunking_changes_nothing(&Fixture::shipped($name), true, KvFormat::Rounded, 320);
            }

            #[test]
            fn chunks_in_default_mode() {
                chunking_changes_nothing(&Fixture::shipped($name), false, KvFormat::Packed, 320);
            }

            #[test]
            fn batches_in_exact_mode() {
                batching_changes_nothing(&Fixture::shipped($name), true, KvFormat::Plain);
            }

            #[test]
            fn batches_in_default_mode() {
                batching_changes_nothing(&Fixture::shipped($name), false, KvFormat::Packed);
            }
        }
    )*};
}

fixture_tests! {
    dev_f16: "dev-f16";
    dev_q2mix: "dev-q2mix";
}

#[test]
fn a_pass_without_rows_changes_nothing() {
    let mut m = load(&Fixture::shipped("dev-f16"), false, KvFormat::Packed);
    let mut stores: Vec<_> = (0..2).map(|_| m.backend.store(&m.layout).unwrap()).collect();
    let mut logits = Logits::default();
    let mut forward = |m: &mut Loaded, tokens: [&[u32]; 2]| {
        let runs = stores.iter_mut().zip(tokens);
        let mut runs: Vec<_> =
            runs.map(|(store, tokens)| Run { store, start: 0, tokens, want: Want::All }).collect();
        m.pass.forward(&m.model, &mut m.backend, &m.layout, &mut runs, &mut logits, &mut NoTap).unwrap();
        logits.values.clone()
    };
    assert!(forward(&mut m, [&[], &[]]).is_empty());
    let alone = forward(&mut m, [&[5, 6], &[]]);
    assert!(forward(&mut m, [&[], &[5, 6]]) == alone);
}

#[test]
fn draft_equals_the_reference() {
    draft_block(&Fixture::shipped("dev-f16"));
}
