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

/// `from [rows, n]` to `to [n, rows]`, in tiles that stay in the first cache.
pub(crate) fn transpose(from: &[f32], n: usize, to: &mut [f32], rows: usize) {
    const TILE: usize = 16;
    if n == 1 {
        to.copy_from_slice(from);
        return;
    }
    to.par_chunks_mut(TILE * rows).enumerate().for_each(|(i, to)| {
        for r0 in (0..rows).step_by(TILE) {
            for (j, out) in to.chunks_exact_mut(rows).enumerate() {
                for (r, o) in out.iter_mut().enumerate().take((r0 + TILE).min(rows)).skip(r0) {
                    *o = from[r * n + i * TILE + j];
                }
            }
        }
    });
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
    fn transposes() {
        let (rows, n) = (37, 21);
        let from: Vec<f32> = (0..rows * n).map(|i| i as f32).collect();
        let mut to = vec![0.0; rows * n];
        transpose(&from, n, &mut to, rows);
        for r in 0..rows {
            for j in 0..n {
                assert_eq!(to[j * rows + r], from[r * n + j]);
            }
        }
    }
}
