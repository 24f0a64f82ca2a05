//! The whole model against logits and activations of independent implementations.
#![allow(clippy::panic, clippy::print_stdout)]

use ds4_cpu::{Cpu, Options};
use ds4_model::{BackendError, Shape};
use ds4_testkit::backend_conformance;
use ds4_testkit::conformance::MakeBackend;

struct OnCpu;

impl MakeBackend for OnCpu {
    type Backend = Cpu;

    fn make(&self, shape: &Shape, exact: bool, max_rows: usize) -> Result<Cpu, BackendError> {
        Cpu::new(shape, Options { exact, max_rows, ..Options::default() })
    }
}

backend_conformance!(OnCpu);
