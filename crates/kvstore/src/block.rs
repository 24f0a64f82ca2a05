//! One block as a file (`docs/kv-format.md`).

use crate::{Error, Fingerprint, Name};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: [u8; 8] = *b"DS4KV\r\n\x1a";
const VERSION: u32 = 1;
/// Bytes before the sections.
const HEADER: usize = 192;
/// Where the checksum of what is before it is.
const CHECKSUM: usize = 168;
/// Where the figures of use are: they change in place, and no checksum covers them.
const USE: u64 = 176;

/// State after some tokens, beyond that after fewer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Token ids from the start of the sequence to the block's end.
    pub tokens: Vec<u32>,
    /// Tokens of the prefix that the block builds on.
    pub start: usize,
    /// Compressed rows that the tokens from `start` on added, in the layout's order.
    pub rows: Vec<u8>,
    /// What a session needs besides the rows to go on from the end.
    pub frontier: Vec<u8>,
    /// Logits for the next token, f32, little endian; none if they were not computed.
    pub logits: Vec<u8>,
    /// What its owner wants to find again with it, as the sampled text of tool calls.
    pub notes: Vec<u8>,
}

impl Block {
    /// Ids of the block's own tokens, as bytes.
    pub(crate) fn own_tokens(&self) -> Vec<u8> {
        self.tokens[self.start..].iter().flat_map(|t| t.to_le_bytes()).collect()
    }

    /// The sections, given the first.
    pub(crate) fn sections<'a>(&'a self, own_tokens: &'a [u8]) -> [&'a [u8]; SECTIONS] {
        [own_tokens, &self.rows, &self.frontier, &self.logits, &self.notes]
    }

    /// What the header says. `parent` is the name of the first `start` tokens.
    pub(crate) fn meta(
        &self,
        fingerprint: Fingerprint,
        name: Name,
        parent: Name,
        sections: [&[u8]; SECTIONS],
    ) -> Meta {
        Meta {
            fingerprint,
            name,
            parent,
            start: self.start,
            end: self.tokens.len(),
            lengths: sections.map(|s| s.len() as u64),
            checksums: sections.map(xxh3_64),
            hits: 0,
            used: now(),
        }
    }
}

/// What a block's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Which model.
    pub fingerprint: Fingerprint,
    /// Which tokens.
    pub name: Name,
    /// The block it builds on: the name of its first `start` tokens.
    pub parent: Name,
    /// Tokens of the prefix it builds on.
    pub start: usize,
    /// Tokens at its end.
    pub end: usize,
    /// How often it was read.
    pub hits: u32,
    /// When it was last read or written, in seconds since 1970.
    pub used: u64,
    lengths: [u64; SECTIONS],
    checksums: [u64; SECTIONS],
}

/// A piece of a block, with a checksum of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Ids of its own tokens.
    Tokens,
    /// Compressed rows.
    Rows,
    /// What is needed to go on from the end.
    Frontier,
    /// Logits for the next token.
    Logits,
    /// What its owner keeps with it.
    Notes,
}

const SECTIONS: usize = Section::ALL.len();

impl Section {
    /// All, in the order of the file.
    pub const ALL: [Section; 5] =
        [Section::Tokens, Section::Rows, Section::Frontier, Section::Logits, Section::Notes];
}

pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Reads little-endian fields one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some((head, rest)) = self.0.split_at_checked(N) {
            bytes.copy_from_slice(head);
            self.0 = rest;
        }
        bytes
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

impl Meta {
    /// Bytes of a section.
    pub fn len_of(&self, section: Section) -> u64 {
        self.lengths[section as usize]
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.lengths.iter().fold(HEADER as u64, |sum, &len| sum.saturating_add(len))
    }

    /// The tokens that are the block's own.
    pub fn span(&self) -> Range<usize> {
        self.start..self.end
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend_from_slice(&MAGIC);
        // Version; then how sections are encoded: 0 is as they are.
        [VERSION, 0].iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
        for id in [self.fingerprint.0, self.name.0, self.parent.0] {
            bytes.extend_from_slice(&id);
        }
        // Lengths of contexts are far below 2^32.
        for value in [self.start as u32, self.end as u32, 0] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        for value in self.lengths.iter().chain(&self.checksums) {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
        bytes.extend_from_slice(&self.uses());
        bytes
    }

    fn uses(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.hits.to_le_bytes());
        bytes[8..].copy_from_slice(&self.used.to_le_bytes());
        bytes
    }

    fn from_bytes(header: &[u8; HEADER]) -> Result<Self, Error> {
        let mut fields = Fields(header);
        if fields.take() != MAGIC {
            return Err(Error::Corrupt("no magic number: it is no block"));
        }
        let (version, encoding) = (fields.u32(), fields.u32());
        if version != VERSION || encoding != 0 {
            return Err(Error::Version { version, encoding });
        }
        let (fingerprint, name, parent) =
            (Fingerprint(fields.take()), Name(fields.take()), Name(fields.take()));
        let (start, end, _) = (fields.u32() as usize, fields.u32() as usize, fields.u32());
        let lengths: [u64; SECTIONS] = std::array::from_fn(|_| fields.u64());
        let checksums = std::array::from_fn(|_| fields.u64());
        if xxh3_64(&header[..CHECKSUM]) != fields.u64() {
            return Err(Error::Corrupt("the header's checksum is wrong"));
        }
        let (hits, _, used) = (fields.u32(), fields.u32(), fields.u64());
        if start >= end || lengths[0] != 4 * (end - start) as u64 {
            return Err(Error::Corrupt("its lengths contradict each other"));
        }
        Ok(Meta { fingerprint, name, parent, start, end, hits, used, lengths, checksums })
    }

    /// Reads a file's header.
    pub(crate) fn read(file: &mut File) -> Result<Self, Error> {
        let mut header = [0; HEADER];
        file.seek(SeekFrom::Start(0))?;
        file.read_exact(&mut header).map_err(short)?;
        let meta = Meta::from_bytes(&header)?;
        if file.metadata()?.len() != meta.bytes() {
            return Err(Error::Corrupt("it is shorter or longer than its header says"));
        }
        Ok(meta)
    }

    /// Reads a section and checks it.
    pub(crate) fn read_section(&self, file: &mut File, section: Section) -> Result<Vec<u8>, Error> {
        let i = section as usize;
        // Its length is that of a part of a file that is there, so there is no allocating without bound.
        let at = self.lengths[..i].iter().sum::<u64>() + HEADER as u64;
        let mut bytes =
            vec![0; usize::try_from(self.lengths[i]).map_err(|_| Error::Corrupt("it is too large"))?];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut bytes).map_err(short)?;
        if xxh3_64(&bytes) != self.checksums[i] {
            return Err(Error::Corrupt("a checksum is wrong"));
        }
        Ok(bytes)
    }

    /// Writes a whole file.
    pub(crate) fn write(&self, file: &mut File, sections: [&[u8]; SECTIONS]) -> Result<(), Error> {
        file.write_all(&self.to_bytes())?;
        sections.iter().try_for_each(|section| file.write_all(section))?;
        Ok(file.sync_all()?)
    }

    /// Writes when and how often the block was used into its file.
    pub(crate) fn write_use(&self, file: &mut File) -> Result<(), Error> {
        file.seek(SeekFrom::Start(USE))?;
        Ok(file.write_all(&self.uses())?)
    }
}

fn short(e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Corrupt("it is shorter than its header says"),
        _ => Error::Io(e),
    }
}
