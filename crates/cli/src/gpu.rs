//! The GPU backend, where it is compiled in; `no_gpu.rs` stands for it elsewhere.

use crate::device::{Api, Device, GpuInfo};
use ds4_gpu::{DeviceInfo, Options};
pub(crate) use ds4_gpu::{Gpu, tensor_bytes};
use ds4_model::{BackendError, Shape};
use ds4_testkit::conformance::MakeBackend;

fn info(device: DeviceInfo) -> GpuInfo {
    let api = match device.api {
        ds4_gpu::Api::Cuda => Api::Cuda,
        ds4_gpu::Api::Vulkan => Api::Vulkan,
        ds4_gpu::Api::Metal => Api::Metal,
    };
    let DeviceInfo { index, name, memory, free, software, matrix_units, .. } = device;
    GpuInfo { api, index, name, memory, free, software, matrix_units }
}

pub(crate) fn devices() -> Vec<GpuInfo> {
    let user = directories::ProjectDirs::from("", "", "ds4");
    ds4_gpu::keep_kernels(user.map(|dirs| dirs.cache_dir().join("kernels")).as_deref());
    ds4_gpu::devices().into_iter().map(info).collect()
}

fn is(device: &DeviceInfo, other: &GpuInfo) -> bool {
    let device = info(device.clone());
    device.api == other.api && device.index == other.index
}

pub(crate) fn open(
    shape: &Shape,
    chosen: &[GpuInfo],
    exact: bool,
    max_rows: usize,
    kv_bytes: u64,
) -> Result<Gpu, BackendError> {
    let devices: Vec<_> =
        ds4_gpu::devices().into_iter().filter(|d| chosen.iter().any(|c| is(d, c))).collect();
    Gpu::new(shape, &devices, Options { exact, max_rows, kv_bytes })
}

impl Device for Gpu {
    fn bandwidth(&mut self) -> Option<f64> {
        Gpu::bandwidth(self)
    }
    fn time_kernels(&mut self, on: bool) {
        Gpu::time_kernels(self, on);
    }
    fn kernel_times(&self) -> Vec<(&'static str, usize, f64)> {
        Gpu::kernel_times(self)
    }
}

/// Makes backends for `ds4 doctor`.
pub(crate) struct OnGpu(pub(crate) GpuInfo);

impl MakeBackend for OnGpu {
    type Backend = Gpu;

    fn make(&self, shape: &Shape, exact: bool, max_rows: usize) -> Result<Gpu, BackendError> {
        open(shape, std::slice::from_ref(&self.0), exact, max_rows, 0)
    }

    fn few_rows(&self) -> Option<usize> {
        ds4_gpu::devices().iter().find(|d| is(d, &self.0)).and_then(DeviceInfo::few_rows)
    }
}
