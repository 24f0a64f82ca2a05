//! What the cubes of a kernel tell each other while it runs, on NVIDIA.
//!
//! Every word goes with the number of the launch, its turn, in one store of eight bytes, and who wants it reads until
//! it finds that number. So nobody needs a fence: one waits for all that is under way, and while weights are copied
//! that is always much.

use super::copies::{place_of, value, word};
use super::dot::Quad;
use cubecl::prelude::*;

/// Leaves word `at` of a region that begins at vector `first` of `told`.
#[cube]
pub fn send(told: &[Quad], first: usize, at: usize, what: u32, turn: u32) {
    let to = value(place_of(told, first + at / 2) + 8 * (at % 2) as u64);
    gpu_asm!(
        "st.relaxed.gpu.global.v2.u32 [{}], {{{}, {}}};",
        in(_) to,
        in(_) word(what),
        in(_) word(turn)
    );
}

/// Two words side by side.
#[derive(CubeType, Clone, Copy)]
pub struct Two {
    /// The first.
    pub a: u32,
    /// The second.
    pub b: u32,
}

/// The two words of vector `at`, once both have come.
#[cube]
pub fn receive(told: &[Quad], at: usize, turn: u32) -> Two {
    let from = value(place_of(told, at));
    let mut come = look(from);
    while come.extract(1usize) != turn || come.extract(3usize) != turn {
        come = look(from);
    }
    Two { a: come.extract(0usize), b: come.extract(2usize) }
}

/// Two words and their turns, as they are now.
#[cube]
fn look(from: u64) -> Quad {
    let out: Quad;
    gpu_asm!("ld.relaxed.gpu.global.v4.u32 {}, [{}];", out(_) out, in(_) from);
    out
}

/// Leaves two words at an address in shared memory.
#[cube]
pub fn lay_two(to: u32, two: Two) {
    gpu_asm!("st.shared.v2.u32 [{}], {{{}, {}}};", in(_) to, in(_) word(two.a), in(_) word(two.b));
}
