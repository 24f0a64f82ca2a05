//! Stands for `gpu.rs` where no GPU backend is compiled in: there are no devices, so that nothing opens one.

use crate::device::GpuInfo;
use ds4_gguf::TensorType;
use ds4_model::{BackendError, Shape};
use ds4_testkit::conformance::MakeBackend;

/// Never made; any backend will do.
pub(crate) type Gpu = ds4_cpu::Cpu;

pub(crate) fn devices() -> Vec<GpuInfo> {
    Vec::new()
}

pub(crate) fn tensor_bytes(_: &str, ty: TensorType, dims: &[u64], _exact: bool) -> u64 {
    ty.bytes_of(dims.iter().product())
}

pub(crate) fn open(
    _: &Shape,
    _: &[GpuInfo],
    _exact: bool,
    _max_rows: usize,
    _kv_bytes: u64,
) -> Result<Gpu, BackendError> {
    Err(BackendError::new("this ds4 was built without a GPU backend"))
}

/// Makes backends for `ds4 doctor`.
pub(crate) struct OnGpu(pub(crate) GpuInfo);

impl MakeBackend for OnGpu {
    type Backend = Gpu;

    fn make(&self, shape: &Shape, exact: bool, max_rows: usize) -> Result<Gpu, BackendError> {
        open(shape, std::slice::from_ref(&self.0), exact, max_rows, 0)
    }
}
