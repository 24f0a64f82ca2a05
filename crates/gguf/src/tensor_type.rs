/// Element types of tensors. All types of the format are known by size, so that any file can be inspected;
/// the engine computes with a few of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
    Iq2Xxs,
    Iq2Xs,
    Iq3Xxs,
    Iq1S,
    Iq4Nl,
    Iq3S,
    Iq2S,
    Iq4Xs,
    I8,
    I16,
    I32,
    I64,
    F64,
    Iq1M,
    Bf16,
    Tq1_0,
    Tq2_0,
    Mxfp4,
}

/// (type, id, name, elements per block, bytes per block)
const TABLE: [(TensorType, u32, &str, u64, u64); 32] = {
    use TensorType::*;
    [
        (F32, 0, "F32", 1, 4),
        (F16, 1, "F16", 1, 2),
        (Q4_0, 2, "Q4_0", 32, 18),
        (Q4_1, 3, "Q4_1", 32, 20),
        (Q5_0, 6, "Q5_0", 32, 22),
        (Q5_1, 7, "Q5_1", 32, 24),
        (Q8_0, 8, "Q8_0", 32, 34),
        (Q8_1, 9, "Q8_1", 32, 36),
        (Q2K, 10, "Q2_K", 256, 84),
        (Q3K, 11, "Q3_K", 256, 110),
        (Q4K, 12, "Q4_K", 256, 144),
        (Q5K, 13, "Q5_K", 256, 176),
        (Q6K, 14, "Q6_K", 256, 210),
        (Q8K, 15, "Q8_K", 256, 292),
        (Iq2Xxs, 16, "IQ2_XXS", 256, 66),
        (Iq2Xs, 17, "IQ2_XS", 256, 74),
        (Iq3Xxs, 18, "IQ3_XXS", 256, 98),
        (Iq1S, 19, "IQ1_S", 256, 50),
        (Iq4Nl, 20, "IQ4_NL", 32, 18),
        (Iq3S, 21, "IQ3_S", 256, 110),
        (Iq2S, 22, "IQ2_S", 256, 82),
        (Iq4Xs, 23, "IQ4_XS", 256, 136),
        (I8, 24, "I8", 1, 1),
        (I16, 25, "I16", 1, 2),
        (I32, 26, "I32", 1, 4),
        (I64, 27, "I64", 1, 8),
        (F64, 28, "F64", 1, 8),
        (Iq1M, 29, "IQ1_M", 256, 56),
        (Bf16, 30, "BF16", 1, 2),
        (Tq1_0, 34, "TQ1_0", 256, 54),
        (Tq2_0, 35, "TQ2_0", 256, 66),
        (Mxfp4, 39, "MXFP4", 32, 17),
    ]
};

impl TensorType {
    fn entry(self) -> &'static (TensorType, u32, &'static str, u64, u64) {
        // The table lists the variants in order of declaration, which a test checks.
        &TABLE[self as usize]
    }

    /// Number in the file.
    pub fn id(self) -> u32 {
        self.entry().1
    }

    /// Common name.
    pub fn name(self) -> &'static str {
        self.entry().2
    }

    /// Elements of a block.
    pub fn block_len(self) -> u64 {
        self.entry().3
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        self.entry().4
    }

    /// Bytes of whole blocks with so many elements together.
    pub fn bytes_of(self, elements: u64) -> u64 {
        (elements / self.block_len()).saturating_mul(self.block_bytes())
    }

    /// The type of a number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|t| t.1 == id).map(|t| t.0)
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_order_of_declaration() {
        for (i, t) in TABLE.iter().enumerate() {
            assert_eq!(t.0 as usize, i);
            assert_eq!(TensorType::from_id(t.1), Some(t.0));
        }
    }
}
