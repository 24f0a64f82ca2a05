//! Weights on their way from memory: all loads of a lane's turn are under way before the first is waited for.
//!
//! NVIDIA's assembler thinks of registers first: it moves a load that nothing can have changed down to its use, past
//! barriers too, and then each is waited for alone. So there weights are loaded as if somebody might write them, and
//! [`pin`] keeps such loads before it.

use super::dot::{Eight, Quad, Weights, steps};
use super::plane::ptx;
use crate::layout::Format;
use cubecl::prelude::*;
use half::f16;

/// Weights of some units of some rows, on their way: all loads are under way before the first is waited for.
#[derive(CubeType)]
pub struct Held {
    /// Quants, or f32 values.
    pub quads: Array<Quad>,
    /// f16 values.
    pub halves: Array<Eight>,
    /// Two for each unit: its scale, and where the format has one, its minimum.
    pub scales: Array<f16>,
    /// Likewise within blocks.
    pub sub: Array<u32>,
}

/// Room for `steps` units of each of `rows` rows.
#[cube]
pub fn room(#[comptime] steps: usize, #[comptime] rows: usize, #[comptime] format: Format) -> Held {
    let (count, half) = (comptime!(steps * rows), comptime!(format == Format::F16));
    Held {
        quads: Array::<Quad>::new(comptime!(if half { 1 } else { count })),
        halves: Array::<Eight>::new(comptime!(if half { count } else { 1 })),
        scales: Array::<f16>::new(comptime!(2 * count)),
        sub: Array::<u32>::new(comptime!(2 * count)),
    }
}

/// A lane's turn for `rows` rows of `w`, from row `first` on: units `u, u + PLANE_DIM, ...`.
#[cube]
pub fn fetch_rows(w: &Weights, first: usize, u: usize, #[comptime] rows: usize) -> Held {
    let mut held = room(comptime!(steps(w.format, w.input, w.plane)), rows, w.format);
    #[unroll]
    for step in 0..comptime!(steps(w.format, w.input, w.plane)) {
        #[unroll]
        for r in 0..rows {
            let u = u + comptime!(step * w.plane);
            fetch_unit(w, &mut held, first + r, u, comptime!(step * rows + r), true);
        }
    }
    pin(w);
    held
}

/// Unit `u` of row `row` of two matrices of one kind: the two rows that they hold.
#[cube]
pub fn fetch_both(one: &Weights, other: &Weights, row: usize, u: usize) -> Held {
    let mut held = room(1usize, 2usize, one.format);
    fetch_unit(one, &mut held, row, u, 0usize, true);
    fetch_unit(other, &mut held, row, u, 1usize, true);
    pin(one);
    held
}

/// Fetches unit `u` of a row to place `i`; `pinned`: in such a way that [`pin`] holds it.
#[cube]
pub fn fetch_unit(
    w: &Weights,
    held: &mut Held,
    row: usize,
    u: usize,
    #[comptime] i: usize,
    #[comptime] pinned: bool,
) {
    let at = row * comptime!(w.input / w.format.unit()) + u;
    let format = comptime!(w.format);
    if comptime!(format == Format::F16) {
        held.halves[i] = load_eight(w.halves.index(0usize), at, pinned);
    } else {
        held.quads[i] = load_quad(w.quants.index(0usize), at, pinned);
    }
    match comptime!(format) {
        Format::F32 | Format::F16 => {}
        Format::Q8 => held.scales[comptime!(2 * i)] = load_half(w.scales.index(0usize), at / 2, pinned),
        Format::Iq2 => {
            held.scales[comptime!(2 * i)] = load_half(w.scales.index(0usize), at / 4, pinned);
            held.sub[comptime!(2 * i)] = load_word(w.sub.index(0usize), at / 4, pinned);
        }
        Format::Q2K => {
            let (scale, min) = load_halves(w.scales.index(0usize), at / 4, pinned);
            held.scales[comptime!(2 * i)] = scale;
            held.scales[comptime!(2 * i + 1)] = min;
            held.sub[comptime!(2 * i)] = load_word(w.sub.index(0usize), at, pinned);
        }
        Format::Q4K => {
            let (block, word) = (at / 8, at / 8 * 4 + at / 4 % 2);
            let (scale, min) = load_halves(w.scales.index(0usize), block, pinned);
            held.scales[comptime!(2 * i)] = scale;
            held.scales[comptime!(2 * i + 1)] = min;
            held.sub[comptime!(2 * i)] = load_word(w.sub.index(0usize), word, pinned);
            held.sub[comptime!(2 * i + 1)] = load_word(w.sub.index(0usize), word + 2, pinned);
        }
    }
}

/// Where a value is.
#[cube]
pub fn address<T: CubePrimitive>(from: &[T], at: usize) -> *const T {
    // SAFETY: as for every index of a kernel, the host launches it with buffers that are long enough.
    unsafe { from[at..at + 1].as_ptr_unchecked() }
}

/// Keeps the loads of weights before it there, and those of [`load_x`] behind it: a store that never happens, to an
/// address that the assembler cannot tell from theirs.
#[cube]
fn pin(w: &Weights) {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device) && w.format == Format::F16) {
        let at = address(w.halves.index(0usize), 0usize);
        gpu_asm!("{{.reg .pred p; setp.eq.u64 p, {at}, 0; @p st.u32 [{at}], 0;}}", at = in(_) at);
    } else if comptime!(ptx(&device)) {
        let at = address(w.quants.index(0usize), 0usize);
        gpu_asm!("{{.reg .pred p; setp.eq.u64 p, {at}, 0; @p st.u32 [{at}], 0;}}", at = in(_) at);
    }
}

/// A vector of activations, or where it is not `wide` one value, after the weights that it meets.
#[cube]
pub fn load_x<T: CubePrimitive>(from: &[T], at: usize, #[comptime] wide: bool) -> T {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) {
        let from = address(from, at);
        let vector = comptime!(if wide { ".v4" } else { "" });
        let out: T;
        gpu_asm!("ld.global{vector}.b32 {}, [{}];", out(_) out, mem_in(_) from, options(explicit_mem));
        out
    } else {
        from[at]
    }
}

/// Sixteen bytes of weights, which are read once: they need no place in the first cache.
#[cube]
fn load_wide<T: CubePrimitive>(from: &[T], at: usize) -> Quad {
    let from = address(from, at);
    let out: Quad;
    gpu_asm!("ld.global.L1::no_allocate.v4.u32 {}, [{}];", out(_) out, mem_in(_) from, options(explicit_mem));
    out
}

#[cube]
fn load_quad(from: &[Quad], at: usize, #[comptime] pinned: bool) -> Quad {
    let device = comptime::device_properties().comptime();
    if comptime!(pinned && ptx(&device)) { load_wide(from, at) } else { from[at] }
}

#[cube]
fn load_eight(from: &[Eight], at: usize, #[comptime] pinned: bool) -> Eight {
    let device = comptime::device_properties().comptime();
    if comptime!(pinned && ptx(&device)) { Eight::reinterpret(load_wide(from, at)) } else { from[at] }
}

#[cube]
fn load_half(from: &[f16], at: usize, #[comptime] pinned: bool) -> f16 {
    let device = comptime::device_properties().comptime();
    if comptime!(pinned && ptx(&device)) {
        let from = address(from, at);
        let out: u16;
        gpu_asm!("ld.global.u16 {}, [{}];", out(_) out, mem_in(_) from, options(explicit_mem));
        f16::reinterpret(out)
    } else {
        from[at]
    }
}

/// The `at`th pair.
#[cube]
fn load_halves(from: &[f16], at: usize, #[comptime] pinned: bool) -> (f16, f16) {
    let device = comptime::device_properties().comptime();
    if comptime!(pinned && ptx(&device)) {
        let both = load_bits(from, 2 * at);
        (f16::reinterpret(u16::cast_from(both & 0xffff)), f16::reinterpret(u16::cast_from(both >> 16)))
    } else {
        (from[2 * at], from[2 * at + 1])
    }
}

#[cube]
fn load_word(from: &[u32], at: usize, #[comptime] pinned: bool) -> u32 {
    let device = comptime::device_properties().comptime();
    if comptime!(pinned && ptx(&device)) { load_bits(from, at) } else { from[at] }
}

/// Four bytes.
#[cube]
fn load_bits<T: CubePrimitive>(from: &[T], at: usize) -> u32 {
    let from = address(from, at);
    let out: u32;
    gpu_asm!("ld.global.u32 {}, [{}];", out(_) out, mem_in(_) from, options(explicit_mem));
    out
}
