//! The encoders as they are, built for the wide registers of the machine at hand. Nothing but speed depends on it: sums keep
//! their order, and products and sums are not fused.

use ds4_gguf::TensorType;

/// Appends a row as blocks of 256.
#[allow(unsafe_code)]
pub(super) fn super_blocks(ty: TensorType, row: &[f32], importances: Option<&[f32]>, out: &mut Vec<u8>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is built for.
        return unsafe { avx2(ty, row, importances, out) };
    }
    super::super_blocks(ty, row, importances, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(ty: TensorType, row: &[f32], importances: Option<&[f32]>, out: &mut Vec<u8>) {
    super::super_blocks(ty, row, importances, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_changes_no_byte() {
        let row: Vec<f32> =
            (0..1024u64).map(|i| ((i * i * 7919 % 2003) as f32 / 1000.0 - 1.0).powi(3)).collect();
        let weights: Vec<f32> = (0..1024u64).map(|i| (i * 31 % 97) as f32).collect();
        for ty in [TensorType::Q2K, TensorType::Q4K, TensorType::Iq2Xxs] {
            for importances in [None, Some(weights.as_slice())] {
                let (mut plain, mut wide) = (Vec::new(), Vec::new());
                super::super::super_blocks(ty, &row, importances, &mut plain);
                super_blocks(ty, &row, importances, &mut wide);
                assert!(plain == wide, "{ty}");
            }
        }
    }
}
