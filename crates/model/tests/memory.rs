//! What fits on which device.
#![allow(clippy::unwrap_used, clippy::panic)]

use ds4_model::Shape;
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::memory::{Needs, Reads, Sizing, cache_read, work_bytes};
use ds4_testkit::Synthetic;

const GB: u64 = 1_000_000_000;

fn flash() -> (Shape, u64) {
    let flash = Synthetic::flash(43);
    (Shape::from_gguf(&flash.header().unwrap()).unwrap(), flash.bytes())
}

fn sizing(shape: &Shape, weights: u64, max_rows: usize) -> Sizing<'_> {
    Sizing { shape, weights, format: KvFormat::Packed, draft: false, max_rows, sessions: 1 }
}

#[test]
fn flash_needs() {
    let (shape, weights) = flash();
    assert_eq!(weights / 100_000_000, 867);
    let needs = sizing(&shape, weights, 2048).needs(1_000_000);
    // The rows of 1M tokens take 3,508 MB, the windows (43 rings of 127 + 2048 rows) 55, the open groups 12.
    assert!((3_570..3_580).contains(&(needs.cache / 1_000_000)), "{}", needs.cache);
    // 112k values in three forms and seven experts' rows for each row, 0.4 GB of tiles.
    assert!((2_400_000_000..2_700_000_000).contains(&needs.work), "{}", needs.work);
    assert!(work_bytes(&shape, 256) * 3 < needs.work);
    assert_eq!(needs.total(), needs.weights + needs.cache + needs.work);
}

#[test]
fn the_largest_context_is_the_last_that_fits() {
    let (shape, weights) = flash();
    let sizing = sizing(&shape, weights, 2048);
    assert_eq!(sizing.largest_context(&[80 * GB]), 0);
    assert_eq!(sizing.largest_context(&[141 * GB]), shape.context);
    let least = sizing.needs(0).total();
    for memory in [least, least + GB / 100, 90 * GB, 91 * GB] {
        let largest = sizing.largest_context(&[memory]);
        assert!(sizing.needs(largest).fit(memory) && !sizing.needs(largest + 1024).fit(memory), "{largest}");
        assert!(largest.is_multiple_of(1024));
    }
    let four = Sizing { sessions: 4, ..sizing.clone() };
    assert_eq!(four.needs(32_768).cache, 4 * sizing.needs(32_768).cache);
    let needs = Needs { weights: 1, cache: 2, work: 3 };
    assert!(needs.fit(6) && !needs.fit(5));
}

/// The figures that the speed of decoding is compared with.
#[test]
fn bytes_that_a_token_reads() {
    let synthetic = Synthetic::tiny(4);
    let file = synthetic.model().unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let reads = Reads::of(&file, &shape);
    let experts: u64 = file.tensors().iter().filter(|t| t.name.contains("_exps.")).map(|t| t.bytes).sum();
    assert_eq!(reads.experts, experts);
    let tables = |name: &str| file.tensor(name).unwrap().info().bytes;
    let all = tables("token_embd.weight") + 3 * tables("blk.0.ffn_gate_tid2eid.weight");
    let rows = all / shape.vocab as u64;
    assert_eq!(reads.dense, synthetic.bytes() - experts - all + rows);
    assert_eq!(reads.pass(1), reads.dense + experts / 4);
    assert!(reads.pass(4) < reads.dense + experts && reads.pass(4) > reads.pass(3));
    assert_eq!(reads.pass(1000), reads.dense + experts);

    let (flash, _) = flash();
    let layout = Layout::new(&flash, KvFormat::Packed, false, 1 << 20, 256);
    let (row, key) = (583u64, 68u64);
    assert_eq!(cache_read(&layout, 512, 100), 43 * 100 * row + 21 * 25 * row);
    let at = |n: u64| 43 * 128 * row + 21 * (n / 4 * key + 512 * row) + 20 * (n / 128) * row;
    assert_eq!(cache_read(&layout, 512, 131_072), at(131_072));
}
