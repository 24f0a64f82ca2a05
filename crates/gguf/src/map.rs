//! The bytes of a file: mapped, embedded or owned.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

pub(crate) enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(crate) fn map(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only and private to this value. Model files are not changed while in use; if
        // another process truncates one, the system ends this process with a signal, which no in-process
        // check could prevent.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        // Weights are read from end to end for every token: with pages of 2 MB, which file systems give that can, the addresses of
        // all of a layer fit the CPU's tables. A system that cannot says so, and nothing else changes.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Bytes::Mapped(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(m) => m,
            Bytes::Static(s) => s,
            Bytes::Owned(v) => v,
        }
    }
}

/// A read-only map of a whole file.
pub struct MappedFile(Bytes);

impl MappedFile {
    /// Maps a file.
    pub fn open(path: &Path) -> Result<Self, crate::Error> {
        Bytes::map(path).map(MappedFile).map_err(|source| crate::Error::Io { path: path.into(), source })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
