//! Decoding allocates nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use ds4_cpu::{Cpu, Options};
use ds4_engine::{Engine, EngineOptions};
use ds4_gguf::Gguf;
use ds4_model::Shape;
use ds4_testkit::Fixture;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code)]
// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn decoding_allocates_nothing() {
    let fixture = Fixture::shipped("dev-q2mix");
    let file = Gguf::open(fixture.path("model.gguf")).unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let cpu = Cpu::new(&shape, Options { threads: 2, ..Options::default() }).unwrap();
    let mut engine = Engine::load(cpu, &file, None, EngineOptions::default()).unwrap();
    let tokens = fixture.tokens().unwrap();
    let mut session = engine.session(1100).unwrap();
    // Long enough that the indexer selects and every buffer has its size.
    engine.sync(&mut session, &tokens[..600], &mut |_, _| ControlFlow::Continue(())).unwrap();
    for &token in &tokens[600..700] {
        engine.step(&mut session, token).unwrap();
    }
    let before = COUNT.load(Ordering::Relaxed);
    let steps = 256;
    for &token in &tokens[700..700 + steps] {
        engine.step(&mut session, token).unwrap();
    }
    let allocations = COUNT.load(Ordering::Relaxed) - before;
    // The thread pool's queue takes a new block every 63 passes; that is all.
    assert!(allocations <= steps / 63 + 1, "{allocations} allocations in {steps} steps");
}
