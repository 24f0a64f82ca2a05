//! The reader.

use crate::map::Bytes;
use crate::write::data_bytes;
use crate::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, Error, MAGIC, Metadata, TensorType, VERSION, Value};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Arrays of arrays deeper than this are refused.
const MAX_DEPTH: usize = 4;
/// No alignment a sane writer uses is larger.
pub(crate) const MAX_ALIGNMENT: u64 = 1 << 20;
/// Metadata and tensor directory end before this byte; those of the largest models take a few MB. A hole in a
/// sparse file reads as any number of empty entries at no cost on disk, so that the length of the file alone
/// bounds nothing.
const MAX_HEADER: usize = 256 << 20;

/// An entry of the tensor directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Dimensions, the contiguous one first.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
    /// First byte, from the start of the file; 0 where the tensor came with its own data.
    pub offset: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// A tensor of a model that is no file; several may share their data.
#[derive(Clone)]
pub struct Part {
    /// Name.
    pub name: String,
    /// Dimensions, the contiguous one first.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: TensorType,
    /// Data.
    pub data: Arc<Vec<u8>>,
}

/// Where tensor data are.
enum Data {
    /// In the file.
    File(Bytes),
    /// In a block for each tensor; several may share one.
    Blocks(Vec<Arc<Vec<u8>>>),
}

struct Inner {
    source: String,
    data: Data,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    alignment: u64,
}

/// An open file. Cloning is cheap; the mapping lives as long as any clone or [`Tensor`].
#[derive(Clone)]
pub struct Gguf(Arc<Inner>);

/// A tensor of an open file.
#[derive(Clone)]
pub struct Tensor {
    file: Gguf,
    index: usize,
}

impl Gguf {
    /// Maps and reads a file. Tensor data are not touched.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = Bytes::map(path).map_err(|source| Error::Io { path: path.into(), source })?;
        Self::parse(path.display().to_string(), bytes)
    }

    /// Reads a file embedded in the binary.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self, Error> {
        Self::parse("embedded file".into(), Bytes::Static(bytes))
    }

    /// Reads a file in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::parse("file in memory".into(), Bytes::Owned(bytes))
    }

    fn parse(source: String, bytes: Bytes) -> Result<Self, Error> {
        let window = &bytes[..bytes.len().min(MAX_HEADER)];
        let mut cursor = Cursor { file: &source, bytes: window, at: 0 };
        let (metadata, tensors, alignment) = header(&mut cursor, bytes.len() as u64)?;
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            if index.insert(t.name.clone(), i).is_some() {
                return Err(cursor.error(&format!("tensor {}", t.name), "the name occurs twice"));
            }
        }
        check_overlap(&cursor, &tensors)?;
        let data = Data::File(bytes);
        Ok(Gguf(Arc::new(Inner { source, data, metadata, tensors, index, alignment })))
    }

    /// A model that is no file. `source` is its label in messages.
    pub fn from_parts(source: &str, metadata: Metadata, parts: Vec<Part>) -> Result<Self, Error> {
        let (mut tensors, mut index, mut blocks) = (Vec::new(), HashMap::new(), Vec::new());
        for Part { name, dims, ty, data: block } in parts {
            let error = |problem: &str| Error::Write(format!("tensor {name} {dims:?} {ty}: {problem}"));
            let bytes = data_bytes(&dims, ty).map_err(error)?;
            if bytes != block.len() as u64 {
                return Err(error(&format!("{} bytes came, {bytes} were declared", block.len())));
            }
            if index.insert(name.clone(), tensors.len()).is_some() {
                return Err(error("declared twice"));
            }
            tensors.push(TensorInfo { name, dims, ty, offset: 0, bytes });
            blocks.push(block);
        }
        let (source, data) = (source.to_owned(), Data::Blocks(blocks));
        Ok(Gguf(Arc::new(Inner { source, data, metadata, tensors, index, alignment: DEFAULT_ALIGNMENT })))
    }

    /// Metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.0.metadata
    }

    /// Tensor directory, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.0.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        self.0.index.get(name).map(|&index| Tensor { file: self.clone(), index })
    }

    /// Bytes of the file; of all tensor data where there is no file.
    pub fn file_len(&self) -> u64 {
        match &self.0.data {
            Data::File(bytes) => bytes.len() as u64,
            Data::Blocks(_) => self.tensors().iter().map(|t| t.bytes).sum(),
        }
    }

    /// Alignment of tensor data.
    pub fn alignment(&self) -> u64 {
        self.0.alignment
    }

    /// Path or label, for messages.
    pub fn source(&self) -> &str {
        &self.0.source
    }
}

impl Tensor {
    /// Its directory entry.
    pub fn info(&self) -> &TensorInfo {
        &self.file.0.tensors[self.index]
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.info().name
    }

    /// Element type.
    pub fn ty(&self) -> TensorType {
        self.info().ty
    }

    /// Dimensions, the contiguous one first.
    pub fn dims(&self) -> &[u64] {
        &self.info().dims
    }

    /// Its data.
    pub fn bytes(&self) -> &[u8] {
        let info = self.info();
        match &self.file.0.data {
            // In range: checked when the directory was read.
            Data::File(bytes) => &bytes[info.offset as usize..(info.offset + info.bytes) as usize],
            Data::Blocks(blocks) => &blocks[self.index],
        }
    }
}

struct Cursor<'a> {
    file: &'a str,
    /// The part of the file in which the header must end.
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, field: &str, problem: impl Into<String>) -> Error {
        Error::Format {
            file: self.file.into(),
            field: field.into(),
            offset: self.at as u64,
            problem: problem.into(),
        }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, field: &str) -> Result<&'a [u8], Error> {
        if n > self.left() {
            return Err(self.error(
                field,
                format!("{n} bytes wanted, {} left: the file is truncated or damaged", self.left()),
            ));
        }
        let bytes = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, field)?);
        Ok(out)
    }

    fn u32(&mut self, field: &str) -> Result<u32, Error> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64, Error> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A count of items of at least `least` bytes each: no more than fit the rest of the file.
    fn count(&mut self, field: &str, least: usize) -> Result<usize, Error> {
        let start = self.at;
        let count = self.u64(field)?;
        match usize::try_from(count).ok().filter(|c| *c <= self.left() / least) {
            Some(count) => Ok(count),
            None => {
                let left = self.left();
                self.at = start;
                Err(self.error(field, format!("a count of {count} does not fit the {left} bytes left")))
            }
        }
    }

    fn string(&mut self, field: &str) -> Result<String, Error> {
        let len = self.count(field, 1)?;
        let start = self.at;
        let bytes = self.take(len, field)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(e) => {
                self.at = start + e.valid_up_to();
                Err(self.error(field, "not UTF-8"))
            }
        }
    }
}

type Header = (Metadata, Vec<TensorInfo>, u64);

fn header(c: &mut Cursor<'_>, file_len: u64) -> Result<Header, Error> {
    if c.u32("magic")? != MAGIC {
        c.at = 0;
        return Err(c.error("magic", "not a GGUF file"));
    }
    let version = c.u32("version")?;
    if version != VERSION {
        return Err(c.error("version", format!("{version}, only {VERSION} is supported")));
    }
    // A directory entry takes at least 32 bytes, a key/value pair at least 13.
    let tensors = c.count("tensor count", 24)?;
    let keys = c.count("key count", 13)?;
    let mut metadata = Metadata::default();
    for _ in 0..keys {
        let key = c.string("key")?;
        let ty = c.u32(&format!("type of {key}"))?;
        let value = value(c, &key, ty, 0)?;
        if metadata.get(&key).is_some() {
            return Err(c.error(&key, "the key occurs twice"));
        }
        metadata.set(&key, value);
    }
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        Some(_) => u64::from(metadata.u32(ALIGNMENT_KEY)?),
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(
            c.error(ALIGNMENT_KEY, format!("{alignment}, expected a power of two up to {MAX_ALIGNMENT}"))
        );
    }
    let mut directory = Vec::new();
    for _ in 0..tensors {
        directory.push(directory_entry(c, alignment)?);
    }
    let data = (c.at as u64).next_multiple_of(alignment);
    for t in &mut directory {
        place(c, t, data, file_len)?;
    }
    Ok((metadata, directory, alignment))
}

fn value(c: &mut Cursor<'_>, key: &str, ty: u32, depth: usize) -> Result<Value, Error> {
    Ok(match ty {
        0 => Value::U8(c.array::<1>(key)?[0]),
        1 => Value::I8(c.array(key).map(i8::from_le_bytes)?),
        2 => Value::U16(c.array(key).map(u16::from_le_bytes)?),
        3 => Value::I16(c.array(key).map(i16::from_le_bytes)?),
        4 => Value::U32(c.u32(key)?),
        5 => Value::I32(c.array(key).map(i32::from_le_bytes)?),
        6 => Value::F32(c.array(key).map(f32::from_le_bytes)?),
        7 => Value::Bool(boolean(c, key)?),
        8 => Value::String(c.string(key)?),
        9 => array(c, key, depth)?,
        10 => Value::U64(c.u64(key)?),
        11 => Value::I64(c.array(key).map(i64::from_le_bytes)?),
        12 => Value::F64(c.array(key).map(f64::from_le_bytes)?),
        other => return Err(c.error(key, format!("unknown value type {other}"))),
    })
}

fn boolean(c: &mut Cursor<'_>, key: &str) -> Result<bool, Error> {
    match c.array::<1>(key)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(c.error(key, format!("{other} is no bool, expected 0 or 1"))),
    }
}

fn array(c: &mut Cursor<'_>, key: &str, depth: usize) -> Result<Value, Error> {
    fn numbers<const N: usize, T>(
        c: &mut Cursor<'_>,
        key: &str,
        f: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, Error> {
        let n = c.count(key, N)?;
        let bytes = c.take(n * N, key)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect())
    }
    let ty = c.u32(key)?;
    Ok(match ty {
        0 => Value::ArrayU8(numbers(c, key, u8::from_le_bytes)?),
        1 => Value::ArrayI8(numbers(c, key, i8::from_le_bytes)?),
        2 => Value::ArrayU16(numbers(c, key, u16::from_le_bytes)?),
        3 => Value::ArrayI16(numbers(c, key, i16::from_le_bytes)?),
        4 => Value::ArrayU32(numbers(c, key, u32::from_le_bytes)?),
        5 => Value::ArrayI32(numbers(c, key, i32::from_le_bytes)?),
        6 => Value::ArrayF32(numbers(c, key, f32::from_le_bytes)?),
        7 => {
            let n = c.count(key, 1)?;
            Value::ArrayBool((0..n).map(|_| boolean(c, key)).collect::<Result<_, _>>()?)
        }
        8 => {
            let n = c.count(key, 8)?;
            Value::ArrayString((0..n).map(|_| c.string(key)).collect::<Result<_, _>>()?)
        }
        9 if depth < MAX_DEPTH => {
            let n = c.count(key, 12)?;
            Value::Nested((0..n).map(|_| array(c, key, depth + 1)).collect::<Result<_, _>>()?)
        }
        9 => return Err(c.error(key, format!("arrays nested deeper than {MAX_DEPTH}"))),
        10 => Value::ArrayU64(numbers(c, key, u64::from_le_bytes)?),
        11 => Value::ArrayI64(numbers(c, key, i64::from_le_bytes)?),
        12 => Value::ArrayF64(numbers(c, key, f64::from_le_bytes)?),
        other => return Err(c.error(key, format!("unknown element type {other}"))),
    })
}

/// One entry, its offset still relative to the data.
fn directory_entry(c: &mut Cursor<'_>, alignment: u64) -> Result<TensorInfo, Error> {
    let name = c.string("tensor name")?;
    let field = |what: &str| format!("tensor {name} {what}");
    let n = c.u32(&field("dimension count"))?;
    if !(1..=4).contains(&n) {
        return Err(c.error(&field("dimension count"), format!("{n}, expected 1 to 4")));
    }
    let dims = (0..n).map(|_| c.u64(&field("dimension"))).collect::<Result<Vec<_>, _>>()?;
    let id = c.u32(&field("type"))?;
    let Some(ty) = TensorType::from_id(id) else {
        return Err(c.error(&field("type"), format!("unknown type {id}")));
    };
    let offset = c.u64(&field("offset"))?;
    if !offset.is_multiple_of(alignment) {
        return Err(
            c.error(&field("offset"), format!("{offset} is no multiple of the alignment {alignment}"))
        );
    }
    let elements = dims.iter().try_fold(1u64, |product, &d| product.checked_mul(d).filter(|_| d > 0));
    let Some(elements) = elements else {
        return Err(c.error(&field("dimensions"), format!("{dims:?}: zero, or too large to multiply")));
    };
    if !dims[0].is_multiple_of(ty.block_len()) {
        return Err(c.error(
            &field("dimensions"),
            format!("rows of {} are no multiple of the {} of a {ty} block", dims[0], ty.block_len()),
        ));
    }
    let Some(bytes) = (elements / ty.block_len()).checked_mul(ty.block_bytes()) else {
        return Err(c.error(&field("dimensions"), format!("{dims:?}: too large")));
    };
    Ok(TensorInfo { name, dims, ty, offset, bytes })
}

/// Makes the offset absolute, checking that the data are in the file.
fn place(c: &Cursor<'_>, t: &mut TensorInfo, data: u64, file_len: u64) -> Result<(), Error> {
    let end = data.checked_add(t.offset).and_then(|at| at.checked_add(t.bytes));
    match end.filter(|end| *end <= file_len) {
        Some(_) => {
            t.offset += data;
            Ok(())
        }
        None => Err(c.error(
            &format!("tensor {} data", t.name),
            format!(
                "{} bytes from {} of the data do not fit the file of {file_len}: it is truncated",
                t.bytes, t.offset
            ),
        )),
    }
}

fn check_overlap(c: &Cursor<'_>, tensors: &[TensorInfo]) -> Result<(), Error> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| t.offset);
    match order.windows(2).find(|w| w[0].offset + w[0].bytes > w[1].offset) {
        Some(w) => {
            Err(c.error(&format!("tensor {} data", w[1].name), format!("overlap those of {}", w[0].name)))
        }
        None => Ok(()),
    }
}
