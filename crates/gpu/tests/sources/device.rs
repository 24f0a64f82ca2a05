//! Devices that only read: they compile every kernel that they are asked to launch to Metal's language, or to CUDA's, and
//! compute nothing.

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::cmma::MatrixLayout;
use cubecl::ir::features::{AtomicUsage, Plane, Tma, TypeUsage};
use cubecl::ir::{
    AddressType, ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind,
    HardwareProperties, IntKind, MemoryDeviceProperties, MmaProperties, TargetProperties, Type, UIntKind,
};
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_common::profile::{ProfileDuration, TimingMethod};
use cubecl_cpp::MslCompiler;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::CudaCmmaCompiler;
use cubecl_cpp::cuda::mma::manual::{contiguous_elements_cuda, supported_mma_combinations};
use cubecl_cpp::metal::{arch::MetalArchitecture, supported_cmma_combinations_metal};
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, register_mma_features, register_wmma_features};
use cubecl_cpp::target::Cuda;
use cubecl_environment::future::DynFut;
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_server::compiler::Compiler;
use cubecl_server::dry_run::LaunchMode;
use cubecl_server::id::{GraphId, KernelId};
use cubecl_server::kernel::{CubeKernel, define_kernel};
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{ManagedMemoryHandle, MemoryAllocationMode, StreamMemoryReport};
use cubecl_server::server::{
    BufferBinding, CopyDescriptor, CubeCount, IoError, KernelArguments, ProfileError, ProfilingToken, Server,
    ServerCommunication, ServerError, ServerStorage, ServerUtilities,
};
use cubecl_server::storage::{ComputeStorage, ManagedResource, StorageHandle, StorageId};
use rayon::prelude::*;
use std::collections::HashMap;
use std::future::ready;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A kernel that was launched.
#[derive(Clone, Debug)]
pub(crate) struct Launched {
    /// What it is, and its comptime arguments.
    pub(crate) id: String,
    /// Its function: `kernels::file::name`.
    pub(crate) path: String,
    /// Buffers that it was given.
    pub(crate) buffers: usize,
    /// Whether its scalars and lengths fit a uniform buffer.
    pub(crate) uniform: bool,
    /// Units of a cube.
    pub(crate) units: u32,
    /// Most cubes along a dimension, of all its launches.
    pub(crate) cubes: u32,
    /// What the compiler made of it.
    pub(crate) compiled: Result<Source, String>,
}

/// What a device reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Language {
    /// Metal's, on an Apple GPU.
    Metal,
    /// CUDA's, on an H100.
    Cuda,
}

/// A kernel in a device's language.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// The text.
    pub(crate) text: String,
    /// Bytes of shared memory.
    pub(crate) shared: usize,
}

/// A kernel that is yet to be compiled.
struct Seen {
    language: Language,
    kernel: Box<dyn CubeKernel>,
    buffers: usize,
    uniform: bool,
    cubes: u32,
}

/// All that was launched.
static SEEN: Mutex<Vec<Seen>> = Mutex::new(Vec::new());

fn seen() -> MutexGuard<'static, Vec<Seen>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client of a device that reads a language.
pub(crate) fn client(language: Language) -> Client {
    Client::load::<PaperServer>(DeviceId::new(0, language as u16))
}

/// Every kernel launched until now, once for each set of comptime arguments, in the order of first launches.
pub(crate) fn kernels(client: &Client, language: Language) -> Vec<Launched> {
    // Launches are queued: a call that answers comes after them.
    client.flush().unwrap();
    seen().par_iter().filter(|s| s.language == language).map(Seen::compile).collect()
}

impl Seen {
    fn compile(&self) -> Launched {
        let id = self.kernel.id();
        // `crate::kernels::file::name::Name<...>`
        let path = id.type_name().split('<').next().unwrap_or_default();
        let path: Vec<&str> = path.split("::").collect();
        Launched {
            id: format!("{id:?}"),
            path: path[1..path.len() - 1].join("::"),
            buffers: self.buffers,
            uniform: self.uniform,
            units: id.cube_dim.num_elems(),
            cubes: self.cubes,
            compiled: compile(&*self.kernel, self.language),
        }
    }
}

/// What `cubecl-wgpu` says of an Apple GPU, in its `runtime.rs` and `backend/metal.rs`; and `cubecl-cuda` of an H100, as far
/// as kernels ask.
fn properties(language: Language) -> DeviceProperties {
    let metal = language == Language::Metal;
    let memory = MemoryDeviceProperties::new(8 << 30, 256);
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 28,
        max_shared_memory_size: if metal { 32 << 10 } else { 227 << 10 },
        max_cube_count: (0xFFFF, 0xFFFF, 0xFFFF),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 1024),
        num_streaming_multiprocessors: (!metal).then_some(132),
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: 4,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity { name: format!("{language:?} on paper"), ..DeviceIdentity::default() };
    let mut props =
        DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System, identity);
    props.register_address_type(AddressType::U32);
    props.register_address_type(AddressType::U64);
    let ints = [IntKind::I8, IntKind::I16, IntKind::I32, IntKind::I64].map(ElemType::Int);
    let uints = [UIntKind::U8, UIntKind::U16, UIntKind::U32, UIntKind::U64].map(ElemType::UInt);
    let floats = [FloatKind::F16, FloatKind::BF16, FloatKind::F32].map(ElemType::Float);
    for ty in [ElemType::Index, ElemType::Bool].into_iter().chain(ints).chain(uints).chain(floats) {
        props.register_type_usage(ty, TypeUsage::all());
    }
    for ty in [FloatKind::E4M3, FloatKind::E5M2, FloatKind::UE8M0, FloatKind::E2M1x2] {
        props.register_type_usage(ElemType::Float(ty), TypeUsage::Conversion | TypeUsage::Buffer);
    }
    for ty in [ElemType::Int(IntKind::I32), ElemType::UInt(UIntKind::U32)] {
        props.register_atomic_type_usage(Type::atomic(ty), AtomicUsage::all());
    }
    let float = Type::atomic(ElemType::Float(FloatKind::F32));
    props.register_atomic_type_usage(float, AtomicUsage::Add | AtomicUsage::LoadStore);
    if metal {
        register_wmma_features(supported_cmma_combinations_metal(&MetalArchitecture::Metal3), &mut props);
    } else {
        let arch = CudaArchitecture { version: 90, tensor_cores: true };
        register_wmma_features(CudaCmmaCompiler::Cpp.supported_cmma_combinations(&arch), &mut props);
        register_mma_features(supported_mma_combinations(&arch), &mut props);
        props.features.matmul.ldmatrix.insert(ElemType::Float(FloatKind::F16));
        props.features.memory_reinterpret = true;
        props.features.tma.insert(Tma::Base);
    }
    props.features.alignment = true;
    props.features.device_memory_scope = true;
    props.features.plane.insert(Plane::Ops);
    props.features.plane.insert(Plane::Sync);
    props
}

/// The device.
#[derive(Debug)]
struct PaperServer {
    utilities: Arc<ServerUtilities>,
    language: Language,
    /// Places in `SEEN`.
    places: HashMap<KernelId, usize>,
}

impl DeviceService for PaperServer {
    fn init(id: DeviceId) -> Self {
        let language = if id.index_id == Language::Metal as u16 { Language::Metal } else { Language::Cuda };
        let mma = match language {
            Language::Metal => Default::default(),
            Language::Cuda => MmaProperties {
                register_size_bits: 32,
                const_plane_size: 32,
                register_layout_a: MatrixLayout::RowMajor,
                register_layout_b: MatrixLayout::ColMajor,
                register_layout_acc: MatrixLayout::RowMajor,
                register_duplication_a: 1,
                register_duplication_b: 1,
                register_duplication_acc: 1,
                contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
            },
        };
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Self>(id),
            "paper",
            properties(language),
            TargetProperties { mma },
            Arc::new(ServerLogger::default()),
            ContiguousMemoryLayoutPolicy::new(256),
        );
        PaperServer { utilities: Arc::new(utilities), language, places: HashMap::new() }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone() as ServerUtilitiesHandle
    }
}

fn compile(kernel: &dyn CubeKernel, language: Language) -> Result<Source, String> {
    let definition = define_kernel(kernel).map_err(|e| e.to_string())?;
    let mut options = CompilationOptions::default();
    options.supports_features.dp4a = language == Language::Cuda;
    let compile = || match language {
        Language::Metal => MslCompiler::default().compile(definition, &options),
        Language::Cuda => CppCompiler::<Cuda>::default().compile(definition, &options),
    };
    match catch_unwind(AssertUnwindSafe(compile)) {
        Ok(Ok(kernel)) => Ok(Source { shared: kernel.shared_memory_size, text: kernel.source }),
        Ok(Err(e)) => Err(e.to_string()),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            Err(format!("the compiler panicked: {}", text.or(payload.downcast_ref().copied()).unwrap_or("?")))
        }
    }
}

impl ServerCommunication for PaperServer {}

impl Server for PaperServer {
    // What is launched does not run.
    #[allow(unsafe_code)]
    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        arguments: KernelArguments,
        _: StreamId,
        _: LaunchMode,
    ) {
        let mut seen = seen();
        let place = *self.places.entry(kernel.id()).or_insert_with(|| {
            let buffers = arguments.resources.len();
            let uniform = arguments.info.dynamic_metadata_offset >= arguments.info.data.len();
            seen.push(Seen { language: self.language, kernel, buffers, uniform, cubes: 0 });
            seen.len() - 1
        });
        if let CubeCount::Static(x, y, z) = count {
            seen[place].cubes = seen[place].cubes.max(x).max(y).max(z);
        }
    }

    fn initialize_memory(&mut self, _: ManagedMemoryHandle, _: u64, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }
    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }
    /// Zeros.
    fn read(&mut self, wanted: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let bytes = |d: &CopyDescriptor| vec![0; d.shape.iter().product::<usize>() * d.elem_size];
        let zeros = wanted.iter().map(|d| Bytes::from_bytes_vec(bytes(d))).collect();
        Box::pin(ready(Ok(zeros)))
    }
    fn write(&mut self, _: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {}
    fn sync(&mut self, _: Vec<BufferBinding>, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(ready(Ok(())))
    }
    fn check(&mut self, _: Vec<BufferBinding>, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn begin_capture(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn end_capture(&mut self, _: StreamId) -> Result<GraphId, ServerError> {
        Ok(GraphId::new())
    }
    fn replay(&mut self, _: GraphId, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn memory_report(&mut self, _: StreamId) -> Option<StreamMemoryReport> {
        None
    }
    fn memory_cleanup(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }
    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(ProfilingToken { id: 0 })
    }
    fn end_profile(&mut self, _: StreamId, _: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        Err(ProfileError::NotMeasured { backtrace: Default::default() })
    }
    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}
}

/// There is no memory.
struct Nothing;

impl ComputeStorage for Nothing {
    type Resource = ();

    fn alignment(&self) -> usize {
        256
    }
    fn get(&mut self, _: &StorageHandle) -> Result<(), IoError> {
        Err(unsupported())
    }
    fn alloc(&mut self, _: u64) -> Result<StorageHandle, IoError> {
        Err(unsupported())
    }
    fn dealloc(&mut self, _: StorageId) {}
    fn flush(&mut self) {}
    fn bytes_allocated(&self) -> u64 {
        0
    }
}

fn unsupported() -> IoError {
    IoError::UnsupportedIoOperation { backtrace: Default::default() }
}

impl ServerStorage for PaperServer {
    type Storage = Nothing;

    fn get_resource(&mut self, _: BufferBinding, _: StreamId) -> Result<ManagedResource<()>, ServerError> {
        Err(unsupported().into())
    }
}
