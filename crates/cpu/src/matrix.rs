//! Weight matrices and their products with panels of rows.

use crate::backend::Cpu;
use crate::kernels::{Columns, MANY, Product, ROWS, ask_for};
use crate::pool::{blocks, gather, weight_pieces};
use crate::rows::Rows;
use ds4_gguf::Tensor;
use ds4_model::BackendError;
use ds4_quant::dequantize_row;
use rayon::prelude::*;

/// A matrix `[out, input]`, left where the file is mapped.
pub struct Matrix {
    tensor: Tensor,
    row_bytes: usize,
    pub(crate) out: usize,
    pub(crate) input: usize,
    pub(crate) product: Product,
}

/// A stack of matrices `[count, out, input]`.
pub struct Experts {
    all: Matrix,
    pub(crate) out: usize,
}

impl Matrix {
    pub(crate) fn new(cpu: &Cpu, tensor: &Tensor, out: usize, input: usize) -> Result<Self, BackendError> {
        let product = cpu.kernels.product(tensor.ty(), cpu.exact).ok_or_else(|| {
            BackendError::new(format!("tensor {}: no kernel for type {:?}", tensor.name(), tensor.ty()))
        })?;
        let row_bytes = tensor.bytes().len() / out;
        Ok(Matrix { tensor: tensor.clone(), row_bytes, out, input, product })
    }

    pub(crate) fn row(&self, r: usize) -> &[u8] {
        &self.tensor.bytes()[r * self.row_bytes..(r + 1) * self.row_bytes]
    }

    /// Decodes a row.
    pub(crate) fn decode(&self, r: usize, out: &mut [f32]) {
        let decoded = dequantize_row(self.tensor.ty(), self.row(r), out);
        debug_assert!(decoded.is_ok(), "matrices are checked when they are bound");
    }

    /// Asks for rows that will be multiplied after others of this matrix: kernels ask for what follows on what they read.
    pub(crate) fn ask(&self, first: usize, rows: usize) {
        let bytes = &self.tensor.bytes()[first * self.row_bytes..];
        ask_for(&bytes[..bytes.len().min(rows * self.row_bytes)]);
    }

    /// Products of rows `first..` with the columns `x`; `out` is `[columns, rows]`.
    pub(crate) fn multiply(&self, first: usize, x: &Columns<'_>, out: &mut [f32]) {
        let rows = out.len() / x.index.len();
        let bytes = &self.tensor.bytes()[first * self.row_bytes..(first + rows) * self.row_bytes];
        self.product.multiply(bytes, self.row_bytes, x, out);
    }
}

impl Experts {
    pub(crate) fn new(
        cpu: &Cpu,
        tensor: &Tensor,
        count: usize,
        out: usize,
        input: usize,
    ) -> Result<Self, BackendError> {
        Ok(Experts { all: Matrix::new(cpu, tensor, count * out, input)?, out })
    }

    /// The matrix of all experts' rows, and the first row of one.
    pub(crate) fn expert(&self, e: usize) -> (&Matrix, usize) {
        (&self.all, e * self.out)
    }
}

/// Weight rows that are enough for a thread, and activation rows that are.
pub(crate) const LEAST_ROWS: usize = 2 * ROWS;
const LEAST_COLUMNS: usize = 8;

/// Matrix rows of one task, where `n` activation rows meet them: few enough that every thread gets several tasks, many enough that
/// handing one out costs nothing and that the next rows are mostly the task's own. Many activation rows are to meet whole tiles, where
/// there are enough for all threads.
pub(crate) fn block_rows(total: usize, n: usize, threads: usize) -> usize {
    let rows = (total / (4 * threads)).clamp(1, 4 * LEAST_ROWS);
    let few = n < MANY || total < LEAST_ROWS * threads;
    if rows < LEAST_ROWS && few { rows } else { rows.next_multiple_of(LEAST_ROWS) }
}

impl Cpu {
    /// `out = W x` for several matrices of the same input.
    pub(crate) fn project_step(&mut self, x: &Rows, jobs: &mut [(&Matrix, &mut Rows)]) {
        let n = x.n;
        self.panel.load(x.used(), x.width, jobs.iter().map(|(m, _)| m.product.input));
        let total: usize = jobs.iter().map(|(m, _)| m.out).sum();
        if total < LEAST_ROWS * self.threads && n >= LEAST_COLUMNS * self.threads {
            jobs.iter_mut().for_each(|(m, out)| self.project_columns(x, m, out));
            return;
        }
        let block = block_rows(total, n, self.threads);
        let tasks = jobs.iter().map(|(m, _)| m.out.div_ceil(block));
        // Task i is a block of rows of one of the matrices.
        let locate = |mut i: usize| {
            let mut before = 0;
            for (m, _) in jobs.iter() {
                let blocks = m.out.div_ceil(block);
                if i < blocks {
                    return (before, Some((*m, i * block)));
                }
                i -= blocks;
                before += m.out;
            }
            (before, None)
        };
        let start = |i: usize| match locate(i) {
            (before, Some((_, first))) => (before + first) * n,
            (before, None) => before * n,
        };
        let (panel, index) = (&self.panel, &self.identity[..n]);
        let products = &mut self.products;
        products.resize((total * n).max(products.len()), 0.0);
        weight_pieces(&self.nodes, tasks, &mut products[..total * n], &start, &|i, out| {
            if let (_, Some((m, first))) = locate(i) {
                let x = panel.columns(x.used(), m.product.input, (0, m.input), index);
                m.multiply(first, &x, out);
            }
        });
        let mut rest = &products[..total * n];
        for (m, out) in jobs {
            let (mine, others) = rest.split_at(m.out * n);
            gather(mine, n, out.take_as(n, m.out), m.out, || blocks(0..m.out, block));
            rest = others;
        }
    }

    /// The same for a matrix of few rows with many of activations: a task is all of the matrix with some of these, which only it reads.
    fn project_columns(&self, x: &Rows, m: &Matrix, out: &mut Rows) {
        let n = x.n;
        let columns = n.div_ceil(2 * self.threads).max(LEAST_COLUMNS);
        let tasks = out.take_as(n, m.out).par_chunks_mut(columns * m.out);
        tasks.zip(self.identity[..n].par_chunks(columns)).for_each(|(out, index)| {
            let x = self.panel.columns(x.used(), m.product.input, (0, m.input), index);
            m.multiply(0, &x, out);
        });
    }

    /// Group `g` of the input meets rows `g * out/groups..` of `w`.
    pub(crate) fn project_groups_step(&mut self, w: &Matrix, x: &Rows, out: &mut Rows) {
        let n = x.n;
        self.panel.load(x.used(), x.width, std::iter::once(w.product.input));
        let (groups, per_group) = (x.width / w.input, w.out / (x.width / w.input));
        let block = block_rows(w.out, n, self.threads).min(per_group);
        let of_group = per_group.div_ceil(block);
        let place = |i: usize| (i / of_group, (i % of_group * block).min(per_group));
        let start = |i: usize| {
            let (g, first) = place(i);
            (g * per_group + first) * n
        };
        let (panel, index) = (&self.panel, &self.identity[..n]);
        let products = &mut self.products;
        products.resize((w.out * n).max(products.len()), 0.0);
        let tasks = std::iter::once(groups * of_group);
        weight_pieces(&self.nodes, tasks, &mut products[..w.out * n], &start, &|i, out| {
            let (g, first) = place(i);
            let x = panel.columns(x.used(), w.product.input, (g * w.input, w.input), index);
            w.multiply(g * per_group + first, &x, out);
        });
        gather(&products[..w.out * n], n, out.take(n), w.out, || {
            (0..groups).flat_map(|g| blocks(g * per_group..(g + 1) * per_group, block))
        });
    }
}
