//! What a pager works with: buffers that it has while its machine is busy, and lets go when that rests.
//!
//! Enters: nothing. Leaves: room for pages, and what compresses them. Nothing in it is needed from one turn to the next.
use plimsoll_store::{Encoder, Fetched};
use plimsoll_types::{PAGE_SIZE, PageBytes};

/// Made when it is needed first: 28 KiB, and what pages there was room for. A thousand idle machines are to have none of it.
#[derive(Default)]
pub(super) struct Kit(Option<Box<Tools>>);

/// See [`Kit`].
pub(super) struct Tools {
    pub(super) encoder: Encoder,
    /// A stored page on its way out of the store.
    pub(super) fetched: Fetched,
    /// Where a densely packed page is unpacked to be compared.
    pub(super) scratch: PageBytes,
    /// Pages on their way to the guest, or from it.
    pub(super) buffer: Vec<PageBytes>,
}

impl Default for Tools {
    fn default() -> Self {
        let (encoder, fetched) = (Encoder::new(), Fetched::new());
        Self { encoder, fetched, scratch: [0; PAGE_SIZE], buffer: Vec::new() }
    }
}

impl Tools {
    /// The first `pages` places of the buffer.
    pub(super) fn room(&mut self, pages: usize) -> &mut [PageBytes] {
        if self.buffer.len() < pages {
            self.buffer.resize(pages, [0; PAGE_SIZE]);
        }
        &mut self.buffer[..pages]
    }
}

impl Kit {
    /// To work with.
    pub(super) fn tools(&mut self) -> &mut Tools {
        self.0.get_or_insert_default()
    }

    /// Lets all of it go.
    pub(super) fn put_away(&mut self) {
        self.0 = None;
    }

    /// Whether there is anything to let go.
    pub(super) const fn is_out(&self) -> bool {
        self.0.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_grows_as_it_is_wanted_and_keeps_what_is_in_it() {
        let mut kit = Kit::default();
        assert!(!kit.is_out());
        kit.tools().room(1)[0].fill(7);
        assert_eq!(kit.tools().room(3).len(), 3);
        assert_eq!(kit.tools().room(1), [[7; PAGE_SIZE]]);
        kit.put_away();
        assert!(!kit.is_out());
        assert_eq!(kit.tools().room(1), [[0; PAGE_SIZE]]);
    }
}
