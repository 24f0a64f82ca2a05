//! Host memory that weights pass through on their way to a device: a few pieces, used again and again. Fresh memory would
//! cost more than bringing weights into their layout; and a device reads memory that is pinned while others go on.

use cubecl::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use cubecl::client::Client;
use std::mem::MaybeUninit;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Bytes of a piece.
pub(crate) const PIECE: usize = 16 << 20;

/// Pieces that may wait for the device.
const PIECES: usize = 12;

/// How long a device may hold all pieces before there is one more.
const PATIENCE: Duration = Duration::from_millis(200);

/// The pieces.
pub(crate) struct Staging {
    free: Receiver<Bytes>,
    back: Sender<Bytes>,
    made: usize,
}

impl Default for Staging {
    fn default() -> Self {
        let (back, free) = channel();
        Staging { free, back, made: 0 }
    }
}

impl Staging {
    /// A piece of `PIECE` bytes of any content.
    pub(crate) fn piece(&mut self, client: &Client) -> Bytes {
        let free = if self.made < PIECES {
            self.free.try_recv().ok()
        } else {
            self.free.recv_timeout(PATIENCE).ok()
        };
        free.unwrap_or_else(|| {
            self.made += 1;
            let mut fresh = Bytes::from_bytes_vec(vec![0; PIECE]);
            // Pinned, where the device has such memory.
            client.staging(std::iter::once(&mut fresh), false);
            fresh
        })
    }

    /// The first `len` bytes of a piece, which comes back when the device has read them.
    #[allow(unsafe_code)]
    pub(crate) fn lend(&self, piece: Bytes, len: usize) -> Bytes {
        assert!(len <= piece.len());
        let lent = Box::new(Lent { piece: Some(piece), back: self.back.clone() });
        // SAFETY: all bytes of a piece were written when it was made, and `len` of them are there.
        unsafe { Bytes::from_controller(lent, len) }
    }
}

/// A piece that the device has.
struct Lent {
    /// There until it is dropped.
    piece: Option<Bytes>,
    back: Sender<Bytes>,
}

impl AllocationController for Lent {
    fn alloc_align(&self) -> usize {
        self.piece.as_ref().map_or(1, Bytes::align)
    }

    fn property(&self) -> AllocationProperty {
        self.piece.as_ref().map_or(AllocationProperty::Other, Bytes::property)
    }

    #[allow(unsafe_code)]
    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let bytes: &mut [u8] = self.piece.as_deref_mut().unwrap_or_default();
        let ptr = std::ptr::from_mut(bytes) as *mut [MaybeUninit<u8>];
        // SAFETY: the same bytes, of a type that demands less of them; callers write only what is initialized.
        Ok(unsafe { &mut *ptr })
    }

    #[allow(unsafe_code)]
    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let bytes: &[u8] = self.piece.as_deref().unwrap_or_default();
        let ptr = std::ptr::from_ref(bytes) as *const [MaybeUninit<u8>];
        // SAFETY: the same bytes, of a type that demands less of them.
        Ok(unsafe { &*ptr })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(piece) = self.piece.take() {
            // Nobody wants it where all weights are loaded.
            let _ = self.back.send(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_back() {
        let staging = Staging::default();
        let piece = Bytes::from_bytes_vec((0..64).collect());
        let lent = staging.lend(piece, 5);
        assert_eq!(lent[..], [0, 1, 2, 3, 4]);
        assert!(staging.free.try_recv().is_err());
        drop(lent);
        assert_eq!(staging.free.try_recv().unwrap().len(), 64);
    }
}
