//! State of DeepSeek V4 Flash's shape: a prompt of 25,000 tokens into the store, and out of it.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use ds4_kvstore::{Block, Fingerprint, Meta, Options, Section, Store};
use std::time::Instant;

const MODEL: Fingerprint = Fingerprint([1; 20]);
const OPTIONS: Options = Options { budget: 1 << 34 };
const PROMPT: usize = 25_000;
/// Tokens of a block.
const SPAN: usize = 2048;
/// Bytes of compressed rows that a token adds (architecture A.13).
const ROWS: usize = 3508;
/// Bytes of 43 windows of 128 rows.
const FRONTIER: usize = 43 * 128 * 583;
const LOGITS: usize = 4 * 129_280;

/// Bytes that look like FP8: hardly any order in them.
fn bytes(n: usize, seed: usize) -> Vec<u8> {
    (0..n).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
}

fn blocks() -> Vec<Block> {
    let tokens: Vec<u32> = (0..PROMPT as u32).map(|i| i.wrapping_mul(2_654_435_761) % 129_280).collect();
    let block = |start: usize| {
        let end = (start + SPAN).min(PROMPT);
        Block {
            tokens: tokens[..end].to_vec(),
            start,
            rows: bytes(ROWS * (end - start), start),
            frontier: bytes(FRONTIER, end),
            logits: if end == PROMPT { bytes(LOGITS, 1) } else { Vec::new() },
            notes: Vec::new(),
        }
    };
    (0..PROMPT).step_by(SPAN).map(block).collect()
}

fn main() {
    let blocks = blocks();
    let tokens = blocks.last().unwrap().tokens.clone();
    // Beside the build, which is on a disk; the system's folder for temporary files may be memory.
    let place = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    for round in 0..3 {
        let folder = tempfile::tempdir_in(&place).unwrap();
        let store = Store::open(folder.path(), OPTIONS).unwrap();
        let start = Instant::now();
        blocks.iter().for_each(|b| store.put(MODEL, b.clone()));
        store.flush();
        let stored = start.elapsed().as_secs_f64();
        let all: u64 = store.list().iter().map(Meta::bytes).sum();
        drop(store);
        // As a new process would.
        let start = Instant::now();
        let store = Store::open(folder.path(), OPTIONS).unwrap();
        let chain = store.find(MODEL, &tokens).chain;
        let found = start.elapsed().as_secs_f64();
        assert_eq!(chain.len(), blocks.len());
        let read = |meta: &Meta, section| store.read(meta, section).unwrap().len();
        let rows: usize = chain.iter().map(|meta| read(meta, Section::Rows)).sum();
        let last = chain.last().unwrap();
        let bytes = rows + read(last, Section::Frontier) + read(last, Section::Logits);
        let loaded = start.elapsed().as_secs_f64();
        let rate = |bytes: u64, seconds: f64| bytes as f64 / seconds / 1e9;
        println!(
            "round {round}: {} blocks, {:.1} MB, {:.0} bytes of rows a token; stored in {stored:.3} s, {:.2} GB/s, on disk; \
             found in {:.2} ms, {:.1} MB loaded in {loaded:.3} s, {:.2} GB/s",
            blocks.len(),
            all as f64 / 1e6,
            rows as f64 / PROMPT as f64,
            rate(all, stored),
            1e3 * found,
            bytes as f64 / 1e6,
            rate(bytes as u64, loaded),
        );
    }
}
