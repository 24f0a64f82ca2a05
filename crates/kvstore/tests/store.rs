//! The store by itself: what is put in comes out, whatever happens to files and processes.
#![allow(clippy::unwrap_used, clippy::panic)]

use ds4_kvstore::{Block, Fingerprint, Meta, Missing, Name, Names, Options, Section, Store};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MODEL: Fingerprint = Fingerprint([7; 20]);
const PLENTY: Options = Options { budget: 1 << 30 };

fn open(folder: &Path) -> Store {
    Store::open(folder, PLENTY).unwrap()
}

/// A block whose content follows from its tokens, so that a wrong one shows.
fn block(tokens: &[u32], start: usize) -> Block {
    let of = |salt: u32, n: usize| -> Vec<u8> {
        let seed = tokens.iter().fold(salt, |h, t| h.wrapping_mul(0x0100_0193) ^ t);
        (0..n).map(|i| (seed.wrapping_add(i as u32).wrapping_mul(0x9e37_79b1) >> 24) as u8).collect()
    };
    let rows = of(1, 40 * (tokens.len() - start));
    Block { tokens: tokens.to_vec(), start, rows, frontier: of(2, 500), logits: of(3, 64), notes: of(4, 9) }
}

fn sections(block: &Block) -> [Vec<u8>; 5] {
    let own = block.tokens[block.start..].iter().flat_map(|t| t.to_le_bytes()).collect();
    [own, block.rows.clone(), block.frontier.clone(), block.logits.clone(), block.notes.clone()]
}

/// A timeline in blocks of ten tokens.
fn timeline(seed: u32, blocks: usize) -> Vec<Block> {
    let tokens: Vec<u32> = (0..10 * blocks as u32).map(|i| seed * 1000 + i).collect();
    (0..blocks).map(|i| block(&tokens[..10 * (i + 1)], 10 * i)).collect()
}

fn find(store: &Store, tokens: &[u32]) -> Vec<Meta> {
    store.find(MODEL, tokens).chain
}

fn put_all(store: &Store, blocks: &[Block]) {
    blocks.iter().for_each(|b| store.put(MODEL, b.clone()));
    store.flush();
}

/// Every block of a chain is what was put in.
fn check(store: &Store, chain: &[Meta], blocks: &[Block]) {
    for (meta, block) in chain.iter().zip(blocks) {
        assert_eq!(meta.span(), block.start..block.tokens.len());
        for (section, bytes) in Section::ALL.into_iter().zip(sections(block)) {
            assert_eq!(store.read(meta, section).unwrap(), bytes);
        }
    }
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}

#[test]
fn what_is_put_in_comes_out() {
    let folder = tempfile::tempdir().unwrap();
    let blocks = timeline(1, 5);
    let longest = &blocks[4].tokens;
    let store = open(folder.path());
    assert!(find(&store, longest).is_empty());
    put_all(&store, &blocks);
    // Another store on the same directory, as of another process; and after a restart.
    for store in [open(folder.path()), {
        drop(store);
        open(folder.path())
    }] {
        let chain = find(&store, longest);
        assert_eq!(chain.len(), 5);
        check(&store, &chain, &blocks);
        // Longer prompts, shorter ones, others.
        assert_eq!(find(&store, &[longest, &[1, 2][..]].concat()).len(), 5);
        assert_eq!(find(&store, &longest[..39]).len(), 3);
        let mut other = longest.clone();
        other[25] ^= 1;
        assert_eq!(find(&store, &other).len(), 2);
        assert!(store.find(Fingerprint([8; 20]), longest).chain.is_empty());
        assert!(store.take_problems().is_empty());
    }
    // Uses are counted, for those who come later too.
    let store = open(folder.path());
    store.used(&find(&store, longest)[..2]);
    let hits: Vec<u32> = find(&open(folder.path()), longest).iter().map(|m| m.hits).collect();
    assert_eq!(hits, [1, 1, 0, 0, 0]);
    assert_eq!(store.verify(), 5);
    assert_eq!(store.remove(find(&store, longest)[2].name), 3, "with what builds on it");
    assert_eq!(find(&open(folder.path()), longest).len(), 2);
}

#[test]
fn several_stores_see_each_others_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (open(folder.path()), open(folder.path()));
    let blocks = timeline(1, 4);
    put_all(&a, &blocks[..2]);
    assert_eq!(find(&b, &blocks[3].tokens).len(), 2);
    put_all(&b, &blocks[2..]);
    assert_eq!(find(&a, &blocks[3].tokens).len(), 4);
    // The same block by both at once: one file.
    let twice = timeline(2, 1);
    a.put(MODEL, twice[0].clone());
    b.put(MODEL, twice[0].clone());
    a.flush();
    b.flush();
    assert_eq!((files(folder.path(), "kv").len(), files(folder.path(), "tmp").len()), (5, 0));
}

#[test]
fn every_flipped_bit_and_every_missing_byte_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let blocks = timeline(1, 1);
    let store = open(folder.path());
    put_all(&store, &blocks);
    let name = store.list()[0].name;
    drop(store);
    let path = files(folder.path(), "kv").remove(0);
    let whole = std::fs::read(&path).unwrap();
    // The figures of use are no part of the state.
    let uses = 176..192;
    let flips = (0..whole.len()).filter(|i| !uses.contains(i)).map(|i| {
        let mut bytes = whole.clone();
        bytes[i] ^= 1 << (i % 8);
        bytes
    });
    let cuts = (0..whole.len()).step_by(7).map(|n| whole[..n].to_vec());
    let longer = std::iter::once([&whole[..], &[0]].concat());
    for bytes in flips.chain(cuts).chain(longer) {
        std::fs::write(&path, bytes).unwrap();
        let store = open(folder.path());
        assert_eq!(store.verify(), 0);
        let problems = store.take_problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(find(&store, &blocks[0].tokens).is_empty() && !store.has(name));
        // Put aside, and written anew.
        put_all(&store, &blocks);
        assert_eq!(store.verify(), 1);
    }
    // Under another's name it is nobody's.
    let other = path.with_file_name(format!("{}.kv", Name([1; 20])));
    std::fs::rename(&path, &other).unwrap();
    assert!(open(folder.path()).list().is_empty());
}

#[test]
fn a_full_or_vanished_directory_ends_writing_with_one_warning() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("cache");
    let store = open(&inner);
    put_all(&store, &timeline(1, 1));
    std::fs::remove_dir_all(&inner).unwrap();
    put_all(&store, &timeline(2, 3));
    assert!(!store.is_enabled());
    let problems = store.take_problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].to_string().contains("no more state is kept on disk"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let again = folder.path().join("a/b");
        drop(open(&again));
        assert_eq!(std::fs::metadata(&again).unwrap().permissions().mode() & 0o77, 0, "others may not look");
    }
    // A file where the directory should be.
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(Store::open(&file, PLENTY).is_err_and(|e| e.to_string().contains("file")));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Within the budget, and no block without what it builds on.
    #[test]
    fn eviction_leaves_whole_chains(
        budget in 3000u64..12_000,
        turns in prop::collection::vec((0u32..5, 1usize..6, any::<bool>()), 1..12),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Options { budget }).unwrap();
        for (seed, blocks, used) in turns {
            let blocks = timeline(seed, blocks);
            put_all(&store, &blocks);
            let chain = find(&store, &blocks.last().unwrap().tokens);
            check(&store, &chain, &blocks);
            if used {
                store.used(&chain);
            }
            let all = store.list();
            prop_assert!(all.iter().map(Meta::bytes).sum::<u64>() <= budget);
            let names: HashMap<Name, &Meta> = all.iter().map(|m| (m.name, m)).collect();
            prop_assert!(all.iter().all(|m| m.start == 0 || names.contains_key(&m.parent)));
            prop_assert_eq!(files(folder.path(), "kv").len(), all.len());
        }
        store.prune(0);
        prop_assert!(store.list().is_empty() && files(folder.path(), "kv").is_empty());
        prop_assert!(store.take_problems().is_empty());
    }
}

#[test]
fn reasons() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let blocks = timeline(1, 3);
    let tokens = &blocks[2].tokens;
    let missing = |store: &Store| store.find(MODEL, tokens).missing;
    assert_eq!(missing(&store), Missing::New);
    put_all(&store, &blocks);
    assert_eq!(store.find(Fingerprint([8; 20]), tokens).missing, Missing::OtherModel);
    // A process that saw them, and another that comes later.
    let other = open(folder.path());
    store.remove(find(&store, tokens)[1].name);
    assert_eq!((missing(&store), missing(&other)), (Missing::Evicted, Missing::Evicted));
    assert_eq!(missing(&open(folder.path())), Missing::New);
    put_all(&store, &blocks);
    let last = find(&store, tokens)[2].clone();
    std::fs::write(folder.path().join(format!("{}.kv", last.name)), "no block").unwrap();
    assert!(store.read(&last, Section::Rows).is_err());
    assert_eq!((missing(&store), find(&store, tokens).len()), (Missing::Broken, 2));
}

#[test]
fn what_is_used_stays_longer() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (used, unused) = (timeline(1, 1), timeline(2, 1));
    put_all(&store, &[&used[..], &unused].concat());
    store.used(&find(&store, &used[0].tokens));
    let bytes = store.list()[0].bytes();
    assert_eq!(store.prune(bytes), 1);
    assert_eq!(find(&store, &used[0].tokens).len(), 1);
}

/// Not a test: the process that `killed_at_any_moment` kills. It writes and evicts as fast as it can.
#[test]
#[ignore = "runs until it is killed"]
fn writes_until_killed() {
    let Some(folder) = std::env::var_os("DS4_KV_CRASH_FOLDER") else { return };
    let store = Store::open(Path::new(&folder), Options { budget: 20_000 }).unwrap();
    for seed in std::process::id().. {
        put_all(&store, &timeline(seed % 50, 5));
    }
}

#[cfg(unix)]
#[test]
fn killed_at_any_moment() {
    let folder = tempfile::tempdir().unwrap();
    let mut kept = 0;
    for round in 0..200u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["writes_until_killed", "--exact", "--ignored", "--nocapture"])
            .env("DS4_KV_CRASH_FOLDER", folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Until it writes at all, then a moment of any length.
        let start = Instant::now();
        while round == 0 && files(folder.path(), "kv").is_empty() && start.elapsed() < Duration::from_secs(10)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(4000 + round * 7919 % 23_000));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let store = Store::open(folder.path(), Options { budget: 20_000 }).unwrap();
        let all = store.list();
        assert_eq!(store.verify(), all.len(), "round {round}");
        let problems = store.take_problems();
        assert!(problems.is_empty(), "round {round}: {problems:?}");
        assert!(files(folder.path(), "tmp").is_empty());
        // What is there is what was put in.
        for seed in 0..50 {
            let blocks = timeline(seed, 5);
            let chain = find(&store, &blocks[4].tokens);
            check(&store, &chain, &blocks);
            kept += chain.len();
        }
        let mut names = Names::new(&MODEL);
        assert_ne!(names.of(&[1], 1), names.of(&[1, 2], 2));
    }
    assert!(kept > 1000, "{kept} blocks survived in all");
}
