//! Device memory.

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::prelude::BufferArg;
use cubecl::server::Handle;
use ds4_model::BackendError;
use std::sync::atomic::{AtomicU64, Ordering};

/// Some device memory.
#[derive(Clone)]
pub(crate) struct Buffer {
    pub(crate) handle: Handle,
    pub(crate) bytes: u64,
    id: u64,
}

/// Failures of the device, as errors of a backend.
pub(crate) fn device_error(e: impl std::fmt::Display) -> BackendError {
    BackendError::new(format!("the GPU failed: {e}"))
}

impl Buffer {
    /// Memory of unknown content, never moved: what is captured in a graph stays valid.
    pub(crate) fn new(client: &Client, bytes: u64) -> Self {
        // Whole 16-byte vectors, so that every element type can view it.
        let bytes = bytes.max(16).next_multiple_of(16);
        let handle = client.memory_persistent_allocation((), |()| client.empty(bytes as usize));
        Buffer::of(handle, bytes)
    }

    pub(crate) fn of(handle: Handle, bytes: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Buffer { handle, bytes, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Tells it from every other buffer.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn zeroed(client: &Client, bytes: u64) -> Self {
        let buffer = Buffer::new(client, bytes);
        const CHUNK: u64 = 64 << 20;
        let mut at = 0;
        while at < buffer.bytes {
            let len = CHUNK.min(buffer.bytes - at);
            buffer.write(client, at, vec![0; len as usize]);
            at += len;
        }
        buffer
    }

    /// Memory with some content.
    pub(crate) fn from_slice<T: bytemuck::NoUninit>(client: &Client, values: &[T]) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Buffer::new(client, bytes.len() as u64);
        if !bytes.is_empty() {
            buffer.write(client, 0, bytes.to_vec());
        }
        buffer
    }

    /// Writes bytes at an offset; both multiples of 4.
    pub(crate) fn write(&self, client: &Client, offset: u64, bytes: Vec<u8>) {
        self.write_bytes(client, offset, Bytes::from_bytes_vec(bytes));
    }

    /// The same for bytes that were read.
    pub(crate) fn write_bytes(&self, client: &Client, offset: u64, bytes: Bytes) {
        let end = self.bytes - offset - bytes.len() as u64;
        let part = self.handle.clone().offset_start(offset).offset_end(end);
        client.write(&part, bytes);
    }

    /// Waits, and reads bytes.
    pub(crate) fn read(&self, client: &Client, offset: u64, len: u64) -> Result<Bytes, BackendError> {
        let part = self.handle.clone().offset_start(offset).offset_end(self.bytes - offset - len);
        client.read_one(part).map_err(device_error)
    }

    /// As an argument of elements of so many bytes.
    #[allow(unsafe_code)]
    pub(crate) fn arg(&self, element: usize) -> BufferArg {
        // SAFETY: the length is that of the memory, in whole elements.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.bytes as usize / element) }
    }
}
