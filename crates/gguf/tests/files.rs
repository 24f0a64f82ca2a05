//! Files of another writer, our own writer, and files that lie.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use ds4_gguf::{Error, Gguf, Metadata, Part, Resume, TensorType, Value, Writer};
use proptest::prelude::*;
use std::io::Write;
use std::path::Path;

fn golden() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden.gguf")).unwrap()
}

#[test]
fn reads_what_another_implementation_wrote() {
    let file = Gguf::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden.gguf")).unwrap();
    let meta = file.metadata();
    assert_eq!(meta.str("general.architecture").unwrap(), "golden");
    assert_eq!(file.alignment(), 64);
    for (key, value) in [
        ("t.u8", Value::U8(200)),
        ("t.i8", Value::I8(-100)),
        ("t.u16", Value::U16(60000)),
        ("t.i16", Value::I16(-30000)),
        ("t.u32", Value::U32(4_000_000_000)),
        ("t.i32", Value::I32(-2_000_000_000)),
        ("t.f32", Value::F32(0.1)),
        ("t.bool", Value::Bool(true)),
        ("t.string", Value::String("naïve ｜ 文".into())),
        ("t.u64", Value::U64(1 << 63)),
        ("t.i64", Value::I64(-(1 << 62))),
        ("t.f64", Value::F64(1e300)),
        ("t.strings", Value::ArrayString(vec!["".into(), "a".into(), "ß".into()])),
        ("t.ints", Value::ArrayI32(vec![1, -2, 3])),
        ("t.floats", Value::ArrayF32(vec![0.5, -1.5])),
        ("t.bools", Value::ArrayBool(vec![true, false])),
    ] {
        assert_eq!(meta.get(key), Some(&value), "{key}");
    }
    let plain = file.tensor("plain").unwrap();
    assert_eq!((plain.dims(), plain.ty()), (&[3, 2][..], TensorType::F32));
    assert_eq!(plain.bytes(), (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<_>>());
    let blocks = file.tensor("blocks").unwrap();
    assert_eq!((blocks.dims(), blocks.ty()), (&[32, 2][..], TensorType::Q8_0));
    assert_eq!(blocks.bytes(), (0..68).collect::<Vec<u8>>());
    assert!(file.tensor("none").is_none());
}

#[test]
fn getters_convert_what_fits_and_name_what_does_not() {
    let file = Gguf::from_bytes(golden()).unwrap();
    let meta = file.metadata();
    assert_eq!(meta.u32("t.u8").unwrap(), 200);
    assert_eq!(meta.u64("t.u32").unwrap(), 4_000_000_000);
    assert_eq!(meta.f32("t.i16").unwrap(), -30000.0);
    assert_eq!(meta.i32_array("t.ints").unwrap(), [1, -2, 3]);
    assert_eq!(meta.opt_u32("none").unwrap(), None);
    let message = |e: Error| e.to_string();
    assert_eq!(message(meta.u32("none").unwrap_err()), "metadata key none is missing");
    assert_eq!(
        message(meta.u32("t.i8").unwrap_err()),
        "metadata key t.i8 is i8 -100, expected an integer from 0 to 4294967295"
    );
    assert_eq!(
        message(meta.u32_array("t.ints").unwrap_err()),
        "metadata key t.ints is array of i32, expected an array of integers from 0 to 4294967295"
    );
    assert!(message(meta.str("t.u8").unwrap_err()).contains("expected a string"));
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = golden();
    let data_end = bytes.len() - 64 + 68 % 64; // behind the last tensor only padding follows
    for len in 0..data_end.min(bytes.len()) {
        assert!(Gguf::from_bytes(bytes[..len].to_vec()).is_err(), "{len} of {}", bytes.len());
    }
}

/// A file of one key with the given type and payload, and one tensor with the given directory fields.
fn forged(value_type: u32, payload: &[u8], dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut b = Vec::new();
    b.extend(0x4655_4747u32.to_le_bytes());
    b.extend(3u32.to_le_bytes());
    b.extend(1u64.to_le_bytes());
    b.extend(1u64.to_le_bytes());
    b.extend(1u64.to_le_bytes());
    b.push(b'k');
    b.extend(value_type.to_le_bytes());
    b.extend(payload);
    b.extend(1u64.to_le_bytes());
    b.push(b't');
    b.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
    b.extend(ty.to_le_bytes());
    b.extend(offset.to_le_bytes());
    b.resize(b.len().next_multiple_of(32) + 64, 0);
    b
}

#[test]
fn lies_are_named() {
    let error = |bytes: Vec<u8>| Gguf::from_bytes(bytes).err().map_or("no error".into(), |e| e.to_string());
    let fine = |dims: &[u64], ty, offset| forged(4, &[0; 4], dims, ty, offset);
    assert_eq!(error(fine(&[8], 0, 0)), "no error");
    for (bytes, want) in [
        (fine(&[], 0, 0), "tensor t dimension count"),
        (fine(&[1; 5], 0, 0), "expected 1 to 4"),
        (fine(&[0], 0, 0), "zero"),
        (fine(&[1 << 40, 1 << 40], 0, 0), "too large"),
        (fine(&[1 << 62, 2], 0, 0), "too large"),
        (fine(&[8], 99, 0), "unknown type 99"),
        (fine(&[8], 8, 0), "no multiple of the 32"),
        (fine(&[8], 0, 7), "no multiple of the alignment"),
        (fine(&[8], 0, 64), "truncated"),
        (fine(&[8], 0, u64::MAX - 31), "truncated"),
        (forged(13, &[0; 8], &[8], 0, 0), "unknown value type 13"),
        (forged(7, &[2], &[8], 0, 0), "no bool"),
        (forged(8, &[255; 8], &[8], 0, 0), "does not fit"),
        (forged(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff], &[8], 0, 0), "not UTF-8"),
        (forged(9, &[10, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0], &[8], 0, 0), "does not fit"),
        (forged(9, &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].repeat(9), &[8], 0, 0), "nested deeper"),
    ] {
        let got = error(bytes);
        assert!(got.contains(want), "{got:?} should contain {want:?}");
    }
    assert!(error(b"GGML".repeat(20)).contains("not a GGUF file"));
    let mut old = golden();
    old[4] = 2;
    assert!(error(old).contains("version"));
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        (-1e30f32..1e30).prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        "\\PC{0,20}".prop_map(Value::String),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e200f64..1e200).prop_map(Value::F64),
        prop::collection::vec(any::<u32>(), 0..5).prop_map(Value::ArrayU32),
        prop::collection::vec(any::<i64>(), 0..5).prop_map(Value::ArrayI64),
        prop::collection::vec(any::<bool>(), 0..5).prop_map(Value::ArrayBool),
        prop::collection::vec("\\PC{0,5}", 0..5).prop_map(Value::ArrayString),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3).prop_map(Value::ArrayU8), 0..3)
            .prop_map(Value::Nested),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        values in prop::collection::vec(value(), 0..10),
        tensors in prop::collection::vec((1u64..5, 1u64..4, prop::sample::select(vec![TensorType::F32, TensorType::F16, TensorType::Q8_0, TensorType::Iq2Xxs])), 0..5),
        alignment in prop::sample::select(vec![8u32, 32, 256]),
    ) {
        let mut writer = Writer::new("x");
        writer.set("general.alignment", Value::U32(alignment));
        for (i, v) in values.iter().enumerate() {
            writer.set(&format!("k{i}"), v.clone());
        }
        let mut contents = Vec::new();
        for (i, (blocks, rows, ty)) in tensors.iter().enumerate() {
            let bytes = writer.tensor(&format!("t{i}"), &[blocks * ty.block_len(), *rows], *ty).unwrap();
            contents.push((0..bytes).map(|b| (b as usize * 7 + i) as u8).collect::<Vec<u8>>());
        }
        let mut file = Vec::new();
        writer.write(&mut file, &mut |i, out| { out.write_all(&contents[i]).unwrap(); Ok(()) }).unwrap();
        let read = Gguf::from_bytes(file).unwrap();
        for (i, v) in values.iter().enumerate() {
            prop_assert_eq!(read.metadata().get(&format!("k{i}")), Some(v));
        }
        for (i, content) in contents.iter().enumerate() {
            let t = read.tensor(&format!("t{i}")).unwrap();
            prop_assert_eq!(t.bytes(), &content[..]);
            prop_assert_eq!(t.info().offset % u64::from(alignment), 0);
        }
    }

    #[test]
    fn damage_never_panics(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let mut bytes = golden();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(file) = Gguf::from_bytes(bytes) {
            for t in file.tensors() {
                prop_assert_eq!(file.tensor(&t.name).unwrap().bytes().len() as u64, t.bytes);
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Gguf::from_bytes([&b"GGUF\x03\0\0\0"[..], &bytes].concat());
    }
}

#[test]
fn the_writer_refuses_contradictions() {
    let mut w = Writer::new("x");
    assert!(w.tensor("t", &[31], TensorType::Q8_0).is_err());
    assert!(w.tensor("t", &[], TensorType::F32).is_err());
    w.tensor("t", &[4], TensorType::F32).unwrap();
    assert!(w.tensor("t", &[4], TensorType::F32).unwrap_err().to_string().contains("declared twice"));
    let short = w.write(Vec::new(), &mut |_, out| {
        out.write_all(&[0; 15]).unwrap();
        Ok(())
    });
    assert!(short.unwrap_err().to_string().contains("15 bytes came, 16 were declared"));
}

/// A hole that reads as more empty entries than memory could hold.
#[test]
fn a_hole_cannot_make_us_allocate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hole.gguf");
    let mut strings = [[1u8, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]].concat();
    strings.extend(b"k");
    strings.extend([9u32, 8].iter().flat_map(|v| v.to_le_bytes()));
    for (tensors, rest) in [(1u64 << 33, vec![0; 8]), (0, strings)] {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(rest);
        bytes.extend((1u64 << 33).to_le_bytes());
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&bytes).unwrap();
        file.set_len(1 << 38).unwrap();
        let error = Gguf::open(&path).err().unwrap().to_string();
        assert!(error.contains("a count of 8589934592 does not fit"), "{error}");
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let refused = |key: &str, value| {
        let mut w = Writer::new("x");
        w.set(key, value);
        w.write(Vec::new(), &mut |_, _| Ok(())).unwrap_err().to_string()
    };
    assert!(refused("k", Value::Nested(vec![Value::U8(1)])).contains("metadata key k"));
    assert!(refused("general.alignment", Value::U32(1 << 21)).contains("up to 1048576"));
}

#[test]
fn a_failed_write_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut w = Writer::new("x");
    w.tensor("t", &[4], TensorType::F32).unwrap();
    assert!(w.write_file(&path, &mut |_, _| Err(Error::Write("no".into()))).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    w.write_file(&path, &mut |_, out| {
        out.write_all(&[0; 16]).unwrap();
        Ok(())
    })
    .unwrap();
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 1);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// An interrupted file goes on behind the last tensor that is safely there, if it is made from the same.
#[test]
fn writing_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut w = Writer::new("x");
    for name in ["a", "b", "c"] {
        w.tensor(name, &[8], TensorType::F32).unwrap();
    }
    // Writes until tensor `stop`; returns how many were there already, and those that were made.
    let write = |w: &Writer, key: &str, stop: usize| {
        let (mut done, mut made) = (0, Vec::new());
        let resume = Resume { key: key.into(), every: 1 };
        let written = w.write_resumable(&path, &resume, &mut |n| done = n, &mut |i, out| {
            made.push(i);
            out.write_all(&[i as u8; 16]).unwrap();
            if i == stop {
                return Err(Error::Write("stopped".into()));
            }
            out.write_all(&[i as u8; 16]).unwrap();
            Ok(())
        });
        (written.is_ok(), done, made)
    };
    assert_eq!(write(&w, "k", 0), (false, 0, vec![0]));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing worth keeping");
    assert_eq!(write(&w, "k", 2), (false, 0, vec![0, 1, 2]));
    assert!(!path.exists());
    assert_eq!(write(&w, "k", 2), (false, 2, vec![2]), "half a tensor was left");
    assert_eq!(write(&w, "other", 1), (false, 0, vec![0, 1]), "made from something else");
    let mut renamed = Writer::new("y");
    for name in ["a", "b", "c"] {
        renamed.tensor(name, &[8], TensorType::F32).unwrap();
    }
    assert_eq!(write(&renamed, "other", 9), (true, 0, vec![0, 1, 2]), "another header");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let resumed = std::fs::read(&path).unwrap();

    assert_eq!(write(&renamed, "other", 2), (false, 0, vec![0, 1, 2]));
    assert_eq!(write(&renamed, "other", 9), (true, 2, vec![2]));
    assert_eq!(std::fs::read(&path).unwrap(), resumed);
    assert!(Gguf::open(&path).unwrap().tensor("c").unwrap().bytes().iter().all(|&b| b == 2));
}

/// Two processes that write the same file would spoil it.
#[test]
fn a_partial_file_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let mut w = Writer::new("x");
    w.tensor("a", &[4], TensorType::F32).unwrap();
    let resume = Resume { key: "k".into(), every: 1 };
    let mut inner = None;
    w.write_resumable(&path, &resume, &mut |_| {}, &mut |_, out| {
        inner = w.write_resumable(&path, &resume, &mut |_| {}, &mut |_, _| Ok(())).err();
        out.write_all(&[0; 16]).unwrap();
        Ok(())
    })
    .unwrap();
    assert!(inner.unwrap().to_string().contains("another process"));
}

/// Offsets beyond 4 GB: a sparse file whose second tensor starts there.
#[test]
fn files_beyond_four_gigabytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.gguf");
    let mut w = Writer::new("x");
    w.tensor("hole", &[5 << 30], TensorType::I8).unwrap();
    w.tensor("end", &[4], TensorType::F32).unwrap();
    // The header as the writer makes it, then a hole instead of zeros.
    let mut header = Vec::new();
    let stopped = w.write(&mut header, &mut |_, _| Err(Error::Write("header only".into())));
    assert!(stopped.is_err());
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&header).unwrap();
    use std::io::{Seek, SeekFrom};
    file.seek(SeekFrom::Start(header.len() as u64 + (5 << 30))).unwrap();
    file.write_all(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]).unwrap();
    file.set_len(header.len() as u64 + (5 << 30) + 32).unwrap();
    let read = Gguf::open(&path).unwrap();
    assert_eq!(read.tensor("end").unwrap().bytes()[..4], [1, 2, 3, 4]);
    assert!(read.tensor("end").unwrap().info().offset > u64::from(u32::MAX));
}

#[test]
fn parts_without_a_file() {
    let data = std::sync::Arc::new(vec![1u8; 68]);
    let part = |name: &str, dims: &[u64]| Part {
        name: name.into(),
        dims: dims.into(),
        ty: TensorType::Q8_0,
        data: data.clone(),
    };
    let parts = |parts| Gguf::from_parts("random numbers", Metadata::default(), parts);
    let file = parts(vec![part("a", &[32, 2]), part("b", &[64])]).unwrap();
    assert_eq!((file.source(), file.file_len(), file.tensors().len()), ("random numbers", 136, 2));
    let bytes = |name| file.tensor(name).unwrap().bytes().as_ptr();
    assert_eq!(bytes("a"), bytes("b"), "shared");
    let error = |p| parts(p).err().unwrap().to_string();
    assert!(error(vec![part("a", &[32])]).contains("tensor a [32] Q8_0: 68 bytes came, 34 were declared"));
    assert!(error(vec![part("a", &[64]), part("a", &[64])]).contains("declared twice"));
}
