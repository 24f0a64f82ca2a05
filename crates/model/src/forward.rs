//! The forward pass (A.1, A.5, A.8, A.11). It exists once: for one row or many, of one session or many.

use crate::cache::Layout;
use crate::{
    Attention, Backend, BackendError, Detail, Error, FeedForward, HeadMix, Layer, LayerKind, Logits, Model,
    PassForm, Plan, Role, Run, Shape, Steps, Tap,
};
use arrayvec::ArrayVec;

/// Rows whose logits are computed at once; bounds the buffer of a wide vocabulary.
const HEAD_ROWS: usize = 16;

/// The buffers of a pass of up to `max_rows` rows, allocated once. Shapes are in brackets.
pub struct Pass<B: Backend> {
    max_rows: usize,
    plan: Plan,
    streams: B::Rows,   // [n, N*D] hyper-connection streams
    mix: B::Rows,       // [n, N + N*N] how the sublayer's output is joined: post, comb
    x: B::Rows,         // [n, D] the sublayer's input: the streams mixed into one, normed
    y: B::Rows,         // [n, D] the sublayer's output
    q_a: B::Rows,       // [n, QL]
    q_low: B::Rows,     // [n, QL] the same, normed
    q: B::Rows,         // [n, H*d]
    kv: B::Rows,        // [n, d]
    heads: B::Rows,     // [n, H*d] attention output
    out_low: B::Rows,   // [n, G*OL]
    comp_kv: B::Rows,   // [n, 2*d or d] compressor projections
    comp_gate: B::Rows, // [n, 2*d or d]
    key_kv: B::Rows,    // [n, 2*ID] the indexer's
    key_gate: B::Rows,  // [n, 2*ID]
    index_q: B::Rows,   // [n, IH*ID]
    index_w: B::Rows,   // [n, IH]
    selection: B::Selection,
    router: B::Rows, // [n, E]
    routes: B::Routes,
    last: B::Rows,   // [HEAD_ROWS, N*D] rows whose logits are wanted
    z: B::Rows,      // [HEAD_ROWS, D]
    z_norm: B::Rows, // [HEAD_ROWS, D]
    logits: B::Rows, // [HEAD_ROWS, V]
    host: Vec<f32>,  // what taps see
}

/// What the layers of a pass share.
struct Context<'a, 'r, B: Backend> {
    b: &'a mut B,
    runs: &'a mut [Run<'r, B::Store>],
    tap: &'a mut (dyn Tap + Send),
}

impl<B: Backend> Pass<B> {
    /// Buffers for passes of up to `max_rows` rows.
    pub fn new(backend: &mut B, shape: &Shape, max_rows: usize) -> Result<Self, BackendError> {
        let s = shape;
        let head_rows = HEAD_ROWS.min(max_rows);
        let mut rows = |width| backend.rows(max_rows, width);
        Ok(Pass {
            max_rows,
            plan: Plan::with_capacity(max_rows),
            streams: rows(s.streams_width())?,
            mix: rows(s.streams + s.streams * s.streams)?,
            x: rows(s.width)?,
            y: rows(s.width)?,
            q_a: rows(s.q_rank)?,
            q_low: rows(s.q_rank)?,
            q: rows(s.q_width())?,
            kv: rows(s.head_dim)?,
            heads: rows(s.q_width())?,
            out_low: rows(s.out_low_width())?,
            comp_kv: rows(2 * s.head_dim)?,
            comp_gate: rows(2 * s.head_dim)?,
            key_kv: rows(2 * s.index_dim)?,
            key_gate: rows(2 * s.index_dim)?,
            index_q: rows(s.index_heads * s.index_dim)?,
            index_w: rows(s.index_heads)?,
            router: rows(s.experts)?,
            selection: backend.selection(max_rows)?,
            routes: backend.routes(max_rows)?,
            last: backend.rows(head_rows, s.streams_width())?,
            z: backend.rows(head_rows, s.width)?,
            z_norm: backend.rows(head_rows, s.width)?,
            logits: backend.rows(head_rows, s.vocab)?,
            host: Vec::new(),
        })
    }

    /// Most rows of one pass.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Computes `runs`: extends every session's cache by its tokens and returns the wanted logits.
    ///
    /// On an error before the device was used, no cache has changed.
    pub fn forward(
        &mut self,
        model: &Model<B>,
        backend: &mut B,
        layout: &Layout,
        runs: &mut [Run<'_, B::Store>],
        logits: &mut Logits,
        tap: &mut (dyn Tap + Send),
    ) -> Result<(), Error> {
        self.prepare(&model.shape, layout, runs)?;
        logits.best.clear();
        if self.plan.is_empty() {
            logits.values.clear();
            return Ok(());
        }
        backend.scope(|b| {
            let mut cx = Context { b, runs, tap };
            let w = &model.weights;
            let steps = cx.b.begin(
                PassForm { draft: false, observed: cx.tap.on() },
                &self.plan,
                cx.runs,
                &self.streams,
            )?;
            if steps == Steps::Needed {
                cx.b.embed(&w.embed, &self.plan, &mut self.streams);
                self.see(&mut cx, "embed", |p| &p.streams)?;
                for (l, layer) in w.layers.iter().enumerate() {
                    self.layer(&mut cx, l, &format_args!("blk.{l}"), layer, &model.shape)?;
                }
            }
            self.head(&mut cx, steps, model, ("output_in", &w.head, &w.output_norm), logits)
        })
    }

    /// Computes the draft block on the streams that [`Pass::forward`] left, for the same rows. The tokens of
    /// `runs` are those *after* the rows' own; the logits are for the tokens after these. Consumes the streams.
    pub fn draft(
        &mut self,
        model: &Model<B>,
        backend: &mut B,
        layout: &Layout,
        runs: &mut [Run<'_, B::Store>],
        logits: &mut Logits,
        tap: &mut (dyn Tap + Send),
    ) -> Result<(), Error> {
        let Some(mtp) = &model.weights.mtp else {
            return Err(BackendError::new("the model has no draft block").into());
        };
        let rows = self.plan.len();
        self.prepare(&model.shape, layout, runs)?;
        if self.plan.len() != rows {
            return Err(BackendError::new("a draft takes the rows of the pass before it").into());
        }
        backend.scope(|b| {
            let mut cx = Context { b, runs, tap };
            let steps = cx.b.begin(
                PassForm { draft: true, observed: cx.tap.on() },
                &self.plan,
                cx.runs,
                &self.streams,
            )?;
            if steps == Steps::Needed {
                let l = model.shape.layers.len();
                cx.b.draft_input(mtp, &model.weights.embed, &self.plan, &mut self.streams);
                self.layer(&mut cx, l, &format_args!("mtp.0"), &mtp.layer, &model.shape)?;
            }
            self.head(&mut cx, steps, model, ("mtp.0.output_in", &mtp.head, &mtp.norm), logits)
        })
    }

    fn prepare(&mut self, shape: &Shape, layout: &Layout, runs: &[Run<'_, B::Store>]) -> Result<(), Error> {
        let rows = runs.iter().map(|r| r.tokens.len()).sum();
        if rows > self.max_rows {
            return Err(Error::TooManyRows { rows, capacity: self.max_rows });
        }
        let end = runs.iter().map(|r| r.start.saturating_add(r.tokens.len())).max().unwrap_or(0);
        if end > layout.context {
            return Err(Error::ContextFull { end, context: layout.context });
        }
        self.plan.fill(runs, shape.vocab)
    }

    /// A.1: one layer.
    fn layer(
        &mut self,
        cx: &mut Context<'_, '_, B>,
        l: usize,
        name: &std::fmt::Arguments<'_>,
        w: &Layer<B>,
        shape: &Shape,
    ) -> Result<(), Error> {
        cx.b.hc_split(&w.attn_hc, &w.attn_norm, &self.streams, &mut self.x, &mut self.mix);
        self.see(cx, format_args!("{name}.attn_in"), |p| &p.x)?;
        self.attention(cx, l, name, w.kind, &w.attn, shape)?;
        self.see(cx, format_args!("{name}.attn_out"), |p| &p.y)?;
        cx.b.hc_join(&self.y, &self.mix, &mut self.streams);

        cx.b.hc_split(&w.ffn_hc, &w.ffn_norm, &self.streams, &mut self.x, &mut self.mix);
        self.see(cx, format_args!("{name}.ffn_in"), |p| &p.x)?;
        self.feed_forward(cx, name, &w.ffn)?;
        self.see(cx, format_args!("{name}.ffn_out"), |p| &p.y)?;
        cx.b.hc_join(&self.y, &self.mix, &mut self.streams);
        self.see(cx, format_args!("{name}.streams"), |p| &p.streams)
    }

    /// A.5: from `x` to `y`.
    fn attention(
        &mut self,
        cx: &mut Context<'_, '_, B>,
        l: usize,
        name: &std::fmt::Arguments<'_>,
        kind: LayerKind,
        w: &Attention<B>,
        shape: &Shape,
    ) -> Result<(), Error> {
        // With no more rows than are selected, all are: nothing to score.
        let selects = w.indexer.is_some() && self.plan.most_visible(4) > shape.index_top_k;
        // Everything that is projected from the sublayer's input.
        let mut jobs = ArrayVec::<_, 7>::new();
        jobs.extend([(&w.q_a, &mut self.q_a), (&w.kv, &mut self.kv)]);
        if let Some(c) = &w.compressor {
            jobs.extend([(&c.kv, &mut self.comp_kv), (&c.gate, &mut self.comp_gate)]);
        }
        if let Some(i) = &w.indexer {
            let c = &i.compressor;
            jobs.extend([(&c.kv, &mut self.key_kv), (&c.gate, &mut self.key_gate)]);
            jobs.extend(selects.then_some((&i.weights, &mut self.index_w)));
        }
        cx.b.project(&self.x, &mut jobs);
        drop(jobs);
        // The row that later tokens will attend to, and those that the tokens of the pass complete.
        cx.b.push_window(l, &w.kv_norm, &self.kv, &self.plan, cx.runs);
        if let Some(c) = &w.compressor {
            cx.b.compress(l, Role::Rows, c, &self.comp_kv, &self.comp_gate, &self.plan, cx.runs);
        }
        if let Some(i) = &w.indexer {
            let c = &i.compressor;
            cx.b.compress(l, Role::Keys, c, &self.key_kv, &self.key_gate, &self.plan, cx.runs);
        }
        // The queries, of the heads and of the indexer.
        cx.b.norm(&w.q_a_norm, &self.q_a, &mut self.q_low);
        self.see(cx, format_args!("{name}.q_low"), |p| &p.q_low)?;
        let mut jobs = ArrayVec::<_, 2>::new();
        jobs.push((&w.q_b, &mut self.q));
        if let Some(i) = &w.indexer {
            jobs.extend(selects.then_some((&i.q, &mut self.index_q)));
        }
        cx.b.project(&self.q_low, &mut jobs);
        drop(jobs);
        cx.b.rotate_queries(kind, &self.plan, &mut self.q);
        self.see(cx, format_args!("{name}.q"), |p| &p.q)?;
        if selects {
            let (q, w, plan) = (&mut self.index_q, &self.index_w, &self.plan);
            cx.b.select(l, q, w, plan, cx.runs, &mut self.selection);
        }
        if w.indexer.is_some() {
            self.see_selection(cx, name, shape, selects)?;
        }
        let selection = selects.then_some(&self.selection);
        cx.b.attend(l, &self.q, &w.sinks, selection, &self.plan, cx.runs, &mut self.heads);
        self.see(cx, format_args!("{name}.heads"), |p| &p.heads)?;
        cx.b.project_groups(&w.out_a, &self.heads, &mut self.out_low);
        self.see(cx, format_args!("{name}.out_low"), |p| &p.out_low)?;
        cx.b.project_out(&w.out_b, &self.out_low, &mut self.y);
        Ok(())
    }

    /// A.8: from `x` to `y`.
    fn feed_forward(
        &mut self,
        cx: &mut Context<'_, '_, B>,
        name: &std::fmt::Arguments<'_>,
        w: &FeedForward<B>,
    ) -> Result<(), Error> {
        cx.b.route(w, &self.x, &self.plan, &mut self.router, &mut self.routes);
        let rows = self.plan.len();
        see_list(cx, &mut self.host, format_args!("{name}.router_ids"), rows, |b, out| {
            b.read_routes(&self.routes, out)
        })?;
        cx.b.experts_forward(w, &self.x, &self.routes, &mut self.y);
        see_list(cx, &mut self.host, format_args!("{name}.hidden"), rows, |b, out| {
            b.read_hidden(&self.routes, out)
        })
    }

    /// A.1: logits of the wanted rows. The steps end with those of the first rows, so that a recorded pass
    /// has its logits ready.
    fn head(
        &mut self,
        cx: &mut Context<'_, '_, B>,
        steps: Steps,
        model: &Model<B>,
        (name, mix, norm): (&str, &HeadMix<B>, &B::Vector),
        logits: &mut Logits,
    ) -> Result<(), Error> {
        let vocab = model.shape.vocab;
        let head_rows = HEAD_ROWS.min(self.max_rows);
        // What is not handed over now can be read later only while the buffer has all of it.
        let best = logits.detail == Detail::Best && self.plan.outputs.len() <= head_rows;
        logits.vocab = vocab;
        if self.plan.outputs.is_empty() {
            cx.b.end()?;
        }
        for (i, rows) in self.plan.outputs.chunks(head_rows).enumerate() {
            if i > 0 || steps == Steps::Needed {
                cx.b.gather(&self.streams, rows, &mut self.last);
                cx.b.hc_head(mix, &self.last, &mut self.z);
                cx.b.norm(norm, &self.z, &mut self.z_norm);
                see_list(cx, &mut self.host, name, rows.len(), |b, out| read_rows(b, &self.z_norm, out))?;
                cx.b.project(&self.z_norm, &mut [(&model.weights.output, &mut self.logits)]);
            } else {
                cx.b.set_rows(&mut self.logits, rows.len());
            }
            if i == 0 {
                cx.b.end()?;
            }
            if best && cx.b.best(&self.logits, &mut logits.best)? {
                logits.values.clear();
            } else {
                logits.values.resize(self.plan.outputs.len() * vocab, 0.0);
                let first = i * head_rows * vocab;
                cx.b.read(&self.logits, &mut logits.values[first..first + rows.len() * vocab])?;
            }
        }
        Ok(())
    }

    /// All logits of the last pass, of which only the best were asked for.
    pub fn rest(&mut self, backend: &mut B, logits: &mut Logits) -> Result<(), Error> {
        let (rows, vocab) = backend.dims(&self.logits);
        logits.values.resize(rows * vocab, 0.0);
        Ok(backend.read(&self.logits, &mut logits.values)?)
    }

    /// Shows a buffer to the tap, if it looks.
    fn see(
        &mut self,
        cx: &mut Context<'_, '_, B>,
        name: impl ToString,
        which: impl Fn(&Self) -> &B::Rows,
    ) -> Result<(), Error> {
        let (n, _) = cx.b.dims(which(self));
        let mut host = std::mem::take(&mut self.host);
        let seen = see_list(cx, &mut host, name, n, |b, out| read_rows(b, which(self), out));
        self.host = host;
        seen
    }

    /// Shows which compressed rows were selected, -1 where there was nothing to choose.
    fn see_selection(
        &mut self,
        cx: &mut Context<'_, '_, B>,
        name: &std::fmt::Arguments<'_>,
        shape: &Shape,
        selects: bool,
    ) -> Result<(), Error> {
        let rows = self.plan.len();
        see_list(cx, &mut self.host, format_args!("{name}.index_rows"), rows, |b, out| {
            if selects {
                return b.read_selection(&self.selection, out);
            }
            out.resize(rows * shape.index_top_k, -1.0);
            Ok(())
        })
    }
}

/// Appends the rows in use of a buffer to an empty list.
fn read_rows<B: Backend>(b: &mut B, rows: &B::Rows, out: &mut Vec<f32>) -> Result<(), BackendError> {
    let (n, width) = b.dims(rows);
    out.resize(n * width, 0.0);
    b.read(rows, out)
}

/// Shows the tap what `read` appends to an empty list, if it looks: values of so many rows.
fn see_list<B: Backend>(
    cx: &mut Context<'_, '_, B>,
    host: &mut Vec<f32>,
    name: impl ToString,
    rows: usize,
    read: impl FnOnce(&mut B, &mut Vec<f32>) -> Result<(), BackendError>,
) -> Result<(), Error> {
    if !cx.tap.on() {
        return Ok(());
    }
    let name = name.to_string();
    cx.tap.passed(&name);
    if cx.tap.wants(&name) {
        host.clear();
        read(cx.b, host)?;
        cx.tap.rows(&name, host.len() / rows.max(1), host);
    }
    Ok(())
}
