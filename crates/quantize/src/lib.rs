//! ds4-quantize
