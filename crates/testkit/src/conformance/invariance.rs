//! A row's result does not depend on the other rows of its pass.

use super::{Agreement, MakeBackend, Outcome};
use crate::Fixture;
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{Backend, Error, Logits, Model, NoTap, Pass, Run, Tap, Want};

/// Tokens of a fixture that are enough to wrap every ring and to select rows.
const TOKENS: usize = 320;

/// A fixture's model on the backend under test.
pub(super) struct Loaded<B: Backend> {
    pub(super) backend: B,
    pub(super) model: Model<B>,
    pub(super) pass: Pass<B>,
    pub(super) layout: Layout,
    pub(super) logits: Logits,
}

impl<B: Backend> Loaded<B> {
    pub(super) fn new<M: MakeBackend<Backend = B>>(
        maker: &M,
        fixture: &Fixture,
        exact: bool,
        kv: KvFormat,
        max_rows: usize,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let file = fixture.model()?;
        let draft = fixture.draft()?;
        let shape = ds4_model::Shape::from_gguf(&file)?;
        let mut backend = maker.make(&shape, exact, max_rows)?;
        let model = Model::load(&mut backend, &file, draft.as_ref())?;
        let pass = Pass::new(&mut backend, &shape, max_rows)?;
        let layout = Layout::new(&shape, kv, draft.is_some(), 4096, max_rows);
        Ok(Loaded { backend, model, pass, layout, logits: Logits::default() })
    }

    /// One pass; its logits are in `self.logits`.
    pub(super) fn forward(&mut self, runs: &mut [Run<'_, B::Store>]) -> Result<(), Error> {
        self.pass.forward(&self.model, &mut self.backend, &self.layout, runs, &mut self.logits, &mut NoTap)
    }

    /// Extends a session that holds the tokens before `start` up to `end`, in chunks of the given sizes (the
    /// last repeats); returns the logits of all positions.
    pub(super) fn extend(
        &mut self,
        store: &mut B::Store,
        tokens: &[u32],
        mut start: usize,
        chunks: &[usize],
        tap: &mut (dyn Tap + Send),
    ) -> Result<Vec<f32>, Error> {
        let mut all = Vec::new();
        let mut sizes = chunks.iter().chain(chunks.last().into_iter().cycle());
        while start < tokens.len() {
            let end = sizes.next().map_or(tokens.len(), |n| (start + n).min(tokens.len()));
            let mut runs = [Run { store, start, tokens: &tokens[start..end], want: Want::All }];
            let (model, backend, logits) = (&self.model, &mut self.backend, &mut self.logits);
            self.pass.forward(model, backend, &self.layout, &mut runs, logits, tap)?;
            all.extend_from_slice(&logits.values);
            start = end;
        }
        Ok(all)
    }

    /// Logits of every position of a new session.
    pub(super) fn run(
        &mut self,
        tokens: &[u32],
        chunks: &[usize],
        tap: &mut (dyn Tap + Send),
    ) -> Result<Vec<f32>, Error> {
        let mut store = self.backend.store(&self.layout)?;
        self.extend(&mut store, tokens, 0, chunks, tap)
    }
}

/// Largest absolute difference; NaN counts as infinite.
pub(super) fn largest(a: &[f32], b: &[f32]) -> f32 {
    let difference = |(a, b): (&f32, &f32)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(difference).fold(0.0, f32::max)
}

/// Compares logits `[positions, vocab]` and collects the worst.
struct Agreed {
    agreement: Agreement,
    worst: f32,
}

impl Agreed {
    fn new(agreement: Agreement) -> Self {
        Agreed { agreement, worst: 0.0 }
    }

    fn check(&mut self, want: &[f32], got: &[f32], vocab: usize, what: &str) -> Result<(), String> {
        if want.len() != got.len() {
            return Err(format!("{what}: {} logits, expected {}", got.len(), want.len()));
        }
        for (position, (want, got)) in want.chunks(vocab).zip(got.chunks(vocab)).enumerate() {
            let worst = largest(want, got);
            let ok = match self.agreement {
                Agreement::Bits => want.iter().zip(got).all(|(a, b)| a.to_bits() == b.to_bits()),
                Agreement::Within(tolerance) => worst <= tolerance,
            };
            if !ok {
                return Err(format!("{what}: position {position} is the first that differs, by {worst:.1e}"));
            }
            self.worst = self.worst.max(worst);
        }
        Ok(())
    }

    fn figures(&self) -> String {
        match self.agreement {
            Agreement::Bits => "same bits".into(),
            Agreement::Within(t) => format!("largest difference {:.1e}, {t:.1e} allowed", self.worst),
        }
    }
}

fn format(exact: bool) -> KvFormat {
    if exact { KvFormat::Rounded } else { KvFormat::Packed }
}

/// One token at a time, odd chunks and whole chunks give the same.
pub(super) fn chunks<M: MakeBackend>(maker: &M, fixture: &Fixture, exact: bool) -> Outcome {
    let mut m = Loaded::new(maker, fixture, exact, format(exact), maker.max_rows())?;
    let tokens = fixture.tokens()?;
    let tokens = &tokens[..TOKENS];
    let whole = m.run(tokens, &[maker.max_rows()], &mut NoTap)?;
    let mut agreed = Agreed::new(maker.chunks(exact));
    for chunks in [&[1][..], &[1, 2, 3, 5, 130, 7, 64, 31, 4, 1, 1, 9]] {
        let parts = m.run(tokens, chunks, &mut NoTap)?;
        agreed.check(&whole, &parts, m.model.shape.vocab, &format!("chunks of {chunks:?}"))?;
    }
    Ok(agreed.figures())
}

/// A batch of sessions at different places gives every session what it gets alone.
pub(super) fn batches<M: MakeBackend>(maker: &M, fixture: &Fixture, exact: bool) -> Outcome {
    let kv = if exact { KvFormat::Plain } else { KvFormat::Packed };
    let mut m = Loaded::new(maker, fixture, exact, kv, maker.max_rows())?;
    let tokens = fixture.tokens()?;
    let vocab = m.model.shape.vocab;
    // Three timelines: the fixture's, its reverse, and one that starts in its middle.
    let lines: [Vec<u32>; 3] =
        [tokens[..300].to_vec(), tokens[..300].iter().rev().copied().collect(), tokens[20..320].to_vec()];
    let mut alone = Vec::new();
    for line in &lines {
        alone.push(m.run(line, &[maker.max_rows()], &mut NoTap)?);
    }
    let mut stores = Vec::new();
    for _ in &lines {
        stores.push(m.backend.store(&m.layout)?);
    }
    let mut agreed = Agreed::new(maker.batches(exact));
    let mut done = [0usize; 3];
    // Prefill chunks of some beside single tokens of others.
    let shares = [[100, 1, 0], [1, 50, 3], [30, 1, 1], [1, 1, 1], [0, 120, 1], [68, 1, 90]];
    for share in shares {
        let mut runs: Vec<_> = Vec::new();
        for (i, store) in stores.iter_mut().enumerate().filter(|(i, _)| share[*i] > 0) {
            let tokens = &lines[i][done[i]..done[i] + share[i]];
            runs.push(Run { store, start: done[i], tokens, want: Want::All });
        }
        m.forward(&mut runs)?;
        let mut at = 0;
        for i in (0..3).filter(|&i| share[i] > 0) {
            let n = share[i] * vocab;
            let want = &alone[i][done[i] * vocab..][..n];
            let what = format!("session {i} from token {} in a batch of {share:?}", done[i]);
            agreed.check(want, &m.logits.values[at..at + n], vocab, &what)?;
            at += n;
            done[i] += share[i];
        }
    }
    Ok(agreed.figures())
}

pub(super) fn empty_pass<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let mut m = Loaded::new(maker, fixture, false, KvFormat::Packed, maker.max_rows())?;
    let mut stores = [m.backend.store(&m.layout)?, m.backend.store(&m.layout)?];
    let mut forward = |tokens: [&[u32]; 2]| {
        let runs = stores.iter_mut().zip(tokens);
        let mut runs: Vec<_> =
            runs.map(|(store, tokens)| Run { store, start: 0, tokens, want: Want::All }).collect();
        m.forward(&mut runs).map(|()| m.logits.values.clone())
    };
    let nothing = forward([&[], &[]])?;
    let alone = forward([&[5, 6], &[]])?;
    let other = forward([&[], &[5, 6]])?;
    if !nothing.is_empty() {
        return Err(format!("no rows gave {} logits", nothing.len()).into());
    }
    if alone != other {
        return Err(format!("an empty run changes logits by {:.1e}", largest(&alone, &other)).into());
    }
    Ok("same bits".into())
}
