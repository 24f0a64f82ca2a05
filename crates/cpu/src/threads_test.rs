//! How work is split over threads and memory nodes changes no bit.

use crate::numa::Nodes;
use crate::{Cpu, Options};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Logits, Model, NoTap, Pass, Run, Shape, Want};
use ds4_testkit::Synthetic;

/// Tokens: with one thread small matrices go by columns, with many all go by rows.
const TOKENS: usize = 24;

fn logits(threads: usize, nodes: Nodes) -> Vec<u32> {
    let file = Synthetic::tiny(3).model().unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let options = Options { threads, max_rows: TOKENS, ..Options::default() };
    let mut cpu = Cpu::on_nodes(&shape, options, nodes).unwrap();
    let model = Model::load(&mut cpu, &file, None).unwrap();
    let layout = Layout::new(&shape, KvFormat::Packed, false, 64, TOKENS);
    let mut store = cpu.store(&layout).unwrap();
    let mut pass = Pass::new(&mut cpu, &shape, TOKENS).unwrap();
    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    let mut runs = [Run { store: &mut store, start: 0, tokens: &tokens, want: Want::All }];
    let mut logits = Logits::default();
    pass.forward(&model, &mut cpu, &layout, &mut runs, &mut logits, &mut NoTap).unwrap();
    logits.values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let one = logits(1, Nodes::default());
    assert!(one.len() >= TOKENS);
    for threads in [2, 3, 7] {
        assert!(logits(threads, Nodes::default()) == one, "{threads} threads");
        for cores in [vec![vec![0], vec![1]], vec![vec![0], vec![0, 1], vec![1]]] {
            assert!(
                logits(threads, Nodes::new(cores.clone(), threads)) == one,
                "{threads} threads, {cores:?}"
            );
        }
    }
}
