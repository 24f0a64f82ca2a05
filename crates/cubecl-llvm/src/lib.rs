//! `cubecl-cuda` can compile kernels through LLVM or through CUDA's own compiler, NVRTC, and links both. The
//! LLVM route downloads an LLVM bundle when it is built. This crate takes its place (`[patch.crates-io]` in
//! the workspace): it offers just the names that `cubecl-cuda` 0.11 uses and refuses to compile, so that only
//! the NVRTC route (feature `cuda-cpp`) is left. To be dropped when LLVM is optional upstream.

use cubecl_core::environment::backtrace::BackTrace;
use cubecl_core::ir::nvidia::SmArch;
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::kernel::{BufferIOAttr, KernelDefinition};
use std::ffi::c_char;
use std::fmt;

/// Versions of NVIDIA's assembly.
pub mod nvptx {
    /// The version that a driver loads.
    pub mod ptx_version {
        use std::fmt;

        /// Never exists: only LLVM asks for it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PtxVersion {}

        impl PtxVersion {
            /// None, for any driver.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl fmt::Display for PtxVersion {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {}
            }
        }
    }
}

/// What LLVM could lower.
pub mod shared {
    /// Features of a device, narrowed to those.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// The target narrowed for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
        }

        /// Leaves all features: nothing is lowered here.
        pub fn restrict_features(_props: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

/// Targets of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LlvmTarget {
    /// NVIDIA.
    Nvptx,
}

/// A compiler that refuses.
#[derive(Clone, Debug)]
pub struct PlironCompiler {
    /// Its target.
    pub target: LlvmTarget,
}

/// Its options.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Not used.
    pub arch: Option<SmArch>,
    /// Not used.
    pub sm_arch: Option<SmArch>,
    /// Not used.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Not used.
    pub grid_constants: bool,
    /// Not used; callers fill in the rest from the default.
    pub cpu_buffer_alignment: Option<u32>,
}

/// A module, never made.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// Assembly.
    pub ptx: Vec<c_char>,
    /// Text for logs.
    pub ir: String,
    /// Bytes a launch needs.
    pub shared_memory_size: usize,
    /// How buffers are used.
    pub io: Vec<BufferIOAttr>,
}

/// What compiling would give.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PlironArtifact {
    /// A module.
    NvptxCode(NvptxModule),
}

impl fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PlironArtifact::NvptxCode(module) = self;
        f.write_str(&module.ir)
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this build has no LLVM: build with the feature cuda-cpp, which uses NVRTC".into(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubecl_core::ir::AddressType;
    use cubecl_core::ir::settings::{Dim3, ExecutionMode, KernelSettings};
    use cubecl_core::prelude::KernelBuilder;

    /// `cubecl-cuda` takes its NVRTC route where this is none.
    #[test]
    fn no_driver_has_a_version() {
        assert_eq!(nvptx::ptx_version::PtxVersion::for_driver(13_000), None);
    }

    #[test]
    fn compiling_is_refused_and_says_why() {
        let settings = KernelSettings::new(Dim3::new_single(), ExecutionMode::Checked, AddressType::U32);
        let mut compiler = PlironCompiler { target: LlvmTarget::Nvptx };
        let refused = compiler.compile(KernelBuilder::new(settings).build(), &PlironOptions::default());
        assert!(refused.is_err_and(|e| e.to_string().contains("build with the feature cuda-cpp")));
    }
}
