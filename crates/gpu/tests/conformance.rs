//! The whole model on a GPU against logits and activations of independent implementations. Without a GPU the
//! software Vulkan of Mesa serves (Debian: mesa-vulkan-drivers).
#![cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]
#![allow(clippy::panic, clippy::print_stdout)]

use ds4_gpu::{DeviceInfo, Gpu, Options, devices};
use ds4_model::{BackendError, Shape};
use ds4_testkit::backend_conformance;
use ds4_testkit::conformance::MakeBackend;

/// The machine's first GPU, or what acts as one.
struct OnGpu;

impl MakeBackend for OnGpu {
    type Backend = Gpu;

    fn make(&self, shape: &Shape, exact: bool, max_rows: usize) -> Result<Gpu, BackendError> {
        Gpu::new(shape, &devices()[..1], Options { exact, max_rows, ..Options::default() })
    }

    fn few_rows(&self) -> Option<usize> {
        devices().first().and_then(DeviceInfo::few_rows)
    }
}

backend_conformance!(OnGpu);
