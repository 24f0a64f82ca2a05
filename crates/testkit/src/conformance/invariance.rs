//! A row's result does not depend on the other rows of its pass.

use super::{MakeBackend, Outcome};
use crate::Fixture;
use ds4_gguf::Gguf;
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
        Loaded::of(maker, &fixture.model()?, fixture.draft()?.as_ref(), exact, kv, max_rows)
    }

    /// The same of any model.
    pub(super) fn of<M: MakeBackend<Backend = B>>(
        maker: &M,
        file: &Gguf,
        draft: Option<&Gguf>,
        exact: bool,
        kv: KvFormat,
        max_rows: usize,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let shape = ds4_model::Shape::from_gguf(file)?;
        let mut backend = maker.make(&shape, exact, max_rows)?;
        let model = Model::load(&mut backend, file, draft)?;
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

/// Whether logits `[positions, vocab]` are the same bits.
fn same_bits(want: &[f32], got: &[f32], vocab: usize, what: &str) -> Result<(), String> {
    if want.len() != got.len() {
        return Err(format!("{what}: {} logits, expected {}", got.len(), want.len()));
    }
    for (position, (want, got)) in want.chunks(vocab).zip(got.chunks(vocab)).enumerate() {
        if want.iter().zip(got).any(|(a, b)| a.to_bits() != b.to_bits()) {
            let worst = largest(want, got);
            return Err(format!("{what}: position {position} is the first that differs, by {worst:.1e}"));
        }
    }
    Ok(())
}

/// The rows of passes that must agree with each other.
struct Kind {
    /// Chunks of a session alone.
    alone: usize,
    /// Other chunks of the same session.
    chunks: &'static [&'static [usize]],
    /// Rows of three sessions in each of some batches; 300 of each at the most.
    shares: &'static [[usize; 3]],
}

/// Up to 16 rows.
const FEW: Kind = Kind {
    alone: 1,
    chunks: &[&[16], &[1, 2, 3, 5, 13, 7, 16, 4, 1, 1, 9]],
    shares: &[[9, 1, 0], [1, 10, 3], [6, 1, 1], [1, 1, 1], [0, 12, 1], [3, 1, 12]],
};
/// More than 16 rows. The chunks are those of 320 tokens.
const MANY: Kind = Kind {
    alone: 256,
    chunks: &[&[17, 64, 130, 31, 78]],
    shares: &[[100, 1, 0], [1, 50, 3], [30, 1, 1], [10, 1, 10], [0, 120, 1], [68, 1, 90]],
};
/// Any.
const ALL: Kind = Kind {
    alone: 256,
    chunks: &[&[1], &[1, 2, 3, 5, 130, 7, 64, 31, 4, 1, 1, 9]],
    shares: &[[100, 1, 0], [1, 50, 3], [30, 1, 1], [1, 1, 1], [0, 120, 1], [68, 1, 90]],
};

/// The kinds of passes of a backend in a numeric mode.
fn kinds<M: MakeBackend>(maker: &M, exact: bool) -> Result<&'static [Kind], String> {
    match maker.few_rows() {
        Some(16) if !exact => Ok(&[FEW, MANY]),
        Some(n) if !exact => Err(format!("the suite knows a border of 16 rows, not {n}")),
        _ => Ok(&[ALL]),
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
    let vocab = m.model.shape.vocab;
    let mut wholes = Vec::new();
    for kind in kinds(maker, exact)? {
        let whole = m.run(tokens, &[kind.alone.min(maker.max_rows())], &mut NoTap)?;
        for chunks in kind.chunks {
            let parts = m.run(tokens, chunks, &mut NoTap)?;
            same_bits(&whole, &parts, vocab, &format!("chunks of {chunks:?}"))?;
        }
        wholes.push(whole);
    }
    let [few, many] = &wholes[..] else { return Ok("same bits".into()) };
    let mut worst: Vec<f32> = few.chunks(vocab).zip(many.chunks(vocab)).map(|(a, b)| largest(a, b)).collect();
    worst.sort_by(f32::total_cmp);
    let median = worst[worst.len() / 2];
    let figures =
        format!("same bits up to 16 rows, and above; between them a median difference of {median:.1e}");
    if median < 0.6 { Ok(figures) } else { Err(figures.into()) }
}

/// A batch of sessions at different places gives every session what it gets alone.
pub(super) fn batches<M: MakeBackend>(maker: &M, fixture: &Fixture, exact: bool) -> Outcome {
    let kv = if exact { KvFormat::Plain } else { KvFormat::Packed };
    let mut m = Loaded::new(maker, fixture, exact, kv, maker.max_rows())?;
    let tokens = fixture.tokens()?;
    // Three timelines: the fixture's, its reverse, and one that starts in its middle.
    let lines: [Vec<u32>; 3] =
        [tokens[..300].to_vec(), tokens[..300].iter().rev().copied().collect(), tokens[20..320].to_vec()];
    for kind in kinds(maker, exact)? {
        batches_of(&mut m, &lines, kind, maker.max_rows())?;
    }
    Ok("same bits".into())
}

fn batches_of<B: Backend>(
    m: &mut Loaded<B>,
    lines: &[Vec<u32>; 3],
    kind: &Kind,
    max_rows: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let vocab = m.model.shape.vocab;
    let (mut alone, mut stores) = (Vec::new(), Vec::new());
    for line in lines {
        alone.push(m.run(line, &[kind.alone.min(max_rows)], &mut NoTap)?);
    }
    for _ in lines {
        stores.push(m.backend.store(&m.layout)?);
    }
    let mut done = [0usize; 3];
    for share in kind.shares {
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
            same_bits(want, &m.logits.values[at..at + n], vocab, &what)?;
            at += n;
            done[i] += share[i];
        }
    }
    Ok(())
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
