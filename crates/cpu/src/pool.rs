//! Work split over threads.
//!
//! Every parallel step writes one slice, and every task owns a contiguous piece of it: no shared writes, and, but on machines of several
//! memory nodes, no locks, and nothing is allocated. A task's arithmetic never depends on how the work was split.

use crate::numa::Nodes;
use crate::rows::Floats;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Runs `task(i, piece)` for every `i` in `tasks`, in parallel. Task `i` owns `out` from `start(i)` to
/// `start(i + 1)`, counted from `start(tasks.start)`; `start` is monotonic.
pub(crate) fn pieces<T, S, F>(tasks: Range<usize>, out: &mut [T], start: &S, task: &F)
where
    T: Send,
    S: Fn(usize) -> usize + Sync,
    F: Fn(usize, &mut [T]) + Sync,
{
    match tasks.len() {
        0 => {}
        1 => task(tasks.start, out),
        n => {
            let mid = tasks.start + n / 2;
            let (left, right) = out.split_at_mut(start(mid) - start(tasks.start));
            rayon::join(
                || pieces(tasks.start..mid, left, start, task),
                || pieces(mid..tasks.end, right, start, task),
            );
        }
    }
}

/// [`pieces`] that read weights: the tasks are blocks of rows of matrices, one behind the other, and `matrices` are their numbers of blocks.
/// Where there are several memory nodes, each takes its part of every matrix, and helps another when it has none left.
pub(crate) fn weight_pieces<T, S, F>(
    nodes: &Nodes,
    matrices: impl Iterator<Item = usize>,
    out: &mut [T],
    start: &S,
    task: &F,
) where
    T: Send,
    S: Fn(usize) -> usize + Sync,
    F: Fn(usize, &mut [T]) + Sync,
{
    if nodes.count() == 1 {
        return pieces(0..matrices.sum(), out, start, task);
    }
    let queues = queues(nodes, matrices, out, start);
    everyone(rayon::current_num_threads(), &|| {
        let node = nodes.of(rayon::current_thread_index().unwrap_or(0));
        work_off(nodes, node, &queues, start, task);
    });
}

/// The parts of a matrix of the first node, the second and so on; then those of the next matrix.
fn queues<'a, T>(
    nodes: &Nodes,
    matrices: impl Iterator<Item = usize>,
    out: &'a mut [T],
    start: &impl Fn(usize) -> usize,
) -> Vec<Mutex<Queue<'a, T>>> {
    let (mut queues, mut first, mut rest) = (Vec::new(), 0, out);
    for blocks in matrices {
        for node in 0..nodes.count() {
            let part = nodes.part(node, blocks);
            let tasks = first + part.start..first + part.end;
            let (out, others) = rest.split_at_mut(start(tasks.end) - start(tasks.start));
            queues.push(Mutex::new(Queue { tasks, out }));
            rest = others;
        }
        first += blocks;
    }
    queues
}

/// Runs what nobody has begun: a node's own tasks, then those of others.
fn work_off<T>(
    nodes: &Nodes,
    own: usize,
    queues: &[Mutex<Queue<'_, T>>],
    start: &impl Fn(usize) -> usize,
    task: &impl Fn(usize, &mut [T]),
) {
    for node in (own..nodes.count()).chain(0..own) {
        let share = 2 * nodes.threads(node).max(1);
        for queue in queues.iter().skip(node).step_by(nodes.count()) {
            loop {
                let taken = queue.lock().unwrap_or_else(PoisonError::into_inner).take(share, start);
                let Some(Queue { tasks, out }) = taken else { break };
                let base = start(tasks.start);
                for i in tasks {
                    task(i, &mut out[start(i) - base..start(i + 1) - base]);
                }
            }
        }
    }
}

/// Tasks that nobody has begun, and what they own.
struct Queue<'a, T> {
    tasks: Range<usize>,
    out: &'a mut [T],
}

impl<'a, T> Queue<'a, T> {
    /// The first of its tasks, a `share`th: many while there are many, as what follows on what a thread reads is asked for ahead.
    fn take(&mut self, share: usize, start: &impl Fn(usize) -> usize) -> Option<Queue<'a, T>> {
        let first = self.tasks.start;
        let end = first + self.tasks.len().div_ceil(share);
        let (out, rest) = std::mem::take(&mut self.out).split_at_mut(start(end) - start(first));
        (self.tasks.start, self.out) = (end, rest);
        (first < end).then_some(Queue { tasks: first..end, out })
    }
}

/// Calls `f` once for each of `n` threads, on as many of the pool as are free.
fn everyone(n: usize, f: &(impl Fn() + Sync)) {
    if n > 1 {
        rayon::join(|| everyone(n.div_ceil(2), f), || everyone(n / 2, f));
    } else {
        f();
    }
}

/// Puts products together that tasks left one behind the other, `[n, rows of the task]` each, into `to [n, width]`. `tasks`: their rows.
pub(crate) fn gather<I>(from: &[f32], n: usize, to: &mut [f32], width: usize, tasks: impl Fn() -> I + Sync)
where
    I: Iterator<Item = Range<usize>>,
{
    if n == 1 {
        to.copy_from_slice(from);
        return;
    }
    to.par_chunks_mut(width).enumerate().for_each(|(j, to)| {
        for rows in tasks() {
            let task = &from[rows.start * n..rows.end * n];
            to[rows.clone()].copy_from_slice(&task[j * rows.len()..(j + 1) * rows.len()]);
        }
    });
}

/// `rows` in blocks.
pub(crate) fn blocks(rows: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(block).map(move |first| first..rows.end.min(first + block))
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Floats> = std::cell::RefCell::default();
}

/// Lends a buffer of the running thread. It grows to the largest size asked for and stays.
///
/// Not to be held across another parallel step: a thread that waits may run a second task.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|buffer| {
        buffer.reserve(len);
        f(&mut buffer.get_mut()[..len])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        let bounds = [0usize, 3, 3, 10, 64];
        let mut out = vec![0; 64];
        pieces(0..4, &mut out, &|i| bounds[i], &|i, p| p.iter_mut().for_each(|v| *v += i + 1));
        for (i, v) in out.iter().enumerate() {
            let task = (0..4).find(|&t| bounds[t] <= i && i < bounds[t + 1]).unwrap();
            assert_eq!(*v, task + 1);
        }
    }

    /// Two nodes of a core each: every block is done once.
    #[test]
    fn weights_are_split_over_nodes() {
        let nodes = Nodes::new(vec![vec![0], vec![1]], 4);
        for matrices in [&[1usize, 10, 0, 7][..], &[64], &[]] {
            let blocks: usize = matrices.iter().sum();
            let mut out = vec![0; 3 * blocks];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
            pool.install(|| {
                weight_pieces(&nodes, matrices.iter().copied(), &mut out, &|i| 3 * i, &|i, piece| {
                    assert_eq!(piece.len(), 3);
                    piece.iter_mut().for_each(|v| *v += i + 1);
                });
            });
            assert!(out.iter().enumerate().all(|(i, v)| *v == i / 3 + 1), "{matrices:?}: {out:?}");
        }
    }

    #[test]
    fn a_node_begins_with_its_own_rows() {
        let nodes = Nodes::new(vec![vec![0], vec![1]], 2);
        let mut out = [0; 20];
        let order = Mutex::new(Vec::new());
        let queues = queues(&nodes, [8, 12].into_iter(), &mut out, &|i| i);
        work_off(&nodes, 1, &queues, &|i| i, &|i, _| order.lock().unwrap().push(i));
        let own = (4..8).chain(14..20);
        assert!(order.into_inner().unwrap().into_iter().eq(own.chain(0..4).chain(8..14)));
    }

    #[test]
    fn gathers() {
        let (rows, n, block) = (37, 21, 8);
        let tasks = || blocks(0..rows, block);
        let from: Vec<f32> = tasks()
            .flat_map(|rows| (0..n).flat_map(move |j| rows.clone().map(move |r| (1000 * j + r) as f32)))
            .collect();
        let mut to = vec![0.0; rows * n];
        gather(&from, n, &mut to, rows, tasks);
        for (i, v) in to.into_iter().enumerate() {
            assert_eq!(v, (1000 * (i / rows) + i % rows) as f32);
        }
    }
}
