//! Activations and weights on the device.

use crate::buffer::Buffer;
use crate::kernels::dot::{Form, InputLaunch, OutputLaunch, WeightsLaunch};
use crate::layout::Format;
use cubecl::client::Client;
use std::cell::Cell;

/// Activations `[capacity, width]`, of which the first `n` rows are in use, with room for their int8 form.
pub struct Rows {
    pub(crate) width: usize,
    pub(crate) n: usize,
    /// Values from row to row: whole blocks of int8, and of sectors of memory.
    pub(crate) stride: usize,
    pub(crate) values: Buffer,
    quants: Buffer,
    scales: Buffer,
    sums: Buffer,
    /// Whether the int8 form is that of the values.
    pub(crate) quantized: bool,
    /// The values in f16, for the matrix units.
    pub(crate) halves: Buffer,
    /// Whether they are those of the values.
    halved: Cell<bool>,
}

impl Rows {
    /// `quants`: whether the rows may be asked for in int8.
    pub(crate) fn new(client: &Client, capacity: usize, width: usize, quants: bool) -> Self {
        let stride = width.next_multiple_of(64);
        // The matrix units write whole tiles of rows.
        let capacity = if capacity > 16 { capacity.next_multiple_of(128) } else { capacity };
        let values = 4 * (capacity * stride) as u64;
        // What lies between width and stride is read as zeros.
        let buffer =
            |bytes| if stride == width { Buffer::new(client, bytes) } else { Buffer::zeroed(client, bytes) };
        let form = |part: u64| buffer(if quants { values / part } else { 0 });
        Rows {
            width,
            n: 0,
            stride,
            values: buffer(values),
            quants: form(4),
            scales: form(32),
            sums: form(16),
            quantized: false,
            halves: buffer(if capacity > 16 { values / 2 } else { 0 }),
            halved: Cell::new(false),
        }
    }

    /// As an input of products.
    pub(crate) fn input(&self) -> InputLaunch {
        InputLaunch::new(
            self.values.arg(16),
            self.quants.arg(16),
            self.scales.arg(4),
            self.sums.arg(4),
            self.stride,
        )
    }

    /// As an output of `n` rows, which a kernel will fill in some form.
    pub(crate) fn output(&mut self, n: usize, form: Form) -> OutputLaunch {
        (self.n, self.quantized) = (n, form == Form::Quantized);
        self.halved.set(matches!(form, Form::Halves | Form::Both));
        self.form(form)
    }

    fn form(&self, form: Form) -> OutputLaunch {
        OutputLaunch::new(
            self.values.arg(16),
            self.quants.arg(4),
            self.scales.arg(4),
            self.sums.arg(4),
            self.halves.arg(8),
            self.stride,
            form,
        )
    }

    /// As an output whose int8 form a kernel makes of the values.
    pub(crate) fn refill(&self) -> OutputLaunch {
        self.form(Form::Quantized)
    }

    /// Takes `n` rows of `width` values into use, to be filled in f32.
    pub(crate) fn take(&mut self, n: usize, width: usize) {
        debug_assert!(width <= self.stride);
        (self.n, self.width, self.quantized) = (n, width, false);
        self.halved.set(false);
    }

    /// Whether the f16 form has yet to be made; it counts as made then.
    pub(crate) fn claim_halves(&self) -> bool {
        !self.halved.replace(true)
    }
}

/// A matrix `[rows, input]`.
pub struct Matrix {
    /// The device it lies on.
    pub(crate) stage: usize,
    pub(crate) quants: Buffer,
    pub(crate) scales: Buffer,
    pub(crate) sub: Buffer,
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) input: usize,
    /// Units of a plane of the device, where that is certain; else 0.
    pub(crate) plane: usize,
}

impl Matrix {
    /// As an argument of a kernel.
    pub(crate) fn arg(&self) -> WeightsLaunch {
        let scales = (self.format.scales(self.input) > 0).then(|| self.scales.arg(2));
        let sub = (self.format.sub_bytes(self.input) > 0).then(|| self.sub.arg(4));
        let half = self.format == Format::F16;
        let values = |wanted: bool| wanted.then(|| self.quants.arg(16)).into_iter();
        WeightsLaunch::new(
            values(!half).collect(),
            values(half).collect(),
            scales.into_iter().collect(),
            sub.into_iter().collect(),
            self.format,
            self.format.padded(self.input),
            self.plane,
        )
    }

    /// Buffers of an argument.
    pub(crate) fn buffers(&self) -> usize {
        1 + usize::from(self.format.scales(self.input) > 0)
            + usize::from(self.format.sub_bytes(self.input) > 0)
    }

    /// Values of a row as they are stored.
    pub(crate) fn stored(&self) -> usize {
        self.format.padded(self.input)
    }

    /// 16-byte units of quants of a row.
    pub(crate) fn units(&self) -> usize {
        self.stored() / self.format.unit()
    }
}

/// A stack of matrices, their rows one after another.
pub struct Experts {
    pub(crate) all: Matrix,
}

/// A vector of f32, on every device: such are small.
pub struct Vector {
    pub(crate) values: Vec<Buffer>,
}

/// Expert ids by token `[V, K]`, on every device.
pub struct Table {
    pub(crate) values: Vec<Buffer>,
}

/// Experts chosen for each row, ascending, and their weights `[capacity, used]`.
pub struct Routes {
    pub(crate) n: usize,
    pub(crate) ids: Buffer,
    pub(crate) weights: Buffer,
}

impl Routes {
    pub(crate) fn new(client: &Client, pairs: usize) -> Self {
        let buffer = || Buffer::zeroed(client, 4 * pairs as u64);
        Routes { n: 0, ids: buffer(), weights: buffer() }
    }
}

/// Compressed rows chosen for each row, ascending `[capacity, top_k]`; those of rows that see no more than `top_k`
/// are not written.
pub struct Selection {
    pub(crate) n: usize,
    pub(crate) ids: Buffer,
}

impl Selection {
    pub(crate) fn new(client: &Client, ids: usize) -> Self {
        Selection { n: 0, ids: Buffer::zeroed(client, 4 * ids as u64) }
    }
}
