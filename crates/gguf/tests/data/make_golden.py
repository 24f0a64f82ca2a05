#!/usr/bin/env python3
"""Writes golden.gguf with the PyPI package `gguf`: every value type, two tensors, an alignment of 64."""
import pathlib

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

g = GGUFWriter(str(pathlib.Path(__file__).with_name("golden.gguf")), "golden")
g.add_custom_alignment(64)
g.add_uint8("t.u8", 200)
g.add_int8("t.i8", -100)
g.add_uint16("t.u16", 60000)
g.add_int16("t.i16", -30000)
g.add_uint32("t.u32", 4_000_000_000)
g.add_int32("t.i32", -2_000_000_000)
g.add_float32("t.f32", 0.1)
g.add_bool("t.bool", True)
g.add_string("t.string", "naïve ｜ 文")
g.add_uint64("t.u64", 1 << 63)
g.add_int64("t.i64", -(1 << 62))
g.add_float64("t.f64", 1e300)
g.add_array("t.strings", ["", "a", "ß"])
g.add_key_value("t.ints", [1, -2, 3], GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32)
g.add_key_value("t.floats", [0.5, -1.5], GGUFValueType.ARRAY, sub_type=GGUFValueType.FLOAT32)
g.add_key_value("t.bools", [True, False], GGUFValueType.ARRAY, sub_type=GGUFValueType.BOOL)
g.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
g.add_tensor("blocks", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=GGMLQuantizationType.Q8_0)
g.write_header_to_file()
g.write_kv_data_to_file()
g.write_tensors_to_file()
g.close()
