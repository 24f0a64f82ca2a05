//! A directory of blocks.

use crate::block::now;
use crate::evict::victims;
use crate::{Block, Error, Fingerprint, Meta, Name, Names, Problem, Section};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

/// How a store is kept.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of all blocks at the most.
    pub budget: u64,
}

/// Blocks that wait to be written: a computing thread that is faster than the disk waits for it.
const WAITING: usize = 4;
const SUFFIX: &str = "kv";
const TEMPORARY: &str = "tmp";

/// A directory of blocks, which several processes may use at once. Blocks are written by a thread of the store's own;
/// dropping the store waits for it.
pub struct Store {
    shared: Arc<Shared>,
    queue: Option<SyncSender<Job>>,
    writer: Option<JoinHandle<()>>,
}

enum Job {
    Write(Fingerprint, Box<Block>),
    /// Tells when all before it is done.
    Flush(SyncSender<()>),
}

struct Shared {
    directory: PathBuf,
    options: Options,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    blocks: HashMap<Name, Meta>,
    /// Names that are waiting to be written.
    coming: HashSet<Name>,
    /// Blocks that were there: where they ended, and why they are gone.
    gone: HashMap<Name, (usize, Missing)>,
    /// Files that are no good and could not be moved aside.
    ignored: HashSet<Name>,
    /// When the directory was last changed as far as we have looked.
    seen: Option<SystemTime>,
    problems: Vec<Problem>,
    /// Why nothing is written any more.
    disabled: bool,
}

/// What is there of a prefix.
#[derive(Clone, Debug)]
pub struct Found {
    /// Blocks that together hold the state of its longest part, from the start on.
    pub chain: Vec<Meta>,
    /// Why there is not more.
    pub missing: Missing,
}

/// Why state is not on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Missing {
    /// It never was, as far as we know.
    #[default]
    New,
    /// It was, and had to make room.
    Evicted,
    /// It was, and was no good.
    Broken,
    /// All that is there is of other models, or of this one computed otherwise.
    OtherModel,
}

/// Blocks that are remembered after they are gone.
const MOST_GONE: usize = 10_000;

impl Store {
    /// Opens a directory, which is made if it is not there. Files that are no good are moved aside, and what a process that
    /// died left half written is removed.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(directory: &Path, options: Options) -> Result<Self, Problem> {
        let failed = |error: std::io::Error| Problem {
            path: directory.to_owned(),
            error: error.into(),
            outcome: "nothing is kept on disk",
        };
        make_directory(directory).map_err(failed)?;
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            options,
            index: Mutex::new(Index::default()),
        });
        shared.refresh(&mut shared.index()).map_err(failed)?;
        shared.remove_litter();
        shared.remove_orphans();
        let (queue, jobs) = sync_channel(WAITING);
        let writer = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("kv-writer".into())
                .spawn(move || shared.write_all(&jobs))
                .map_err(failed)?
        };
        Ok(Store { shared, queue: Some(queue), writer: Some(writer) })
    }

    /// Whether the block of a name is there, or will be in a moment.
    pub fn has(&self, name: Name) -> bool {
        let index = self.shared.index();
        index.coming.contains(&name) || index.blocks.contains_key(&name)
    }

    /// Whether blocks are still written.
    pub fn is_enabled(&self) -> bool {
        !self.shared.index().disabled
    }

    /// Hands a block over to be written, unless it is there. Waits while several others wait.
    pub fn put(&self, fingerprint: Fingerprint, block: Block) {
        if block.start >= block.tokens.len() {
            return;
        }
        let name = Names::new(&fingerprint).of(&block.tokens, block.tokens.len());
        {
            let mut index = self.shared.index();
            if index.disabled || index.blocks.contains_key(&name) || !index.coming.insert(name) {
                return;
            }
        }
        if let Some(queue) = &self.queue {
            // The writer ends only when the queue does.
            let _ = queue.send(Job::Write(fingerprint, Box::new(block)));
        }
    }

    /// Waits until all that was handed over is on disk.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if let Some(queue) = &self.queue
            && queue.send(Job::Flush(done)).is_ok()
        {
            let _ = wait.recv();
        }
    }

    /// The blocks that hold the longest prefix of `tokens` of which all blocks are there.
    pub fn find(&self, fingerprint: Fingerprint, tokens: &[u32]) -> Found {
        let mut index = self.shared.index();
        if let Err(e) = self.shared.refresh(&mut index) {
            let path = self.shared.directory.clone();
            index.problem(path, e.into(), "what it holds may not be found");
        }
        let there = index.blocks.values().filter(|m| m.fingerprint == fingerprint).map(|m| m.end);
        let gone = index.gone.values().map(|(end, _)| *end);
        let ends: BTreeSet<usize> = there.chain(gone).filter(|&end| end <= tokens.len()).collect();
        let mut names = Names::new(&fingerprint);
        let mut found: HashMap<usize, &Meta> = HashMap::new();
        let (mut longest, mut missing) = (None, Missing::New);
        for end in ends {
            let name = names.of(tokens, end);
            let Some(meta) = index.blocks.get(&name) else {
                if let Some((_, why)) = index.gone.get(&name) {
                    missing = *why;
                }
                continue;
            };
            // Ends ascend, so what it builds on has been looked for.
            if meta.start == 0 || found.get(&meta.start).is_some_and(|parent| parent.name == meta.parent) {
                found.insert(end, meta);
                (longest, missing) = (Some(end), Missing::New);
            }
        }
        let is_ours = |m: &Meta| m.fingerprint == fingerprint;
        if missing == Missing::New && !index.blocks.is_empty() && !index.blocks.values().any(is_ours) {
            missing = Missing::OtherModel;
        }
        let mut chain = Vec::new();
        while let Some(meta) = longest.and_then(|end| found.get(&end)) {
            chain.push((*meta).clone());
            longest = Some(meta.start);
        }
        chain.reverse();
        Found { chain, missing }
    }

    /// Reads a section. A block that is no good is moved aside, together with those that build on it.
    ///
    /// # Errors
    /// The file is not there any more or not what it was; the problem is also among [`Store::take_problems`].
    pub fn read(&self, meta: &Meta, section: Section) -> Result<Vec<u8>, String> {
        let path = self.shared.path(meta.name);
        let read = || {
            let mut file = File::open(&path)?;
            if Meta::read(&mut file)?.name != meta.name {
                return Err(Error::Corrupt("it is another block than its name says"));
            }
            meta.read_section(&mut file, section)
        };
        read().map_err(|error| {
            let text = error.to_string();
            self.shared.index().lose(&self.shared, meta.name, error);
            text
        })
    }

    /// Counts a use of blocks.
    pub fn used(&self, chain: &[Meta]) {
        let mut index = self.shared.index();
        for name in chain.iter().map(|m| m.name) {
            let Some(meta) = index.blocks.get_mut(&name) else { continue };
            meta.hits = meta.hits.saturating_add(1);
            meta.used = now();
            // Only a figure: that it cannot be written does not matter.
            let file = OpenOptions::new().write(true).open(self.shared.path(name));
            let _ = file.map_err(Error::from).and_then(|mut file| meta.write_use(&mut file));
        }
    }

    /// All blocks.
    pub fn list(&self) -> Vec<Meta> {
        let mut index = self.shared.index();
        let _ = self.shared.refresh(&mut index);
        let mut all: Vec<Meta> = index.blocks.values().cloned().collect();
        all.sort_by_key(|m| (m.fingerprint.0, m.end, m.name));
        all
    }

    /// Checks every byte of every block; those that are no good are moved aside. Returns how many are good.
    pub fn verify(&self) -> usize {
        let all = self.list();
        all.iter().filter(|meta| Section::ALL.iter().all(|&section| self.read(meta, section).is_ok())).count()
    }

    /// Removes blocks until all together have at most `budget` bytes; returns how many.
    pub fn prune(&self, budget: u64) -> usize {
        let _lock = self.shared.lock();
        let mut index = self.shared.index();
        let _ = self.shared.refresh(&mut index);
        index.make_room(&self.shared, 0, budget, &[]).unwrap_or(0)
    }

    /// Removes a block and those that build on it; returns how many.
    pub fn remove(&self, name: Name) -> usize {
        let _lock = self.shared.lock();
        let mut index = self.shared.index();
        let doomed = index.with_descendants(name);
        doomed.iter().for_each(|name| index.remove(&self.shared, *name));
        doomed.len()
    }

    /// What has gone wrong since the last call.
    pub fn take_problems(&self) -> Vec<Problem> {
        std::mem::take(&mut self.shared.index().problems)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        // What a thread that panicked left is whole: every change is one call.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: Name) -> PathBuf {
        self.directory.join(format!("{name}.{SUFFIX}"))
    }

    /// Held while blocks are removed or put in place, so that none is put on one that another process removes.
    fn lock(&self) -> Option<File> {
        let file = File::create(self.directory.join("lock")).ok()?;
        file.lock().ok()?;
        Some(file)
    }

    /// Looks for blocks that other processes have written or removed.
    fn refresh(&self, index: &mut Index) -> std::io::Result<()> {
        let changed = fs::metadata(&self.directory)?.modified()?;
        if index.seen == Some(changed) {
            return Ok(());
        }
        let mut there = HashSet::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let Some(name) = name_of(&path) else { continue };
            there.insert(name);
            if index.blocks.contains_key(&name) || index.ignored.contains(&name) {
                continue;
            }
            let read = File::open(&path).map_err(Error::from).and_then(|mut file| Meta::read(&mut file));
            match read {
                Ok(meta) if meta.name == name => drop(index.blocks.insert(name, meta)),
                Ok(_) => {
                    index.set_aside(self, &path, Error::Corrupt("it is another block than its name says"));
                }
                // Removed between the listing and the reading.
                Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => index.set_aside(self, &path, error),
            }
        }
        let vanished: Vec<Name> = index.blocks.keys().filter(|name| !there.contains(name)).copied().collect();
        vanished.iter().for_each(|name| index.forget(*name, Missing::Evicted));
        index.seen = Some(changed);
        Ok(())
    }

    /// Removes files that a process was writing when it died: nobody holds their lock.
    fn remove_litter(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for path in entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == TEMPORARY)) {
            let is_left =
                OpenOptions::new().write(true).open(&path).is_ok_and(|file| file.try_lock().is_ok());
            if is_left {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Removes blocks whose parents are not there: nothing can be made of them.
    fn remove_orphans(&self) {
        let Some(_lock) = self.lock() else { return };
        let mut index = self.index();
        loop {
            let is_orphan = |m: &&Meta| m.start > 0 && !index.blocks.contains_key(&m.parent);
            let orphans: Vec<Name> = index.blocks.values().filter(is_orphan).map(|m| m.name).collect();
            if orphans.is_empty() {
                return;
            }
            orphans.iter().for_each(|name| index.remove(self, *name));
        }
    }

    fn write_all(&self, jobs: &Receiver<Job>) {
        for job in jobs {
            let (fingerprint, block) = match job {
                Job::Write(fingerprint, block) => (fingerprint, block),
                Job::Flush(done) => {
                    let _ = done.send(());
                    continue;
                }
            };
            let mut names = Names::new(&fingerprint);
            let parent = names.of(&block.tokens, block.start);
            let name = names.of(&block.tokens, block.tokens.len());
            if !self.index().disabled
                && let Err(error) = self.write(fingerprint, name, parent, &block)
            {
                let mut index = self.index();
                index.disabled = true;
                index.problem(self.directory.clone(), error, "no more state is kept on disk");
            }
            self.index().coming.remove(&name);
        }
    }

    /// Writes a block to a temporary file and puts it in place, if what it builds on is there and room can be made.
    fn write(&self, fingerprint: Fingerprint, name: Name, parent: Name, block: &Block) -> Result<(), Error> {
        let own = block.own_tokens();
        let sections = block.sections(&own);
        let meta = block.meta(fingerprint, name, parent, sections);
        if meta.bytes() > self.options.budget {
            return Ok(());
        }
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let temporary = self.directory.join(format!("{name}.{}.{number}.{TEMPORARY}", std::process::id()));
        let written = (|| {
            let mut file = File::create(&temporary)?;
            // Tells others that this is no litter.
            file.lock()?;
            meta.write(&mut file, sections)?;
            self.put_in_place(&meta, &temporary)
        })();
        let _ = fs::remove_file(&temporary);
        match written {
            // Before it was locked, another process took it for litter.
            Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::NotFound && self.directory.exists() => {
                Ok(())
            }
            other => other,
        }
    }

    fn put_in_place(&self, meta: &Meta, temporary: &Path) -> Result<(), Error> {
        let _lock = self.lock();
        let mut index = self.index();
        self.refresh(&mut index)?;
        let has_parent = || index.blocks.contains_key(&meta.parent) && self.path(meta.parent).exists();
        if index.blocks.contains_key(&meta.name) || (meta.start > 0 && !has_parent()) {
            return Ok(());
        }
        if index.make_room(self, meta.bytes(), self.options.budget, &[meta.parent]).is_none() {
            return Ok(());
        }
        fs::rename(temporary, self.path(meta.name))?;
        // The name is on disk only when the directory is.
        #[cfg(unix)]
        File::open(&self.directory)?.sync_all()?;
        index.gone.remove(&meta.name);
        index.ignored.remove(&meta.name);
        index.blocks.insert(meta.name, meta.clone());
        Ok(())
    }
}

/// Conversations are nobody else's business.
fn make_directory(path: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(path)
}

/// The name that a block's file name says.
fn name_of(path: &Path) -> Option<Name> {
    let text = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.strip_suffix('.')?;
    Name::parse(text)
}

impl Index {
    fn problem(&mut self, path: PathBuf, error: Error, outcome: &'static str) {
        self.problems.push(Problem { path, error, outcome });
    }

    /// Moves a file that is no good to where nobody looks for blocks. One that could not be read may be good; it is not
    /// looked at again.
    fn set_aside(&mut self, shared: &Shared, path: &Path, error: Error) {
        let aside = shared.directory.join("bad");
        let moved = !matches!(error, Error::Io(_))
            && path.file_name().is_some_and(|name| {
                fs::create_dir_all(&aside).and_then(|()| fs::rename(path, aside.join(name))).is_ok()
            });
        if !moved {
            self.ignored.extend(name_of(path));
        }
        self.problem(path.to_owned(), error, if moved { "moved to bad/" } else { "ignored" });
    }

    /// A block is no good: it and what builds on it are not used any more.
    fn lose(&mut self, shared: &Shared, name: Name, error: Error) {
        let lost = self.with_descendants(name);
        lost.iter().for_each(|name| self.forget(*name, Missing::Broken));
        let path = shared.path(name);
        if path.exists() {
            self.set_aside(shared, &path, error);
        } else {
            self.problem(path, error, "computed again");
        }
    }

    fn with_descendants(&self, name: Name) -> Vec<Name> {
        let mut all: Vec<Name> = self.blocks.get(&name).map(|m| m.name).into_iter().collect();
        let mut at = 0;
        while at < all.len() {
            let parent = all[at];
            all.extend(self.blocks.values().filter(|m| m.start > 0 && m.parent == parent).map(|m| m.name));
            at += 1;
        }
        all
    }

    fn remove(&mut self, shared: &Shared, name: Name) {
        let _ = fs::remove_file(shared.path(name));
        self.forget(name, Missing::Evicted);
    }

    /// A block is not there any more.
    fn forget(&mut self, name: Name, why: Missing) {
        let Some(meta) = self.blocks.remove(&name) else { return };
        if self.gone.len() >= MOST_GONE {
            self.gone.clear();
        }
        self.gone.insert(name, (meta.end, why));
    }

    /// Removes blocks so that there is room for `bytes` more within `budget`; returns how many, or `None` if there would
    /// not be room.
    fn make_room(&mut self, shared: &Shared, bytes: u64, budget: u64, protected: &[Name]) -> Option<usize> {
        let all = self.blocks.values().map(Meta::bytes).sum::<u64>() + bytes;
        if all <= budget {
            return Some(0);
        }
        let victims = victims(&self.blocks, all - budget, protected, now())?;
        victims.iter().for_each(|name| self.remove(shared, *name));
        Some(victims.len())
    }
}
