//! What memory gives: the floor under every step that reads weights once.

use std::hint::black_box;
use std::time::Instant;

/// Bytes that threads read together, and at least each: more than caches hold.
const TOGETHER: usize = 1 << 30;
const EACH: usize = 64 << 20;

/// Bytes a second that so many threads read from memory of their own, the best of five times.
pub fn read_bandwidth(threads: usize) -> f64 {
    let threads = threads.max(1);
    let words = (TOGETHER / threads).max(EACH) / 8;
    let start = std::sync::Barrier::new(threads);
    let reader = || {
        // Written, so that its pages are there.
        let memory = vec![1u64; words];
        let mut seconds = [0.0; 5];
        for seconds in &mut seconds {
            start.wait();
            let before = Instant::now();
            black_box(sum(&memory));
            *seconds = before.elapsed().as_secs_f64();
        }
        seconds
    };
    let times: Vec<[f64; 5]> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().filter_map(|r| r.join().ok()).collect()
    });
    // A round is over when its last thread is.
    let rounds = (0..5).map(|i| times.iter().map(|t| t[i]).fold(0.0, f64::max));
    (threads * words * 8) as f64 / rounds.fold(f64::INFINITY, f64::min)
}

/// 32 sums, so that no load waits for another.
fn sum(memory: &[u64]) -> [u64; 32] {
    let mut sums = [0u64; 32];
    for chunk in memory.as_chunks::<32>().0 {
        sums.iter_mut().zip(chunk).for_each(|(s, v)| *s = s.wrapping_add(*v));
    }
    sums
}

#[cfg(test)]
mod tests {
    /// A hundred times less than the slowest machine gives would be a mistake, and so would a hundred times more than the fastest.
    #[test]
    fn memory_is_read_at_a_sane_rate() {
        let rate = super::read_bandwidth(2);
        assert!((1e7..1e14).contains(&rate), "{rate} bytes a second");
    }
}
