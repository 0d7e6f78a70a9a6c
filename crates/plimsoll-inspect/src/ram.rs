//! Guest physical addresses, and where they lie in the VMM's process. Pieces enter; what leaves has been checked not to overlap.
use plimsoll_sys::HvaRange;
use plimsoll_types::{ByteCount, Gpa, Hva};

/// A piece of guest RAM with both its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the guest has it.
    pub gpa: Gpa,
    /// Where it lies in the process.
    pub hva: HvaRange,
}

impl Piece {
    /// The guest's address behind its last byte.
    pub const fn end(&self) -> u64 {
        self.gpa.0 + self.hva.len().0
    }
}

/// A part of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where the guest has it.
    pub gpa: Gpa,
    /// Where it lies in the process.
    pub hva: HvaRange,
    /// Where it would be if all RAM lay together.
    pub offset: u64,
}

/// Pieces that are no RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// One runs past the end of the guest's address space.
    #[error("RAM at {0} runs past the end of the guest's address space")]
    TooLong(Gpa),
    /// Two share addresses of the guest's.
    #[error("RAM at {first} reaches into RAM at {second}")]
    Overlap {
        /// The lower one.
        first: Gpa,
        /// The higher one.
        second: Gpa,
    },
}

/// All RAM of a guest, lowest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRam {
    pieces: Vec<Piece>,
}

impl GuestRam {
    /// RAM of these pieces, in any order.
    ///
    /// # Errors
    /// They overlap in the guest, or one has no end there.
    pub fn new(mut pieces: Vec<Piece>) -> Result<Self, RamError> {
        pieces.retain(|piece| !piece.hva.is_empty());
        pieces.sort_by_key(|piece| piece.gpa);
        if let Some(long) = pieces.iter().find(|piece| piece.gpa.checked_add(piece.hva.len().0).is_none()) {
            return Err(RamError::TooLong(long.gpa));
        }
        for (first, second) in pieces.iter().zip(pieces.iter().skip(1)) {
            if first.end() > second.gpa.0 {
                return Err(RamError::Overlap { first: first.gpa, second: second.gpa });
            }
        }
        Ok(Self { pieces })
    }

    /// The pieces, lowest first.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// How much it is.
    pub fn size(&self) -> ByteCount {
        self.pieces.iter().map(|piece| piece.hva.len()).sum()
    }

    /// Where `len` bytes from `gpa` on lie in the process; `None` unless all of them are in one piece.
    pub fn hva(&self, gpa: Gpa, len: u64) -> Option<Hva> {
        let behind = self.pieces.partition_point(|piece| piece.gpa <= gpa);
        let piece = self.pieces.get(behind.checked_sub(1)?)?;
        let end = gpa.0.checked_add(len)?;
        (end <= piece.end()).then(|| Hva(piece.hva.start().0 + (gpa.0 - piece.gpa.0)))
    }

    /// The parts of `len` bytes from `gpa` on that are RAM, and where each would be if all RAM lay together, lowest first.
    pub fn parts(&self, gpa: Gpa, len: u64) -> impl Iterator<Item = Part> {
        let end = gpa.0.saturating_add(len);
        let mut before = 0;
        self.pieces.iter().filter_map(move |piece| {
            let (from, to) = (piece.gpa.0.max(gpa.0), piece.end().min(end));
            let offset = before + from.saturating_sub(piece.gpa.0);
            before += piece.hva.len().0;
            let hva = Hva(piece.hva.start().0 + from.saturating_sub(piece.gpa.0));
            let hva = HvaRange::new(hva, ByteCount(to.checked_sub(from)?)).filter(|hva| !hva.is_empty())?;
            Some(Part { gpa: Gpa(from), hva, offset })
        })
    }

    /// Whether any of `len` bytes from `gpa` on is RAM.
    pub fn reaches(&self, gpa: Gpa, len: u64) -> bool {
        let end = gpa.0.saturating_add(len);
        let first = self.pieces.partition_point(|piece| piece.end() <= gpa.0);
        self.pieces.get(first).is_some_and(|piece| piece.gpa.0 < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(gpa: u64, hva: u64, len: u64) -> Piece {
        Piece { gpa: Gpa(gpa), hva: HvaRange::new(Hva(hva), ByteCount(len)).unwrap() }
    }

    #[test]
    fn an_address_is_in_one_piece_or_in_none() {
        let ram = GuestRam::new(vec![piece(0x10_0000, 0x9000, 0x2000), piece(0, 0x5000, 0x1000)]).unwrap();
        assert_eq!(ram.size(), ByteCount(0x3000));
        assert_eq!(ram.hva(Gpa(0), 8), Some(Hva(0x5000)));
        assert_eq!(ram.hva(Gpa(0xff8), 8), Some(Hva(0x5ff8)));
        assert_eq!(ram.hva(Gpa(0xffc), 8), None);
        assert_eq!(ram.hva(Gpa(0x10_1ff8), 8), Some(Hva(0xaff8)));
        for gpa in [0x1000, 0xf_ffff, 0x10_2000, u64::MAX, u64::MAX - 8] {
            assert_eq!(ram.hva(Gpa(gpa), 8), None, "{gpa:#x}");
        }
        for (gpa, len, reaches) in [
            (0x1000, 0x1000, false),
            (0x1000, 0xf_f001, true),
            (0xfff, 1, true),
            (0x10_2000, u64::MAX, false),
        ] {
            assert_eq!(ram.reaches(Gpa(gpa), len), reaches, "{gpa:#x} {len:#x}");
        }
    }

    #[test]
    fn parts_leave_out_what_is_no_ram() {
        let ram = GuestRam::new(vec![piece(0, 0x5000, 0x2000), piece(0x4000, 0x9000, 0x1000)]).unwrap();
        let parts: Vec<_> = ram
            .parts(Gpa(0x1000), 0x10_0000)
            .map(|part| (part.gpa.0, part.hva.start().0, part.hva.len().0, part.offset))
            .collect();
        assert_eq!(parts, [(0x1000, 0x6000, 0x1000, 0x1000), (0x4000, 0x9000, 0x1000, 0x2000)]);
        assert_eq!(ram.parts(Gpa(0x2000), 0x2000).count(), 0);
    }

    #[test]
    fn pieces_that_overlap_or_have_no_end_are_refused() {
        let overlap = RamError::Overlap { first: Gpa(0), second: Gpa(0xfff) };
        assert_eq!(GuestRam::new(vec![piece(0xfff, 0, 1), piece(0, 0x5000, 0x1000)]), Err(overlap));
        assert_eq!(GuestRam::new(vec![piece(u64::MAX, 0, 2)]), Err(RamError::TooLong(Gpa(u64::MAX))));
        assert_eq!(GuestRam::new(vec![piece(5, 0, 0), piece(5, 0, 0)]).unwrap().size(), ByteCount(0));
    }
}
