//! The whole model against logits and activations of independent implementations.

use super::{MakeBackend, Outcome};
use crate::conformance::invariance::{Loaded, largest};
use crate::{Fixture, Taps};
use ds4_model::cache::KvFormat;
use ds4_model::{Backend, NoTap, Run, Shape, Want};

fn argmax(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)))
}

/// How far a run's logits are from the reference's.
struct Distances {
    /// Largest difference at each stored position, ascending.
    worst: Vec<f32>,
    /// Share of positions with the same best token.
    agree: f64,
}

impl Distances {
    fn measure(
        got: &[f32],
        fixture: &Fixture,
        name: &str,
        positions: &str,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let want = fixture.array(name)?;
        let positions = fixture.array(positions)?.ids();
        let vocab = want.shape[1];
        let mut agree = 0;
        let mut worst = Vec::new();
        for (i, p) in positions.iter().enumerate() {
            let (got, want) = (&got[p * vocab..(p + 1) * vocab], want.row(i));
            worst.push(largest(got, want));
            agree += usize::from(argmax(got) == argmax(want));
        }
        worst.sort_by(f32::total_cmp);
        Ok(Distances { worst, agree: agree as f64 / positions.len() as f64 })
    }

    fn at(&self, share: f64) -> f32 {
        self.worst[((self.worst.len() - 1) as f64 * share) as usize]
    }

    fn outcome(&self, ok: bool) -> Outcome {
        let figures = format!(
            "difference of logits: median {:.1e}, 95 % {:.1e}, worst {:.1e}; same best token {:.1} %",
            self.at(0.5),
            self.at(0.95),
            self.at(1.0),
            100.0 * self.agree
        );
        if ok { Ok(figures) } else { Err(figures.into()) }
    }
}

pub(super) fn exact<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let mut m = Loaded::new(maker, fixture, true, KvFormat::Plain, maker.max_rows())?;
    let mut taps = Taps::default();
    let logits = m.run(&fixture.tokens()?, &[maker.max_rows()], &mut taps)?;
    let distances = Distances::measure(&logits, fixture, "logits", "logit_positions")?;
    let tolerance = maker.exact_tolerance();
    let figures = distances.outcome(distances.at(1.0) < tolerance && distances.agree == 1.0)?;
    activations(fixture, &taps, &m.model.shape, tolerance)?;
    routes(fixture, &taps, &m.model.shape)?;
    selected(fixture, &taps, &m.model.shape)?;
    Ok(figures)
}

/// Every layer's results at some positions.
fn activations(
    fixture: &Fixture,
    taps: &Taps,
    shape: &Shape,
    tolerance: f32,
) -> Result<(), Box<dyn std::error::Error>> {
    let near = |name: &str, p: usize, want: &[f32]| {
        let got = taps.row(name, p);
        let worst = if got.len() == want.len() { largest(got, want) } else { f32::INFINITY };
        if worst < tolerance { Ok(()) } else { Err(format!("{name} at position {p} is {worst} off")) }
    };
    let streams = fixture.array("streams")?;
    let (attn, ffn) = (fixture.array("attn_out")?, fixture.array("ffn_out")?);
    for (i, &p) in fixture.array("probe_positions")?.ids().iter().enumerate() {
        let wide = i * shape.streams_width()..(i + 1) * shape.streams_width();
        let narrow = i * shape.width..(i + 1) * shape.width;
        near("embed", p, &streams.row(0)[wide.clone()])?;
        for l in 0..shape.layers.len() {
            near(&format!("blk.{l}.attn_out"), p, &attn.row(l)[narrow.clone()])?;
            near(&format!("blk.{l}.ffn_out"), p, &ffn.row(l)[narrow.clone()])?;
            near(&format!("blk.{l}.streams"), p, &streams.row(l + 1)[wide.clone()])?;
        }
    }
    Ok(())
}

/// The experts of every position; their order is the backend's, but must be ascending.
fn routes(fixture: &Fixture, taps: &Taps, shape: &Shape) -> Result<(), Box<dyn std::error::Error>> {
    let routes = fixture.array("router_ids")?;
    for l in 0..shape.layers.len() {
        for (p, want) in routes.row(l).chunks(shape.experts_used).enumerate() {
            let mut want = want.to_vec();
            want.sort_by(f32::total_cmp);
            let got = taps.row(&format!("blk.{l}.router_ids"), p);
            if got != want {
                return Err(
                    format!("layer {l}, position {p}: experts {got:?}, the reference has {want:?}").into()
                );
            }
        }
    }
    Ok(())
}

/// The compressed rows that the indexer chooses.
fn selected(fixture: &Fixture, taps: &Taps, shape: &Shape) -> Result<(), Box<dyn std::error::Error>> {
    let mut dropped = 0;
    for (l, p, want) in fixture.indexer_rows()? {
        // Positions that see no more than top_k rows attend to all; nothing is selected there.
        if (p + 1) / 4 <= shape.index_top_k {
            continue;
        }
        let got: Vec<usize> =
            taps.row(&format!("blk.{l}.index_rows"), p).iter().map(|&v| v as usize).collect();
        if got != want {
            return Err(format!("layer {l}, position {p}: rows {got:?}, the reference has {want:?}").into());
        }
        dropped += 1;
    }
    if dropped == 0 { Err("the fixture does not exercise selection".into()) } else { Ok(()) }
}

pub(super) fn rounding<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let mut m = Loaded::new(maker, fixture, true, KvFormat::Rounded, maker.max_rows())?;
    let logits = m.run(&fixture.tokens()?, &[maker.max_rows()], &mut NoTap)?;
    let d = Distances::measure(&logits, fixture, "logits_qat", "logit_positions")?;
    d.outcome(d.at(0.5) < 5e-3 && d.at(0.95) < 5e-2 && d.agree >= 0.99)
}

/// The default mode can only be judged as a distribution (architecture A.14).
pub(super) fn default_mode<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let mut m = Loaded::new(maker, fixture, false, KvFormat::Packed, maker.max_rows())?;
    let logits = m.run(&fixture.tokens()?, &[maker.max_rows()], &mut NoTap)?;
    let d = Distances::measure(&logits, fixture, "logits_qat", "logit_positions")?;
    d.outcome(d.at(0.5) < 0.6 && d.at(0.95) < 2.0 && d.agree >= 0.85)
}

pub(super) fn draft<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let mut m = Loaded::new(maker, fixture, true, KvFormat::Plain, maker.max_rows())?;
    let tokens = fixture.tokens()?;
    let mut store = m.backend.store(&m.layout)?;
    let mut all = Vec::new();
    let last = tokens.len() - 1;
    for start in (0..last).step_by(100) {
        let end = (start + 100).min(last);
        m.forward(&mut [Run { store: &mut store, start, tokens: &tokens[start..end], want: Want::Nothing }])?;
        // The draft block takes the tokens after the rows' own.
        let next = &tokens[start + 1..end + 1];
        let mut runs = [Run { store: &mut store, start, tokens: next, want: Want::All }];
        m.pass.draft(&m.model, &mut m.backend, &m.layout, &mut runs, &mut m.logits, &mut NoTap)?;
        all.extend_from_slice(&m.logits.values);
    }
    let d = Distances::measure(&all, fixture, "mtp_logits", "mtp_positions")?;
    d.outcome(d.at(1.0) < maker.exact_tolerance())
}
