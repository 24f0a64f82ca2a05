//! Work split over threads.
//!
//! Every parallel step writes one slice, and every task owns a contiguous piece of it: no locks, no shared
//! writes, and nothing is allocated. A task's arithmetic never depends on how the work was split.

use crate::rows::Floats;
use rayon::prelude::*;
use std::ops::Range;

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
