//! Writing that goes on where it was interrupted, for files that take hours to make.

use crate::write::{Counted, Data};
use crate::{Error, Writer};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// When what an interrupted run left is of use.
#[derive(Clone, Debug)]
pub struct Resume {
    /// Stands for everything the data are made from, on one line: what another key left is not used.
    pub key: String,
    /// Bytes between two points from which writing can go on.
    pub every: u64,
}

/// What a note begins with.
const NOTE: &str = "ds4 partial file 1";

impl Writer {
    /// Writes the file so that an interrupted run goes on where it stopped: data go to `PATH.partial`, which is renamed when
    /// it is complete, and `PATH.partial.note` says how many of its tensors are safely there. They are kept only if the
    /// header is the same and the key.
    ///
    /// `begin` is told how many tensors need not be made again, before `data` is asked for the first.
    pub fn write_resumable(
        &self,
        path: &Path,
        resume: &Resume,
        begin: &mut dyn FnMut(usize),
        data: &mut Data<'_>,
    ) -> Result<(), Error> {
        let partial = Partial::open(path)?;
        let written = self.go_on(&partial, resume, begin, data).map_err(|e| match e {
            Error::Io { source, .. } => partial.error(source),
            other => other,
        });
        match written {
            Ok(()) => partial.finish(path),
            Err(e) => {
                // Nothing worth keeping.
                if !partial.note.exists() {
                    let _left_behind = std::fs::remove_file(&partial.path);
                }
                Err(e)
            }
        }
    }

    fn go_on(
        &self,
        partial: &Partial,
        resume: &Resume,
        begin: &mut dyn FnMut(usize),
        data: &mut Data<'_>,
    ) -> Result<(), Error> {
        let (header, alignment) = self.head()?;
        let end = |n: usize| header.len() as u64 + self.data_bytes(n, alignment);
        let tensors = self.declared().count();
        let done = partial.done(&resume.key, &header).filter(|&n| n <= tensors && partial.len() >= end(n));
        let io = |source| partial.error(source);
        let mut file = &partial.file;
        match done {
            Some(done) => {
                file.set_len(end(done)).map_err(io)?;
                file.seek(SeekFrom::End(0)).map_err(io)?;
            }
            None => {
                partial.forget()?;
                file.set_len(0).map_err(io)?;
                file.rewind().map_err(io)?;
                file.write_all(&header).map_err(io)?;
            }
        }
        let done = done.unwrap_or(0);
        begin(done);
        let mut out = Counted { inner: BufWriter::with_capacity(1 << 20, file), count: 0 };
        let mut noted = 0;
        for i in done..tensors {
            self.put(i, alignment, &mut out, data)?;
            if out.count - noted >= resume.every {
                noted = out.count;
                out.flush().map_err(io)?;
                partial.write_note(&resume.key, i + 1)?;
            }
        }
        out.flush().map_err(io)
    }
}

/// A file on its way.
struct Partial {
    path: PathBuf,
    note: PathBuf,
    file: File,
}

impl Partial {
    /// Opens or creates it, for this process alone.
    fn open(target: &Path) -> Result<Self, Error> {
        let with = |suffix: &str| {
            let mut name = target.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let (path, note) = (with(".partial"), with(".partial.note"));
        let io = |source| Error::Io { path: path.clone(), source };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(Partial { path, note, file }),
            Err(TryLockError::WouldBlock) => Err(Error::Write(format!(
                "{}: another process is writing it; wait for it or name another file",
                path.display()
            ))),
            Err(TryLockError::Error(source)) => Err(io(source)),
        }
    }

    fn error(&self, source: std::io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.len())
    }

    /// Tensors that are safely there and made from the same.
    fn done(&self, key: &str, header: &[u8]) -> Option<usize> {
        let note = std::fs::read_to_string(&self.note).ok()?;
        let done = note.strip_prefix(NOTE)?.strip_prefix('\n')?.strip_prefix(key)?.strip_prefix('\n')?;
        let mut there = vec![0; header.len()];
        let mut file = &self.file;
        file.rewind().and_then(|()| file.read_exact(&mut there)).ok()?;
        if there == header { done.trim_end().parse().ok() } else { None }
    }

    /// Notes that the first `done` tensors are there, once they are.
    fn write_note(&self, key: &str, done: usize) -> Result<(), Error> {
        self.file.sync_data().map_err(|e| self.error(e))?;
        let io = |source| Error::Io { path: self.note.clone(), source };
        let folder = self.note.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut temporary = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        temporary.write_all(format!("{NOTE}\n{key}\n{done}\n").as_bytes()).map_err(io)?;
        temporary.as_file().sync_all().map_err(io)?;
        temporary.persist(&self.note).map_err(|e| io(e.error))?;
        Ok(())
    }

    fn forget(&self) -> Result<(), Error> {
        match std::fs::remove_file(&self.note) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Io { path: self.note.clone(), source: e })
            }
            _ => Ok(()),
        }
    }

    fn finish(self, target: &Path) -> Result<(), Error> {
        self.file.sync_all().map_err(|e| self.error(e))?;
        std::fs::rename(&self.path, target).map_err(|e| self.error(e))?;
        self.forget()
    }
}
