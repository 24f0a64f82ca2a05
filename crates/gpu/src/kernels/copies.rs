//! Copies of whole rows from memory to shared memory, on NVIDIA from sm_90 on: one unit asks, no unit's registers are
//! needed, and a barrier in shared memory tells when the bytes have come.

use super::dot::Quad;
use super::fetch::address;
use cubecl::prelude::*;
use half::f16;

/// A barrier that is passed, each time, when so many units have arrived and the bytes that they expect have come.
#[cube]
pub fn begin(bar: u32, #[comptime] arrivals: u32) {
    gpu_asm!(
        "mbarrier.init.shared::cta.b64 [{}], {n}; fence.mbarrier_init.release.cluster;",
        in(_) bar,
        n = const arrivals
    );
}

/// Arrives; so many bytes will come.
#[cube]
pub fn expect(bar: u32, #[comptime] bytes: u32) {
    gpu_asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {n};", in(_) bar, n = const bytes);
}

/// Arrives.
#[cube]
pub fn arrive(bar: u32) {
    gpu_asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(_) bar);
}

/// Until a barrier has been passed for the first time, or where `parity` is one the second, and so on in turn.
#[cube]
pub fn wait(bar: u32, parity: u32) {
    gpu_asm!(
        "{{.reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [{}], {}; @!p bra WAIT;}}",
        in(_) bar,
        in(_) parity
    );
}

/// Copies `bytes`, of which `bar` is told.
#[cube]
pub fn copy(to: u32, from: u64, #[comptime] bytes: u32, bar: u32) {
    gpu_asm!(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {n}, [{}];",
        in(_) to,
        in(_) from,
        in(_) bar,
        n = const bytes
    );
}

#[cube]
pub fn shared_quad(from: u32, #[comptime] by: usize) -> Quad {
    let out: Quad;
    gpu_asm!("ld.shared.v4.u32 {}, [{}+{by}];", out(_) out, in(_) from, by = const by, options(nomem));
    out
}

#[cube]
pub fn shared_half(from: u32, #[comptime] by: usize) -> f16 {
    let out: u16;
    gpu_asm!("ld.shared.u16 {}, [{}+{by}];", out(_) out, in(_) from, by = const by, options(nomem));
    f16::reinterpret(out)
}

#[cube]
pub fn shared_float(from: u32, #[comptime] by: usize) -> f32 {
    let out: f32;
    gpu_asm!("ld.shared.f32 {}, [{}+{by}];", out(_) out, in(_) from, by = const by, options(nomem));
    out
}

/// Where a value is, as a number.
#[cube]
pub fn place_of<T: CubePrimitive>(from: &[T], at: usize) -> u64 {
    let from = address(from, at);
    let out: u64;
    gpu_asm!("mov.u64 {}, {};", out(_) out, in(_) from, options(pure, nomem));
    out
}

/// What a variable holds: an assembler line would be given its place.
#[cube]
#[allow(clippy::identity_op)]
pub fn value(of: u64) -> u64 {
    of | 0
}

/// The same of a word.
#[cube]
#[allow(clippy::identity_op)]
pub fn word(of: u32) -> u32 {
    of | 0
}
