//! The writer.

use crate::read::MAX_ALIGNMENT;
use crate::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, Error, MAGIC, Metadata, TensorType, VERSION, Value};
use std::io::{BufWriter, Write};
use std::path::Path;

struct Declared {
    name: String,
    dims: Vec<u64>,
    ty: TensorType,
    bytes: u64,
}

/// Writes the data of a declared tensor.
pub type Data<'a> = dyn FnMut(usize, &mut dyn Write) -> Result<(), Error> + 'a;

/// Writes a file: metadata and tensors are declared first, then the data follow in the order of declaration.
pub struct Writer {
    metadata: Metadata,
    tensors: Vec<Declared>,
}

impl Writer {
    /// A file of an architecture.
    pub fn new(arch: &str) -> Self {
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", Value::String(arch.into()));
        Writer { metadata, tensors: Vec::new() }
    }

    /// A file that holds no model.
    pub fn untyped() -> Self {
        Writer { metadata: Metadata::default(), tensors: Vec::new() }
    }

    /// Sets a metadata value.
    pub fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.set(key, value);
        self
    }

    /// Declares the next tensor; `dims` has the contiguous dimension first. Returns its bytes.
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: TensorType) -> Result<u64, Error> {
        let error = |problem: &str| Error::Write(format!("tensor {name} {dims:?} {ty}: {problem}"));
        if self.tensors.iter().any(|t| t.name == name) {
            return Err(error("declared twice"));
        }
        let bytes = data_bytes(dims, ty).map_err(error)?;
        self.tensors.push(Declared { name: name.into(), dims: dims.into(), ty, bytes });
        Ok(bytes)
    }

    /// Names of the declared tensors, in the order in which their data must come.
    pub fn declared(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// Writes the whole file to `out`; `data(i, sink)` writes the data of the `i`th declared tensor.
    pub fn write<W: Write>(&self, out: W, data: &mut Data<'_>) -> Result<(), Error> {
        let mut out = Counted { inner: out, count: 0 };
        let failed = |source| Error::Io { path: "output".into(), source };
        let (header, alignment) = self.head()?;
        out.write_all(&header).map_err(failed)?;
        for i in 0..self.tensors.len() {
            self.put(i, alignment, &mut out, data)?;
        }
        out.flush().map_err(failed)
    }

    /// Everything before the tensors' data, and their alignment.
    pub(crate) fn head(&self) -> Result<(Vec<u8>, u64), Error> {
        let alignment = match self.metadata.opt_u32(ALIGNMENT_KEY)? {
            Some(a) if a.is_power_of_two() && u64::from(a) <= MAX_ALIGNMENT => u64::from(a),
            Some(a) => {
                return Err(Error::Write(format!(
                    "alignment {a}, expected a power of two up to {MAX_ALIGNMENT}"
                )));
            }
            None => DEFAULT_ALIGNMENT,
        };
        if let Some((key, _)) = self.metadata.iter().find(|(_, v)| !well_nested(v)) {
            return Err(Error::Write(format!("metadata key {key}: an array of arrays holds a single value")));
        }
        let mut header = self.header(alignment);
        header.resize(header.len().next_multiple_of(alignment as usize), 0);
        Ok((header, alignment))
    }

    /// Writes the data of the `i`th tensor, and pads them.
    pub(crate) fn put<W: Write>(
        &self,
        i: usize,
        alignment: u64,
        out: &mut Counted<W>,
        data: &mut Data<'_>,
    ) -> Result<(), Error> {
        let (tensor, start) = (&self.tensors[i], out.count);
        data(i, out)?;
        let written = out.count - start;
        if written != tensor.bytes {
            return Err(Error::Write(format!(
                "tensor {}: {written} bytes came, {} were declared",
                tensor.name, tensor.bytes
            )));
        }
        out.pad(alignment).map_err(|source| Error::Io { path: "output".into(), source })
    }

    /// Bytes of the data of the first `n` tensors, padding included.
    pub(crate) fn data_bytes(&self, n: usize, alignment: u64) -> u64 {
        self.tensors[..n].iter().map(|t| t.bytes.next_multiple_of(alignment)).sum()
    }

    /// Writes the file under a temporary name in the same folder, syncs it and renames it.
    pub fn write_file(&self, path: &Path, data: &mut Data<'_>) -> Result<(), Error> {
        let io = |source| Error::Io { path: path.into(), source };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = builder().tempfile_in(folder).map_err(io)?;
        let written = self.write(BufWriter::with_capacity(1 << 20, temporary.as_file()), data);
        written.map_err(|e| match e {
            Error::Io { source, .. } => io(source),
            other => other,
        })?;
        temporary.as_file().sync_all().map_err(io)?;
        temporary.persist(path).map_err(|e| io(e.error))?;
        Ok(())
    }

    fn header(&self, alignment: u64) -> Vec<u8> {
        let mut h = Vec::new();
        h.extend(MAGIC.to_le_bytes());
        h.extend(VERSION.to_le_bytes());
        h.extend((self.tensors.len() as u64).to_le_bytes());
        h.extend((self.metadata.iter().count() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            put_str(&mut h, key);
            put_value(&mut h, value);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            put_str(&mut h, &t.name);
            h.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| h.extend(d.to_le_bytes()));
            h.extend(t.ty.id().to_le_bytes());
            h.extend(offset.to_le_bytes());
            offset = (offset + t.bytes).next_multiple_of(alignment);
        }
        h
    }
}

/// Bytes of a tensor, or what is wrong with its dimensions.
pub(crate) fn data_bytes(dims: &[u64], ty: TensorType) -> Result<u64, &'static str> {
    if dims.is_empty() || dims.len() > 4 {
        return Err("1 to 4 dimensions are possible");
    }
    if !dims[0].is_multiple_of(ty.block_len()) {
        return Err("rows are no multiple of the block");
    }
    let elements = dims.iter().try_fold(1u64, |product, &d| product.checked_mul(d).filter(|_| d > 0));
    let bytes = elements.and_then(|n| (n / ty.block_len()).checked_mul(ty.block_bytes()));
    bytes.ok_or("zero or too large")
}

/// Temporary files are private by default; a model file gets the permissions of any new file.
fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

pub(crate) struct Counted<W> {
    pub(crate) inner: W,
    pub(crate) count: u64,
}

impl<W: Write> Counted<W> {
    fn pad(&mut self, alignment: u64) -> std::io::Result<()> {
        let missing = self.count.next_multiple_of(alignment) - self.count;
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0), missing), self).map(|_| ())
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.count += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn put_str(h: &mut Vec<u8>, s: &str) {
    h.extend((s.len() as u64).to_le_bytes());
    h.extend(s.as_bytes());
}

/// Whether arrays of arrays hold nothing but arrays; a single value has no place in the format there.
fn well_nested(value: &Value) -> bool {
    let Value::Nested(inner) = value else { return true };
    inner.iter().all(|v| v.is_array() && well_nested(v))
}

/// Type number and bytes of a value.
fn put_value(h: &mut Vec<u8>, value: &Value) {
    macro_rules! scalar {
        ($id:literal, $v:expr) => {{
            h.extend(($id as u32).to_le_bytes());
            h.extend($v.to_le_bytes());
        }};
    }
    match value {
        Value::U8(v) => scalar!(0, v),
        Value::I8(v) => scalar!(1, v),
        Value::U16(v) => scalar!(2, v),
        Value::I16(v) => scalar!(3, v),
        Value::U32(v) => scalar!(4, v),
        Value::I32(v) => scalar!(5, v),
        Value::F32(v) => scalar!(6, v),
        Value::Bool(v) => scalar!(7, u8::from(*v)),
        Value::String(v) => {
            h.extend(8u32.to_le_bytes());
            put_str(h, v);
        }
        Value::U64(v) => scalar!(10, v),
        Value::I64(v) => scalar!(11, v),
        Value::F64(v) => scalar!(12, v),
        array => {
            h.extend(9u32.to_le_bytes());
            put_array(h, array);
        }
    }
}

/// Element type, count and elements of an array.
fn put_array(h: &mut Vec<u8>, value: &Value) {
    macro_rules! array {
        ($id:literal, $v:expr, $put:expr) => {{
            h.extend(($id as u32).to_le_bytes());
            h.extend(($v.len() as u64).to_le_bytes());
            let put: fn(&mut Vec<u8>, &_) = $put;
            $v.iter().for_each(|v| put(h, v));
        }};
    }
    match value {
        Value::ArrayU8(v) => array!(0, v, |h, v: &u8| h.extend(v.to_le_bytes())),
        Value::ArrayI8(v) => array!(1, v, |h, v: &i8| h.extend(v.to_le_bytes())),
        Value::ArrayU16(v) => array!(2, v, |h, v: &u16| h.extend(v.to_le_bytes())),
        Value::ArrayI16(v) => array!(3, v, |h, v: &i16| h.extend(v.to_le_bytes())),
        Value::ArrayU32(v) => array!(4, v, |h, v: &u32| h.extend(v.to_le_bytes())),
        Value::ArrayI32(v) => array!(5, v, |h, v: &i32| h.extend(v.to_le_bytes())),
        Value::ArrayF32(v) => array!(6, v, |h, v: &f32| h.extend(v.to_le_bytes())),
        Value::ArrayBool(v) => array!(7, v, |h, v: &bool| h.push(u8::from(*v))),
        Value::ArrayString(v) => array!(8, v, |h, v: &String| put_str(h, v)),
        Value::Nested(v) => array!(9, v, put_array),
        Value::ArrayU64(v) => array!(10, v, |h, v: &u64| h.extend(v.to_le_bytes())),
        Value::ArrayI64(v) => array!(11, v, |h, v: &i64| h.extend(v.to_le_bytes())),
        Value::ArrayF64(v) => array!(12, v, |h, v: &f64| h.extend(v.to_le_bytes())),
        // Single values do not get here: `well_nested`.
        _ => {}
    }
}
