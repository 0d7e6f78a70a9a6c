//! What guests write: every page says in its first eight bytes whose it is, which page, and the how-many-th write.
use plimsoll_types::{PAGE_SIZE, PageBytes};
use std::fmt;

/// The bytes of one page, named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// What the kernel or a discard gives.
    Zero,
    /// The same in every machine, so that objects are shared.
    Common(u8),
    /// One write of one page of one machine.
    Own {
        /// Whose.
        machine: u32,
        /// Which page.
        page: u32,
        /// Counts writes of the page.
        version: u32,
    },
}

impl Content {
    fn tag(self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Common(which) => 0xc000_0000_0000_0000 | u64::from(which),
            Self::Own { machine, page, version } => {
                (u64::from(machine) + 1) << 48 | u64::from(page) << 32 | u64::from(version)
            }
        }
    }

    /// All 4096 bytes: one word repeated, compressible or incompressible, so that the store takes every path.
    pub(crate) fn bytes(self) -> Box<PageBytes> {
        let tag = self.tag();
        let mut page = Box::new([0; PAGE_SIZE]);
        let kind = if tag == 0 { 0 } else { tag % 3 };
        let mut mixed = tag | 1;
        for (at, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let noise = kind == 1 && at < 64 || kind == 2;
            if noise && at > 0 {
                mixed ^= mixed << 13;
                mixed ^= mixed >> 7;
                mixed ^= mixed << 17;
                *word = mixed.to_le_bytes();
            } else {
                *word = tag.to_le_bytes();
            }
        }
        page
    }
}

/// What a page that should not be there looks like.
pub(crate) struct Found<'a>(pub(crate) &'a PageBytes);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tag = self.0.first_chunk().map_or(0, |head| u64::from_le_bytes(*head));
        match tag {
            0 => f.write_str("zeros at its start"),
            tag if tag >> 62 == 3 => write!(f, "common content {}", tag & 0xff),
            tag => write!(
                f,
                "machine {} page {} version {}",
                (tag >> 48).wrapping_sub(1),
                tag >> 32 & 0xffff,
                tag & 0xffff_ffff
            ),
        }
    }
}

/// What one page may hold, as its guest sees it.
///
/// Between the start of a discard and its end the old bytes and zeros are both right; afterwards zeros, or what was
/// written meanwhile. Reading settles what is open.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    last: Content,
    last_ok: bool,
    zero_ok: bool,
    /// Discards under way.
    discards: u32,
    /// Writes so far.
    writes: u32,
}

impl Expected {
    /// Never touched.
    pub(crate) const fn untouched() -> Self {
        Self { last: Content::Zero, last_ok: true, zero_ok: true, discards: 0, writes: 0 }
    }

    /// The guest wrote.
    pub(crate) const fn wrote(&mut self, content: Content) {
        self.last = content;
        self.last_ok = true;
        self.zero_ok = self.discards > 0;
        self.writes += 1;
    }

    /// The guest read: complains about what it must not see.
    pub(crate) fn read(&mut self, bytes: &PageBytes) -> Result<(), String> {
        if self.last_ok && *bytes == *self.last.bytes() {
            if self.discards == 0 {
                self.zero_ok = self.last == Content::Zero;
            }
            return Ok(());
        }
        if self.zero_ok && bytes.iter().all(|byte| *byte == 0) {
            self.last_ok = false;
            return Ok(());
        }
        let Self { last, last_ok, zero_ok, .. } = self;
        Err(format!(
            "{} where {last:?} (still right: {last_ok}; zeros right: {zero_ok}) belongs",
            Found(bytes)
        ))
    }

    /// A discard begins; keep the answer for [`Expected::discarded`].
    pub(crate) const fn discarding(&mut self) -> u32 {
        self.discards += 1;
        self.zero_ok = true;
        self.writes
    }

    /// A discard that began when there had been `writes` writes has taken effect; or a crash has swallowed it.
    pub(crate) const fn discarded(&mut self, writes: u32, is_swallowed: bool) {
        self.discards -= 1;
        if writes == self.writes && !is_swallowed {
            self.last_ok = false;
        }
    }

    /// A discard that had taken effect was swallowed by a crash before the manager applied it.
    pub(crate) const fn swallowed(&mut self, writes: u32) {
        if writes == self.writes {
            self.last_ok = true;
        }
    }
}
