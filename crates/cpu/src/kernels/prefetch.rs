//! Asking for memory ahead of its use. It reads nothing that the program could see, and an address that is not there is ignored.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::asm;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// Bytes that a thread asks for ahead of their use.
const AHEAD: usize = 4096;

/// Asks for as many bytes as some blocks have, [`AHEAD`] of them: the hardware's prefetchers stop at the ends of pages, and a row of an
/// expert is shorter than one.
#[inline]
pub(super) fn prefetch<B>(blocks: &[B]) {
    let first = blocks.as_ptr().cast::<u8>();
    for at in (0..size_of_val(blocks)).step_by(64) {
        ask_first_cache(first.wrapping_add(AHEAD + at));
    }
}

/// Asks for all of some bytes, as far as the second cache.
pub(crate) fn ask_for(bytes: &[u8]) {
    bytes.chunks(64).for_each(|line| ask_second_cache(line.as_ptr()));
}

/// Asks for the bytes so far `behind` some, as far as the second cache: blocks one after the other, so that the line in which a block begins
/// was asked for with the last of the block before.
#[inline]
pub(super) fn ask_for_what_follows(block: &[u8], behind: usize) {
    let next = block.as_ptr().wrapping_add(behind);
    for at in (63..block.len()).step_by(64) {
        ask_second_cache(next.wrapping_add(at));
    }
    ask_second_cache(next.wrapping_add(block.len()).wrapping_sub(1));
}

/// Asks for the line of an address.
#[inline]
fn ask_first_cache(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect that the program could see, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) line, options(readonly, nostack, preserves_flags));
    }
}

/// Asks for the line of an address, as far as the second cache.
#[inline]
pub(super) fn ask_second_cache(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!("prfm pldl2keep, [{}]", in(reg) line, options(readonly, nostack, preserves_flags));
    }
}
