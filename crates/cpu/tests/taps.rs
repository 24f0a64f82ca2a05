//! Looking at a pass.
#![allow(clippy::unwrap_used)]

use ds4_cpu::{Cpu, Options};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Logits, Model, Pass, Run, Shape, Tap, Want};
use ds4_testkit::Synthetic;

/// Names that were passed, and those whose results came.
#[derive(Default)]
struct Names {
    wants: bool,
    passed: Vec<String>,
    seen: Vec<String>,
}

impl Tap for Names {
    fn wants(&self, _: &str) -> bool {
        self.wants
    }
    fn passed(&mut self, name: &str) {
        self.passed.push(name.into());
    }
    fn rows(&mut self, name: &str, _: usize, _: &[f32]) {
        self.seen.push(name.into());
    }
}

fn names(wants: bool) -> Names {
    let file = Synthetic::tiny(3).model().unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let mut cpu = Cpu::new(&shape, Options { threads: 1, max_rows: 4, ..Options::default() }).unwrap();
    let model = Model::load(&mut cpu, &file, None).unwrap();
    let layout = Layout::new(&shape, KvFormat::Packed, false, 16, 4);
    let mut store = cpu.store(&layout).unwrap();
    let mut pass = Pass::new(&mut cpu, &shape, 4).unwrap();
    let mut runs = [Run { store: &mut store, start: 0, tokens: &[1, 2, 3], want: Want::Last }];
    let mut tap = Names { wants, ..Names::default() };
    pass.forward(&model, &mut cpu, &layout, &mut runs, &mut Logits::default(), &mut tap).unwrap();
    tap
}

/// Every step tells that it is done, and only who wants its result gets it.
#[test]
fn every_step_is_passed() {
    let (idle, curious) = (names(false), names(true));
    assert!(idle.passed.len() > 3 * 8 && idle.seen.is_empty());
    assert_eq!(idle.passed, curious.passed);
    let mut once = curious.seen.clone();
    once.dedup();
    assert!(once.iter().all(|name| curious.passed.contains(name)));
    assert!(curious.passed.iter().all(|name| once.contains(name)), "{:?}", curious.passed);
}
