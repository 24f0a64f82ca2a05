//! What one pass computes: runs of tokens, each continuing one session.

use crate::Error;
use std::ops::Range;

/// Which positions of a run produce logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: a prefill chunk that is not the last.
    Nothing,
    /// The last position: prefill's end, or decode.
    Last,
    /// Every position: scoring.
    All,
}

/// Tokens that continue one session.
pub struct Run<'a, S> {
    /// The session's cache.
    pub store: &'a mut S,
    /// Position of the first token; the store holds exactly the positions before it.
    pub start: usize,
    /// The tokens.
    pub tokens: &'a [u32],
    /// Positions whose logits are wanted.
    pub want: Want,
}

/// Where a run's rows are in the pass's buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRows {
    /// Rows of the buffers.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub start: usize,
}

impl RunRows {
    /// Position after the last row.
    pub fn end(&self) -> usize {
        self.start + self.rows.len()
    }
}

/// The rows of a pass, in the order of its runs. Backends see positions only here.
#[derive(Debug, Default)]
pub struct Plan {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its session.
    pub positions: Vec<usize>,
    /// Run of each row.
    pub run_of: Vec<usize>,
    /// Rows of each run.
    pub runs: Vec<RunRows>,
    /// Rows whose logits are wanted.
    pub outputs: Vec<usize>,
}

impl Plan {
    /// Buffers for `rows` rows, so that filling the plan allocates nothing.
    pub fn with_capacity(rows: usize) -> Self {
        Plan {
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            run_of: Vec::with_capacity(rows),
            runs: Vec::with_capacity(rows),
            outputs: Vec::with_capacity(rows),
        }
    }

    /// Lays out `runs`, checking every token.
    pub fn fill<S>(&mut self, runs: &[Run<'_, S>], vocab: usize) -> Result<(), Error> {
        self.tokens.clear();
        self.positions.clear();
        self.run_of.clear();
        self.runs.clear();
        self.outputs.clear();
        for (i, run) in runs.iter().enumerate() {
            if let Some(&token) = run.tokens.iter().find(|&&t| t as usize >= vocab) {
                return Err(Error::Token { token, vocab });
            }
            let first = self.tokens.len();
            self.tokens.extend_from_slice(run.tokens);
            let rows = first..self.tokens.len();
            self.positions.extend(run.start..run.start + rows.len());
            self.run_of.extend(rows.clone().map(|_| i));
            match run.want {
                Want::Nothing => {}
                Want::Last => self.outputs.extend(rows.clone().last()),
                Want::All => self.outputs.extend(rows.clone()),
            }
            self.runs.push(RunRows { rows, start: run.start });
        }
        Ok(())
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Largest number of compressed rows any row of the pass can see.
    pub fn most_visible(&self, ratio: usize) -> usize {
        self.runs.iter().map(|r| r.end() / ratio).max().unwrap_or(0)
    }
}
