//! The most probable tokens of rows of logits: a few hundred bytes come back where all logits are half a megabyte.

use crate::buffer::{Buffer, device_error};
use crate::hyper::cubes;
use crate::kernels::select::{self, SELECT_UNITS, TOKENS};
use crate::rows::Rows;
use crate::stage::Stage;
use cubecl::prelude::*;
use ds4_model::{BEST_TOKENS, BackendError, Best};

/// What is found on the way, for `rows` rows of `vocab` logits.
pub(crate) struct Finding {
    rows: usize,
    vocab: usize,
    /// Of each stretch, then of each row: logits, and their tokens.
    best: [Buffer; 2],
    tokens: [Buffer; 2],
}

impl Finding {
    fn new(client: &Client, rows: usize, vocab: usize) -> Self {
        let stretches = vocab.div_ceil(TOKENS);
        let words = |n: usize| Buffer::zeroed(client, 4 * n as u64);
        let both = || [words(rows * stretches * BEST_TOKENS), words(rows * BEST_TOKENS)];
        Finding { rows, vocab, best: both(), tokens: both() }
    }
}

impl Stage {
    /// The best tokens of each row.
    pub(crate) fn best_step(&mut self, logits: &Rows, out: &mut Vec<Best>) -> Result<(), BackendError> {
        let (n, vocab) = (logits.n, logits.width);
        let finding = match self.scratch.finding.take() {
            Some(f) if f.rows >= n && f.vocab == vocab => f,
            _ => Finding::new(&self.client, n, vocab),
        };
        self.find_best(logits, &finding);
        let last = usize::from(vocab > TOKENS);
        let parts = [&finding.best[last], &finding.tokens[last]];
        let handles = parts.map(|p| p.handle.clone()).to_vec();
        let read = self.client.read(handles).map_err(device_error)?;
        let words = |part: usize, row: usize| {
            let (words, _) = read[part].as_chunks::<4>();
            words[row * BEST_TOKENS..(row + 1) * BEST_TOKENS].iter().map(|w| u32::from_le_bytes(*w))
        };
        out.clear();
        for row in 0..n {
            let logits = words(0, row).map(f32::from_bits);
            out.push(Best::new(words(1, row).zip(logits).take(vocab).collect()));
        }
        self.scratch.finding = Some(finding);
        Ok(())
    }

    #[allow(unsafe_code)]
    fn find_best(&self, logits: &Rows, finding: &Finding) {
        let (n, vocab) = (logits.n as u32, logits.width);
        let stretches = cubes(vocab, TOKENS as u32);
        let (client, dim) = (&self.client, CubeDim::new_1d(SELECT_UNITS));
        let launch = |scores: &Buffer, places: &Buffer, to: usize, count: usize, stride: usize| {
            let (again, cubes) = (to == 1, if to == 1 { 1 } else { stretches });
            // SAFETY: scores have `n` rows of `stride` values, of which `count` are chosen from; the outputs have room
            // for the best of every cube.
            self.timer.time(client, "best_tokens", || unsafe {
                select::best_tokens::launch_unchecked(
                    client,
                    CubeCount::new_2d(n, cubes),
                    dim,
                    scores.arg(4),
                    places.arg(4),
                    finding.best[to].arg(4),
                    finding.tokens[to].arg(4),
                    count as u32,
                    stride as u32,
                    again,
                    BEST_TOKENS,
                );
            });
        };
        launch(&logits.values, &self.nothing[0], 0, vocab, logits.stride);
        if stretches > 1 {
            let stride = stretches as usize * BEST_TOKENS;
            let count = vocab / TOKENS * BEST_TOKENS + (vocab % TOKENS).min(BEST_TOKENS);
            launch(&finding.best[0], &finding.tokens[0], 1, count, stride);
        }
    }
}
