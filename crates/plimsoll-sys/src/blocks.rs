//! Memory for direct I/O: whole blocks, at addresses that any disk takes.
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// What reads and writes are multiples of, in offset, length and address: the largest logical block in use.
pub const BLOCK_SIZE: usize = 4096;

/// A block of a buffer, at an address that direct I/O can use.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK_SIZE]);
const _: () = assert!(size_of::<Block>() == BLOCK_SIZE && align_of::<Block>() == BLOCK_SIZE);

/// Blocks on the heap. They stay where they are however often this is moved.
#[derive(Clone)]
pub struct Blocks(Vec<Block>);

impl Blocks {
    /// So many blocks of zeros.
    pub fn new(blocks: usize) -> Self {
        Self(vec![Block::new_zeroed(); blocks])
    }

    /// Their bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_bytes()
    }
}
