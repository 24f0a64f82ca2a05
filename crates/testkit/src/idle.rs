//! A backend that computes nothing.

use ds4_gguf::Tensor;
use ds4_model::cache::{Layout, Part};
use ds4_model::{
    Backend, BackendError, Compressor, FeedForward, HeadMix, HyperConnection, LayerKind, Mtp, PassForm, Plan,
    Role, Run, Steps,
};
use std::ops::Range;

/// Takes no time and no memory; all logits are zero. What is around a model is tested with it: sessions, the scheduler,
/// the server with scripted answers.
pub struct Idle;

/// Activations that nobody made.
pub struct Blank {
    rows: usize,
    width: usize,
}

impl Backend for Idle {
    type Matrix = ();
    type Experts = ();
    type Vector = ();
    type Table = ();
    type Rows = Blank;
    type Routes = ();
    type Selection = ();
    type Store = Layout;

    fn begin(
        &mut self,
        _: PassForm,
        _: &Plan,
        _: &mut [Run<'_, Layout>],
        _: &Blank,
    ) -> Result<Steps, BackendError> {
        Ok(Steps::Recorded)
    }

    fn matrix(&mut self, _: &Tensor, _: usize, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn experts(&mut self, _: &Tensor, _: usize, _: usize, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn vector(&mut self, _: Vec<f32>) -> Result<(), BackendError> {
        Ok(())
    }

    fn table(&mut self, _: Vec<i32>, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn rows(&mut self, _: usize, width: usize) -> Result<Blank, BackendError> {
        Ok(Blank { rows: 1, width })
    }

    fn routes(&mut self, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn selection(&mut self, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn store(&mut self, layout: &Layout) -> Result<Layout, BackendError> {
        Ok(layout.clone())
    }

    fn export(
        &mut self,
        store: &Layout,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        let unit = store.check(layer, part, &range)?;
        out.resize(out.len() + unit * range.len(), 0);
        Ok(())
    }

    fn import(
        &mut self,
        store: &mut Layout,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        store.check_bytes(layer, part, &range, bytes).map(|_| ())
    }

    fn read(&mut self, _: &Blank, out: &mut [f32]) -> Result<(), BackendError> {
        out.fill(0.0);
        Ok(())
    }

    fn set_rows(&mut self, rows: &mut Blank, n: usize) {
        rows.rows = n;
    }

    fn dims(&self, rows: &Blank) -> (usize, usize) {
        (rows.rows, rows.width)
    }

    fn read_routes(&mut self, (): &(), _: &mut Vec<f32>) -> Result<(), BackendError> {
        Ok(())
    }

    fn read_hidden(&mut self, (): &(), _: &mut Vec<f32>) -> Result<(), BackendError> {
        Ok(())
    }

    fn read_selection(&mut self, (): &(), _: &mut Vec<f32>) -> Result<(), BackendError> {
        Ok(())
    }

    fn embed(&mut self, (): &(), _: &Plan, _: &mut Blank) {}
    fn hc_split(&mut self, _: &HyperConnection<Self>, (): &(), _: &Blank, _: &mut Blank, _: &mut Blank) {}
    fn hc_join(&mut self, _: &Blank, _: &Blank, _: &mut Blank) {}
    fn norm(&mut self, (): &(), _: &Blank, _: &mut Blank) {}
    fn project(&mut self, _: &Blank, _: &mut [(&(), &mut Blank)]) {}
    fn rotate_queries(&mut self, _: LayerKind, _: &Plan, _: &mut Blank) {}
    fn push_window(&mut self, _: usize, (): &(), _: &Blank, _: &Plan, _: &mut [Run<'_, Layout>]) {}
    fn compress(
        &mut self,
        _: usize,
        _: Role,
        _: &Compressor<Self>,
        _: &Blank,
        _: &Blank,
        _: &Plan,
        _: &mut [Run<'_, Layout>],
    ) {
    }
    fn select(
        &mut self,
        _: usize,
        _: &mut Blank,
        _: &Blank,
        _: &Plan,
        _: &mut [Run<'_, Layout>],
        (): &mut (),
    ) {
    }
    fn attend(
        &mut self,
        _: usize,
        _: &Blank,
        (): &(),
        _: Option<&()>,
        _: &Plan,
        _: &mut [Run<'_, Layout>],
        _: &mut Blank,
    ) {
    }
    fn project_groups(&mut self, (): &(), _: &Blank, _: &mut Blank) {}
    fn route(&mut self, _: &FeedForward<Self>, _: &Blank, _: &Plan, _: &mut Blank, (): &mut ()) {}
    fn experts_forward(&mut self, _: &FeedForward<Self>, _: &Blank, (): &(), _: &mut Blank) {}
    fn gather(&mut self, _: &Blank, _: &[usize], _: &mut Blank) {}
    fn hc_head(&mut self, _: &HeadMix<Self>, _: &Blank, _: &mut Blank) {}
    fn draft_input(&mut self, _: &Mtp<Self>, (): &(), _: &Plan, _: &mut Blank) {}
}
