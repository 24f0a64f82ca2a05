//! What memory gives: the floor under every step that reads weights once.

use memmap2::MmapMut;
use std::hint::black_box;
use std::time::Instant;

/// Bytes that threads read together, and at least each: more than caches hold.
const TOGETHER: usize = 1 << 30;
const EACH: usize = 64 << 20;

/// Bytes a second that so many threads read from memory of their own, the best of five times. An error is that of the system that has no such
/// memory.
pub fn read_bandwidth(threads: usize) -> std::io::Result<f64> {
    let threads = threads.max(1);
    let bytes = (TOGETHER / threads).max(EACH);
    let memory = (0..threads).map(|_| in_huge_pages(bytes)).collect::<std::io::Result<Vec<_>>>()?;
    let start = std::sync::Barrier::new(threads);
    let reader = |mut memory: MmapMut| {
        // Written, so that its pages are there, and near this thread.
        memory.fill(1);
        let mut seconds = [0.0; 5];
        for seconds in &mut seconds {
            start.wait();
            let before = Instant::now();
            black_box(read_once(bytemuck::cast_slice(&memory)));
            *seconds = before.elapsed().as_secs_f64();
        }
        seconds
    };
    let times: Vec<[f64; 5]> = std::thread::scope(|scope| {
        let readers: Vec<_> = memory.into_iter().map(|memory| scope.spawn(|| reader(memory))).collect();
        readers.into_iter().filter_map(|r| r.join().ok()).collect()
    });
    // A round is over when its last thread is.
    let rounds = (0..5).map(|i| times.iter().map(|t| t[i]).fold(0.0, f64::max));
    Ok((threads * bytes) as f64 / rounds.fold(f64::INFINITY, f64::min))
}

/// Memory in pages as large as those of a model file: with small ones, looking up addresses costs a fifth and more.
pub fn in_huge_pages(bytes: usize) -> std::io::Result<MmapMut> {
    let memory = MmapMut::map_anon(bytes)?;
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}

/// Reads memory once: 32 sums, so that no load waits for another.
pub fn read_once(memory: &[u64]) -> [u64; 32] {
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
        let rate = super::read_bandwidth(2).unwrap();
        assert!((1e7..1e14).contains(&rate), "{rate} bytes a second");
    }
}
