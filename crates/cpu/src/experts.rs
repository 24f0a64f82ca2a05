//! Router, routed experts and the shared expert (A.8).

use crate::backend::Cpu;
use crate::matrix::{LEAST_ROWS, Matrix, block_rows};
use crate::pool::{blocks, gather, weight_pieces, with_scratch};
use crate::rows::{Routes, Rows};
use ds4_model::{Choice, FeedForward, Plan};
use rayon::prelude::*;

/// The rows that one expert computes: a contiguous range of the pass's (row, expert) pairs. The shared
/// expert is a group of all rows.
#[derive(Clone, Copy, Default)]
pub(crate) struct Group {
    /// `None` for the shared expert.
    expert: Option<usize>,
    first: usize,
    len: usize,
}

/// A pass's pairs, sorted by expert, the shared expert first.
#[derive(Default)]
pub(crate) struct Pairs {
    groups: Vec<Group>,
    rows: Vec<u32>,
    weights: Vec<f32>,
    starts: Vec<usize>,
}

impl Pairs {
    /// Room for passes of up to `rows` rows.
    pub(crate) fn with_capacity(rows: usize, experts: usize, used: usize) -> Self {
        Pairs {
            groups: Vec::with_capacity(experts + 1),
            rows: Vec::with_capacity(rows * (used + 1)),
            weights: Vec::with_capacity(rows * (used + 1)),
            starts: Vec::with_capacity(experts + 1),
        }
    }

    /// Groups `routes` by expert. Within a group rows ascend.
    fn fill(&mut self, routes: &Routes, experts: usize) {
        let (n, used) = (routes.n, routes.used);
        self.groups.clear();
        self.rows.clear();
        self.weights.clear();
        self.rows.extend(0..n as u32);
        self.weights.resize(n, 1.0);
        self.groups.push(Group { expert: None, first: 0, len: n });
        self.starts.clear();
        self.starts.resize(experts + 1, 0);
        for &e in &routes.ids[..n * used] {
            self.starts[e as usize + 1] += 1;
        }
        let mut first = n;
        for e in 0..experts {
            let len = self.starts[e + 1];
            self.starts[e] = first;
            if len > 0 {
                self.groups.push(Group { expert: Some(e), first, len });
            }
            first += len;
        }
        self.rows.resize(first, 0);
        self.weights.resize(first, 0.0);
        for (i, &e) in routes.ids[..n * used].iter().enumerate() {
            let at = &mut self.starts[e as usize];
            self.rows[*at] = (i / used) as u32;
            self.weights[*at] = routes.weights[i];
            *at += 1;
        }
    }
}

impl Pairs {
    /// The group of a pair.
    fn group_of(&self, pair: usize) -> Group {
        self.groups[self.groups.partition_point(|g| g.first <= pair) - 1]
    }

    /// Appends the rows of `hidden`, one per pair, in the order of the routes, the shared expert's last of each row.
    pub(crate) fn unsort(&self, hidden: &Rows, routes: &Routes, out: &mut Vec<f32>) {
        let (width, of_row) = (hidden.width, routes.used + 1);
        let first = out.len();
        out.resize(first + routes.n * of_row * width, 0.0);
        let mut next = vec![0; routes.n];
        for group in &self.groups {
            for pair in group.first..group.first + group.len {
                let row = self.rows[pair] as usize;
                let slot = if group.expert.is_some() { next[row] } else { routes.used };
                next[row] += usize::from(group.expert.is_some());
                let at = first + (row * of_row + slot) * width;
                out[at..at + width].copy_from_slice(hidden.row(pair));
            }
        }
    }
}

/// A group's matrices as (matrix, first row).
fn gate_up(ffn: &FeedForward<Cpu>, group: Group) -> [(&Matrix, usize); 2] {
    match group.expert {
        None => [(&ffn.shared.gate, 0), (&ffn.shared.up, 0)],
        Some(e) => [ffn.gate.expert(e), ffn.up.expert(e)],
    }
}

fn down(ffn: &FeedForward<Cpu>, group: Group) -> (&Matrix, usize) {
    match group.expert {
        None => (&ffn.shared.down, 0),
        Some(e) => ffn.down.expert(e),
    }
}

fn softplus(z: f32) -> f32 {
    if z > 20.0 { z } else { z.exp().ln_1p() }
}

/// The `out.len()` experts of largest score, ascending; of equal scores the lower id wins.
fn top_experts(scores: &[f32], out: &mut [u32]) {
    let mut taken = 0;
    for (e, s) in scores.iter().enumerate() {
        // Insertion into the list of the best so far, which is kept by falling score.
        let place =
            out[..taken].iter().position(|&o| scores[o as usize].total_cmp(s).is_lt()).unwrap_or(taken);
        if place < out.len() {
            taken = (taken + 1).min(out.len());
            out[place..taken].rotate_right(1);
            out[place] = e as u32;
        }
    }
    out.sort_unstable();
}

impl Cpu {
    pub(crate) fn route_step(
        &mut self,
        choice: &Choice<Cpu>,
        logits: &Rows,
        plan: &Plan,
        routes: &mut Routes,
    ) {
        let (used, experts, scale) = (routes.used, logits.width, self.shape.route_scale);
        routes.n = logits.n;
        let ids = routes.ids[..logits.n * used].par_chunks_mut(used);
        let rows = ids.zip(routes.weights[..logits.n * used].par_chunks_mut(used));
        rows.zip(logits.used().par_chunks(experts)).zip(&plan.tokens).for_each(
            |(((ids, weights), logits), &token)| {
                with_scratch(2 * experts, |scratch| {
                    let (p, biased) = scratch.split_at_mut(experts);
                    p.iter_mut().zip(logits).for_each(|(p, &z)| *p = softplus(z).sqrt());
                    match choice {
                        Choice::Hash(table) => {
                            let chosen = &table.values[token as usize * table.width..][..used];
                            ids.iter_mut().zip(chosen).for_each(|(id, &e)| *id = e as u32);
                            ids.sort_unstable();
                        }
                        Choice::Score(bias) => {
                            biased.iter_mut().zip(&*p).zip(bias.iter()).for_each(|((s, p), b)| *s = p + b);
                            top_experts(biased, ids);
                        }
                    }
                    let sum: f32 = ids.iter().map(|&e| p[e as usize]).sum();
                    let scale = scale / sum.max(f32::MIN_POSITIVE);
                    weights.iter_mut().zip(&*ids).for_each(|(w, &e)| *w = p[e as usize] * scale);
                });
            },
        );
    }

    /// `y = shared(x) + sum over chosen experts, ascending, of their weighted outputs`.
    pub(crate) fn experts_step(&mut self, ffn: &FeedForward<Cpu>, x: &Rows, routes: &Routes, y: &mut Rows) {
        let mut pairs = std::mem::take(&mut self.pairs);
        pairs.fill(routes, self.shape.experts);
        self.gate_up(ffn, x, &pairs);
        self.down(ffn, &pairs, y);
        self.pairs = pairs;
    }

    /// Hidden activations of every pair, weighted, `[pairs, I]`, into `self.hidden`.
    fn gate_up(&mut self, ffn: &FeedForward<Cpu>, x: &Rows, pairs: &Pairs) {
        let width = self.shape.expert_width;
        let inputs = pairs.groups.iter().flat_map(|&g| gate_up(ffn, g)).map(|(m, _)| m.product.input);
        self.panel.load(x.used(), x.width, inputs);
        let total = pairs.rows.len();
        let block = block_rows(width * pairs.groups.len(), pairs.groups[0].len, self.threads);
        let of_group = width.div_ceil(block);
        // A task is a block of the I of a group; its products are [rows of the group, block].
        let start = |i: usize| match pairs.groups.get(i / of_group) {
            Some(g) => g.first * width + (i % of_group * block).min(width) * g.len,
            None => total * width,
        };
        let (panel, kernels) = (&self.panel, &self.kernels);
        let products = &mut self.products;
        products.resize((total * width).max(products.len()), 0.0);
        let tasks = pairs.groups.iter().map(|_| of_group);
        weight_pieces(&self.nodes, tasks, &mut products[..total * width], &start, &|i, out| {
            let g = pairs.groups[i / of_group];
            let first = i % of_group * block;
            let [(gate, gate_row), (up, up_row)] = gate_up(ffn, g);
            let index = &pairs.rows[g.first..g.first + g.len];
            let columns = |m: &Matrix| panel.columns(x.used(), m.product.input, (0, m.input), index);
            gate.multiply(gate_row + first, &columns(gate), out);
            with_scratch(out.len(), |ups| {
                up.multiply(up_row + first, &columns(up), ups);
                (kernels.small.swiglu)(out, ups, ffn.clamp);
            });
        });
        let rows = self.hidden.take(total).par_chunks_mut(width).enumerate();
        rows.for_each(|(pair, row)| {
            let g = pairs.group_of(pair);
            let products = &products[g.first * width..(g.first + g.len) * width];
            for rows in blocks(0..width, block) {
                let task = &products[rows.start * g.len..rows.end * g.len];
                let products = &task[(pair - g.first) * rows.len()..][..rows.len()];
                row[rows].iter_mut().zip(products).for_each(|(o, p)| *o = pairs.weights[pair] * p);
            }
        });
    }

    /// Down projections of `self.hidden`, summed per row in the order of the groups.
    fn down(&mut self, ffn: &FeedForward<Cpu>, pairs: &Pairs, y: &mut Rows) {
        let (n, d, width) = (pairs.groups[0].len, y.width, self.shape.expert_width);
        let inputs = pairs.groups.iter().map(|&g| down(ffn, g).0.product.input);
        self.hidden_panel.load(self.hidden.used(), width, inputs);
        let block = block_rows(d, n, self.threads);
        let (panel, hidden, identity) = (&self.hidden_panel, &self.hidden, &self.identity);
        let products = &mut self.products;
        products.resize((d * n).max(products.len()), 0.0);
        let (tasks, start) = (std::iter::once(d.div_ceil(block)), |i: usize| (i * block).min(d) * n);
        weight_pieces(&self.nodes, tasks, &mut products[..d * n], &start, &|i, out| {
            out.fill(0.0);
            let first = i * block;
            let block = out.len() / n;
            for (i, &g) in pairs.groups.iter().enumerate() {
                let (m, row) = down(ffn, g);
                if let Some(&next) = pairs.groups.get(i + 1) {
                    let (m, row) = down(ffn, next);
                    m.ask(row + first, block.min(LEAST_ROWS));
                }
                let index = &identity[g.first..g.first + g.len];
                let x = panel.columns(hidden.used(), m.product.input, (0, width), index);
                let rows = &pairs.rows[g.first..g.first + g.len];
                with_scratch(block * g.len, |part| {
                    m.multiply(row + first, &x, part);
                    for (&r, part) in rows.iter().zip(part.chunks_exact(block)) {
                        let out = &mut out[r as usize * block..(r as usize + 1) * block];
                        out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
                    }
                });
            }
        });
        gather(&products[..d * n], n, y.take(n), d, || blocks(0..d, block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_experts_by_score_ties_low() {
        let mut out = [0; 3];
        top_experts(&[0.1, 0.9, 0.5, 0.9, 0.5], &mut out);
        assert_eq!(out, [1, 2, 3]);
    }

    #[test]
    fn pairs_are_grouped_and_complete() {
        let routes =
            Routes { used: 2, n: 3, ids: vec![0, 4, 1, 4, 0, 1], weights: vec![1., 2., 3., 4., 5., 6.] };
        let mut pairs = Pairs::default();
        pairs.fill(&routes, 5);
        let groups: Vec<_> = pairs.groups.iter().map(|g| (g.expert, g.first, g.len)).collect();
        assert_eq!(groups, [(None, 0, 3), (Some(0), 3, 2), (Some(1), 5, 2), (Some(4), 7, 2)]);
        assert_eq!(pairs.rows, [0, 1, 2, 0, 2, 1, 2, 0, 1]);
        assert_eq!(pairs.weights, [1., 1., 1., 1., 5., 3., 6., 2., 4.]);
    }
}
