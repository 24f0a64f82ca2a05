//! The machine's GPUs, by the interface that reaches them.

use crate::kernels::matmul;
use cubecl::client::Client;
use cubecl::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use std::fmt;
use std::sync::OnceLock;

/// An interface to GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// NVIDIA's.
    Cuda,
    /// That of most vendors, and of a software renderer.
    Vulkan,
    /// Apple's.
    Metal,
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Api::Cuda => "cuda",
            Api::Vulkan => "vulkan",
            Api::Metal => "metal",
        })
    }
}

/// A GPU, or a program that acts as one.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// How it is reached.
    pub api: Api,
    /// Its place among those of the interface.
    pub index: usize,
    /// As it names itself.
    pub name: String,
    /// Bytes of memory; 0 where the interface does not tell.
    pub memory: u64,
    /// Bytes of it that are free; 0 where the interface does not tell.
    pub free: u64,
    /// Whether it is a program on the CPU.
    pub software: bool,
    /// Whether it multiplies small matrices in hardware.
    pub matrix_units: bool,
    client: ClientOf,
}

/// A client, shown as its name.
#[derive(Clone)]
struct ClientOf(Client);

impl fmt::Debug for ClientOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

impl DeviceInfo {
    fn new(api: Api, index: usize, client: Client, software: bool) -> Self {
        let properties = client.properties();
        DeviceInfo {
            api,
            index,
            name: properties.identity.name.clone(),
            memory: properties.memory.max_memory().unwrap_or(0),
            free: 0,
            software,
            matrix_units: matrix_tile(&client).is_some(),
            client: ClientOf(client),
        }
    }

    /// A device that is none of the machine's, for tests.
    #[doc(hidden)]
    pub fn of_client(api: Api, client: Client) -> Self {
        DeviceInfo::new(api, 0, client, false)
    }

    /// Rows of a pass of the default mode up to which all passes give the same bits, as larger ones do among
    /// themselves: those go to the matrix units. None where there are no such units.
    pub fn few_rows(&self) -> Option<usize> {
        usable_tile(&self.client.0).map(|_| FEW_ROWS)
    }

    /// Bytes that a model may use; 0 where nobody knows.
    pub(crate) fn usable(&self) -> u64 {
        if self.free > 0 { self.free } else { self.memory }
    }

    pub(crate) fn client(&self) -> Client {
        self.client.0.clone()
    }
}

/// Most rows of the default mode for which a plane takes a row of weights.
pub(crate) const FEW_ROWS: usize = 16;

/// [`matrix_tile`], where all planes have 32 or 64 units, since matrix units are programmed by planes, and where shared
/// memory has room for the kernels' tiles.
pub(crate) fn usable_tile(client: &Client) -> Option<usize> {
    let hardware = &client.properties().hardware;
    let certain = hardware.plane_size_min == hardware.plane_size_max;
    let room = |&side: &usize| matmul::least_shared_bytes(side) <= hardware.max_shared_memory_size;
    matrix_tile(client).filter(room).filter(|_| certain && matches!(hardware.plane_size_max, 32 | 64))
}

/// Side of the square tiles of f16 that the matrix units multiply into f32, if there are any.
pub(crate) fn matrix_tile(client: &Client) -> Option<usize> {
    let offered = |&side: &u32| client.features().matmul.cmma.contains(&half_products(side, side, side));
    [16, 8].into_iter().find(offered).map(|side| side as usize)
}

/// Whether the device says which unit holds which part of a tile of 16x16: products and loads are then by fragments.
pub(crate) fn has_fragments(client: &Client) -> bool {
    let matmul = &client.features().matmul;
    matrix_tile(client) == Some(16)
        && matmul.mma.contains(&half_products(16, 8, 16))
        && matmul.ldmatrix.contains(&ElemType::Float(FloatKind::F16))
}

/// Products of f16, summed in f32.
fn half_products(m: u32, n: u32, k: u32) -> MmaConfig {
    let (half, single) = (ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32));
    MmaConfig { a_type: half, b_type: half, cd_type: single, m, n, k }
}

/// All devices that this build can reach, those of CUDA first. Each is opened, which takes a moment the first time.
pub fn devices() -> Vec<DeviceInfo> {
    static FOUND: OnceLock<Vec<DeviceInfo>> = OnceLock::new();
    let find = || {
        let mut found = Vec::new();
        #[cfg(feature = "cuda")]
        found.extend(cuda::devices());
        #[cfg(any(feature = "vulkan", feature = "metal"))]
        found.extend(wgpu::devices());
        found
    };
    FOUND.get_or_init(find).clone()
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{Api, DeviceInfo};
    use cubecl::cuda::{CudaDevice, CudaRuntime};
    use cubecl_runtime::runtime::Runtime;

    /// The runtime panics where the driver or its compiler is missing, so look first.
    #[allow(unsafe_code)]
    fn present() -> bool {
        let loads = |names: &[&str]| {
            // SAFETY: these are NVIDIA's libraries; loading them runs only their own initialisation.
            names.iter().any(|name| unsafe { libloading::Library::new(name) }.is_ok())
        };
        let (driver, compiler): (&[&str], &[&str]) = if cfg!(windows) {
            (&["nvcuda.dll"], &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"])
        } else {
            (&["libcuda.so.1", "libcuda.so"], &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"])
        };
        loads(driver) && loads(compiler)
    }

    pub(super) fn devices() -> Vec<DeviceInfo> {
        if !present() {
            return Vec::new();
        }
        let ids = CudaRuntime::enumerate_devices(0);
        let open = |index: usize| {
            DeviceInfo::new(Api::Cuda, index, CudaRuntime::client(&CudaDevice::new(index)), false)
        };
        (0..ids.len()).map(open).collect()
    }
}

#[cfg(any(feature = "vulkan", feature = "metal"))]
mod wgpu {
    use super::{Api, DeviceInfo};
    use cubecl::wgpu::{WgpuBackend, WgpuDevice, WgpuDeviceKind as Kind, WgpuRuntime, WgslCompiler};
    use cubecl_common::device::Device as _;
    use cubecl_runtime::runtime::Runtime;

    pub(super) fn devices() -> Vec<DeviceInfo> {
        let (api, backend) = if cfg!(target_os = "macos") {
            (Api::Metal, WgpuBackend::Metal)
        } else {
            (Api::Vulkan, WgpuBackend::Vulkan)
        };
        let kinds =
            [Kind::DiscreteGpu(0), Kind::IntegratedGpu(0), Kind::VirtualGpu(0), Kind::Other(0), Kind::Cpu];
        let mut found = Vec::new();
        for kind in kinds {
            let software = kind == Kind::Cpu;
            for id in <WgpuRuntime>::enumerate_devices_like(WgpuDevice::new(kind).on(backend).to_id()) {
                let device = WgpuDevice::from_id(id);
                // Mesa's software Vulkan lacks the extension for the layout of shared memory; without it
                // cubecl-spirv 0.11 declares pointers to pointers, on which Mesa crashes. So through WGSL there.
                let client = if software {
                    WgpuRuntime::<WgslCompiler>::client(&device)
                } else {
                    <WgpuRuntime>::client(&device)
                };
                found.push(DeviceInfo::new(api, found.len(), client, software));
            }
        }
        found
    }
}
