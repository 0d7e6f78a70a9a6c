//! Slab memory: where records and data lie, and what outlives the manager.
//!
//! What enters and leaves are whole slabs of 64 KiB, each with a tag that says what it is for. Tags are read
//! back after a crash and are believed only as far as they can be checked. What must never happen: a slab that
//! reaches its second owner with the first one's bytes in it.
use crate::class::SizeClass;
use core::{fmt, ops::Range};

/// Bytes in a slab: 16 raw pages, 2,730 records.
pub const SLAB_SIZE: usize = SLAB_BYTES as usize;
/// [`SLAB_SIZE`], for what is counted in 32 bits.
pub(crate) const SLAB_BYTES: u32 = 64 << 10;

/// The number of a slab in one [`SlabMemory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabId(pub u32);

impl SlabId {
    /// Bits of a slab number that a record can hold; 2^25 slabs are 2 TiB.
    pub const BITS: u32 = 25;

    /// The number as a subscript.
    pub(crate) const fn get(self) -> usize {
        self.0 as usize
    }

    /// True when a record can name the slab.
    pub(crate) const fn is_nameable(self) -> bool {
        self.0 >> Self::BITS == 0
    }
}

impl fmt::Display for SlabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slab {}", self.0)
    }
}

/// What data is kept apart by: slots of a slab are filled by one lane. What that is for, and which memory a lane's slabs are of, is for
/// whoever has the memory to say: on a host of several NUMA nodes a lane is a node. The first is everybody's who does not care.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub u8);

/// What a slab is for, as kept beside it in memory that outlives the manager: any 64 bits may be found there.
///
/// ```text
///  bit 63           40 39    32 31                         0
///     +---------------+--------+----------------------------+
///     | 0x70_6c_6d    | kind   | kind 1: sequence number    |
///     | ("plm")       | 1, 2   | kind 2: lane << 8 | class  |
///     +---------------+--------+----------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlabTag(u64);

/// A [`SlabTag`] that made sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlabKind {
    /// Records number `sequence * 2730` and on.
    Records {
        /// Where the slab stands among the domain's record slabs.
        sequence: u32,
    },
    /// Data in slots of one size.
    Data {
        /// The size of the slots.
        class: SizeClass,
        /// Whose they are.
        lane: Lane,
    },
}

impl SlabTag {
    const MAGIC: u64 = 0x70_6c_6d;
    const RECORDS: u64 = 1;
    const DATA: u64 = 2;

    /// The tag for a slab of that kind.
    pub const fn new(kind: SlabKind) -> Self {
        let (kind, value) = match kind {
            SlabKind::Records { sequence } => (Self::RECORDS, sequence as u64),
            SlabKind::Data { class, lane } => (Self::DATA, (lane.0 as u64) << 8 | class.number() as u64),
        };
        Self(Self::MAGIC << 40 | kind << 32 | value)
    }

    /// What was found in memory, to be checked by [`SlabTag::kind`].
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits to keep beside the slab.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// What the slab is for, or `None` where the tag is none that [`SlabTag::new`] makes.
    pub fn kind(self) -> Option<SlabKind> {
        let value = u32::try_from(self.0 & u64::from(u32::MAX)).ok()?;
        if self.0 >> 40 != Self::MAGIC {
            return None;
        }
        match self.0 >> 32 & 0xff {
            Self::RECORDS => Some(SlabKind::Records { sequence: value }),
            Self::DATA => {
                let lane = Lane(u8::try_from(value >> 8).ok()?);
                let class = SizeClass::from_number(u8::try_from(value & 0xff).ok()?)?;
                Some(SlabKind::Data { class, lane })
            }
            _ => None,
        }
    }
}

/// No slab is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabsExhausted;

impl fmt::Display for SlabsExhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no slab is left: release pages or give the store more memory")
    }
}

impl core::error::Error for SlabsExhausted {}

/// The slabs of one sharing domain, in memory that outlives the manager (on Linux a memfd).
///
/// # What an implementation owes
/// * [`acquire`](Self::acquire) hands out a slab whose bytes are **all zero**. A released slab is zeroed before
///   any other use, of this domain or another: this is what keeps one domain's pages out of another's sight.
/// * A slab that is acquired is not handed out again until it is released.
/// * Slab numbers are small: the lowest free one is given. The store keeps a table over them.
/// * The tag given to `acquire` is kept with the slab, and both survive the manager's death.
pub trait SlabMemory {
    /// Takes a zeroed slab and tags it.
    ///
    /// # Errors
    /// [`SlabsExhausted`] when the memory's limit is reached.
    fn acquire(&mut self, tag: SlabTag) -> Result<SlabId, SlabsExhausted>;

    /// Sees to it that those bytes of a slab that is acquired can be written: said before the first write to them. Memory
    /// that comes with the slab has nothing to do.
    ///
    /// # Errors
    /// [`SlabsExhausted`] when there is no memory for them.
    fn reserve(&mut self, _slab: SlabId, _bytes: Range<usize>) -> Result<(), SlabsExhausted> {
        Ok(())
    }

    /// Gives a slab back. A slab that is not acquired is left alone.
    fn release(&mut self, slab: SlabId);

    /// The slab's [`SLAB_SIZE`] bytes; none where the slab is not acquired.
    fn bytes(&self, slab: SlabId) -> &[u8];

    /// Like [`bytes`](Self::bytes), to write.
    fn bytes_mut(&mut self, slab: SlabId) -> &mut [u8];

    /// Every acquired slab with its tag as found, in ascending order.
    fn live(&self) -> impl Iterator<Item = (SlabId, SlabTag)>;

    /// The number of slabs that may be acquired at once.
    fn capacity(&self) -> usize;

    /// The number of slabs acquired.
    fn held(&self) -> usize;
}
