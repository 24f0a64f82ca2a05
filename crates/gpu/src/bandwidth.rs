//! The read bandwidth of the device, as a yardstick.

use crate::buffer::Buffer;
use crate::kernels::bandwidth::sum;
use cubecl::client::Client;
use cubecl::prelude::*;
use std::time::Instant;

/// Bytes read in one go: many times any cache.
const BYTES: u64 = 1 << 30;
const UNITS: u32 = 256;
const CUBES: u32 = 4096;

/// Bytes a second at which a large buffer is read: the best of some tries.
#[allow(unsafe_code)]
pub(crate) fn read(client: &Client) -> Option<f64> {
    let handle = client.memory_dedicated_allocation((), |()| client.empty(BYTES as usize));
    let data = Buffer::of(handle, BYTES);
    let out = Buffer::new(client, 4 * u64::from(CUBES));
    let run = |times: u32| {
        let start = Instant::now();
        for _ in 0..times {
            // SAFETY: the kernel stays within both lengths.
            unsafe {
                sum::launch_unchecked(
                    client,
                    CubeCount::new_1d(CUBES),
                    CubeDim::new_1d(UNITS),
                    data.arg(16),
                    out.arg(4),
                );
            }
        }
        out.read(client, 0, 4).ok()?;
        Some(start.elapsed().as_secs_f64())
    };
    run(1)?;
    // The difference of two runs leaves out what a launch and reading back cost.
    let tries = (0..3).filter_map(|_| Some(run(9)? - run(1)?));
    let best = tries.fold(f64::INFINITY, f64::min);
    (best > 0.0 && best.is_finite()).then_some(8.0 * BYTES as f64 / best)
}
