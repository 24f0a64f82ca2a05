//! Planes where their size is certain: on NVIDIA. Elsewhere what CubeCL offers for every size, which there would divide by
//! a size that the assembler does not fold, and loop over it.

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

/// Units of a plane of NVIDIA.
const SIZE: u32 = 32;

/// Whether kernels are compiled to PTX: only there are loads of the matrix units' tiles.
pub fn ptx(device: &DeviceProperties) -> bool {
    !device.features.matmul.ldmatrix.is_empty()
}

/// This unit's place in its plane.
#[cube]
pub fn lane() -> usize {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) { (UNIT_POS % SIZE) as usize } else { UNIT_POS_PLANE as usize }
}

/// This plane's place in its cube. All of its units must ask.
#[cube]
pub fn plane() -> usize {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) {
        // A compiler that sees that all units of a plane go one way needs no care for those which do not.
        plane_shuffle(UNIT_POS / SIZE, 0u32) as usize
    } else {
        PLANE_POS as usize
    }
}

/// Planes of a cube.
#[cube]
pub fn planes() -> usize {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) { (CUBE_DIM / SIZE) as usize } else { (CUBE_DIM / PLANE_DIM) as usize }
}

/// Units of a plane.
#[cube]
pub fn lanes() -> usize {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) { comptime!(SIZE as usize).runtime() } else { PLANE_DIM as usize }
}

/// Sum over the plane, in every unit.
#[cube]
pub fn plane_total(value: f32) -> f32 {
    let device = comptime::device_properties().comptime();
    if comptime!(ptx(&device)) {
        let mut sum = value;
        #[unroll]
        for i in 0..5u32 {
            sum += plane_shuffle_xor(sum, comptime!(SIZE >> (i + 1)));
        }
        sum
    } else {
        plane_sum(value)
    }
}
