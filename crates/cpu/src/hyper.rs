//! Embedding, norms and hyper-connections (A.1 to A.3), and the draft block's input (A.11).

use crate::backend::Cpu;
use crate::matrix::Matrix;
use crate::rows::Rows;
use ds4_model::{HeadMix, HyperConnection, Mtp, Plan};
use rayon::prelude::*;

/// `1 / sqrt(mean(x^2) + eps)`. Many sums side by side, so that none waits for another.
pub(crate) fn rms_scale(x: &[f32], eps: f32) -> f32 {
    const LANES: usize = 16;
    let (sixteens, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for v in sixteens {
        for i in 0..LANES {
            lanes[i] += v[i] * v[i];
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

/// Turns the raw mixing matrix `c [n, n]` (source, destination) doubly stochastic: softmax over
/// destinations, then alternating normalisations, columns first.
fn sinkhorn(c: &mut [f32], n: usize, iterations: usize, eps: f32) {
    for row in c.chunks_exact_mut(n) {
        let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        row.iter_mut().for_each(|v| *v = (*v - max).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|v| *v = *v / sum + eps);
    }
    let columns = |c: &mut [f32]| {
        for j in 0..n {
            let sum = (0..n).map(|i| c[i * n + j]).sum::<f32>() + eps;
            (0..n).for_each(|i| c[i * n + j] /= sum);
        }
    };
    columns(c);
    for _ in 1..iterations {
        for row in c.chunks_exact_mut(n) {
            let sum = row.iter().sum::<f32>() + eps;
            row.iter_mut().for_each(|v| *v /= sum);
        }
        columns(c);
    }
}

impl Cpu {
    pub(crate) fn embed_step(&mut self, table: &Matrix, plan: &Plan, streams: &mut Rows) {
        let (d, width) = (self.shape.width, streams.width);
        let rows = streams.take(plan.len()).par_chunks_mut(width).zip(&plan.tokens);
        rows.for_each(|(row, &token)| {
            let (first, others) = row.split_at_mut(d);
            table.decode(token as usize, first);
            others.chunks_exact_mut(d).for_each(|s| s.copy_from_slice(first));
        });
    }

    pub(crate) fn norm_step(&mut self, weight: &[f32], x: &Rows, out: &mut Rows) {
        let eps = self.shape.norm_eps;
        let rows = out.take(x.n).par_chunks_mut(x.width).zip(x.used().par_chunks(x.width));
        rows.for_each(|(out, x)| norm_row(weight, x, eps, out));
    }

    pub(crate) fn hc_split_step(
        &mut self,
        hc: &HyperConnection<Cpu>,
        norm: &[f32],
        streams: &Rows,
        x: &mut Rows,
        mix: &mut Rows,
    ) {
        let s = &self.shape;
        let (n, d, width, iterations) = (s.streams, s.width, streams.width, s.sinkhorn);
        let (norm_eps, eps) = (s.norm_eps, s.hc_eps);
        let mut control = std::mem::take(&mut self.control);
        self.project_step(streams, &mut [(&hc.mix, &mut control)]);
        let kernels = &self.kernels;
        let rows = x.take(streams.n).par_chunks_mut(d).zip(mix.take(streams.n).par_chunks_mut(n + n * n));
        let rows = rows.zip(streams.used().par_chunks(width)).zip(control.used().par_chunks(control.width));
        rows.for_each(|(((x, mix), streams), m)| {
            // Scaling after the projection is the same as projecting the normed streams.
            let r = rms_scale(streams, norm_eps);
            let value = |i: usize, scale: usize| m[i] * r * hc.affine[scale] + hc.affine[3 + i];
            let mut pre = [0.0; 16];
            for (i, p) in pre.iter_mut().enumerate().take(n) {
                *p = sigmoid(value(i, 0)) + eps;
            }
            (kernels.small.mix)(&pre[..n], streams, x);
            let scale = rms_scale(x, norm_eps);
            x.iter_mut().zip(norm).for_each(|(x, w)| *x = w * (*x * scale));
            let (post, comb) = mix.split_at_mut(n);
            for (i, p) in post.iter_mut().enumerate() {
                *p = 2.0 * sigmoid(value(n + i, 1));
            }
            for (i, c) in comb.iter_mut().enumerate() {
                *c = value(2 * n + i, 2);
            }
            sinkhorn(comb, n, iterations, eps);
        });
        self.control = control;
    }

    pub(crate) fn hc_join_step(&mut self, y: &Rows, mix: &Rows, streams: &mut Rows) {
        let (n, d) = (self.shape.streams, self.shape.width);
        let rows = streams
            .take(y.n)
            .par_chunks_mut(n * d)
            .zip(y.used().par_chunks(d))
            .zip(mix.used().par_chunks(mix.width));
        let join = self.kernels.small.join;
        rows.for_each(|((streams, y), mix)| join(y, mix.split_at(n), streams));
    }

    pub(crate) fn hc_head_step(&mut self, head: &HeadMix<Cpu>, streams: &Rows, z: &mut Rows) {
        let s = &self.shape;
        let (n, d, width) = (s.streams, s.width, streams.width);
        let (norm_eps, eps) = (s.norm_eps, s.hc_eps);
        let mut control = std::mem::take(&mut self.head_control);
        self.project_step(streams, &mut [(&head.mix, &mut control)]);
        let kernels = &self.kernels;
        let rows = z.take(streams.n).par_chunks_mut(d).zip(streams.used().par_chunks(width));
        rows.zip(control.used().par_chunks(n)).for_each(|((z, streams), m)| {
            let r = rms_scale(streams, norm_eps);
            let mut pre = [0.0; 16];
            for i in 0..n {
                pre[i] = sigmoid(m[i] * r * head.affine[0] + head.affine[1 + i]) + eps;
            }
            (kernels.small.mix)(&pre[..n], streams, z);
        });
        self.head_control = control;
    }

    pub(crate) fn draft_input_step(
        &mut self,
        mtp: &Mtp<Cpu>,
        table: &Matrix,
        plan: &Plan,
        streams: &mut Rows,
    ) {
        let (rows, n, d) = (plan.len(), self.shape.streams, self.shape.width);
        let buffer = |rows| Rows::new(rows, d);
        let (mut raw, mut normed, mut e) = (buffer(rows), buffer(rows), buffer(rows));
        raw.take(rows)
            .chunks_exact_mut(d)
            .zip(&plan.tokens)
            .for_each(|(row, &t)| table.decode(t as usize, row));
        self.norm_step(&mtp.e_norm, &raw, &mut normed);
        self.project_step(&normed, &mut [(&mtp.e_proj, &mut e)]);
        // Each stream of each row is a row of its own here.
        let (mut raw, mut normed, mut h) = (buffer(rows * n), buffer(rows * n), buffer(rows * n));
        raw.take(rows * n).copy_from_slice(streams.used());
        self.norm_step(&mtp.h_norm, &raw, &mut normed);
        self.project_step(&normed, &mut [(&mtp.h_proj, &mut h)]);
        for (i, out) in streams.take(rows).chunks_exact_mut(d).enumerate() {
            for ((o, h), e) in out.iter_mut().zip(h.row(i)).zip(e.row(i / n)) {
                *o = h + e;
            }
        }
    }
}

pub(crate) fn norm_row(weight: &[f32], x: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = w * (x * scale);
    }
}
