//! What was read of the disk last, by one reader.
//!
//! Enters: places to read. Leaves: their bytes, encrypted as they are, read together with what was written after them. Pages
//! that were written together are read together, so that a guest that comes back costs few reads. What must never happen:
//! bytes of a segment's earlier contents that are taken for its present ones; the tag tells, and a window that was wrong is
//! read anew.
use super::device::{BLOCK_SIZE, Blocks, Disk, read_blocks};
use super::format::{SEGMENT_SIZE, offset_of};
use std::io;
use std::ops::Range;

/// Blocks read for a place that nothing led to.
const FIRST: usize = 4;
/// Blocks read at most. A disk that seeks in 8 ms reads 256 KiB in 2 ms more, an SSD in 0.1.
const MOST: usize = 64;

/// See the file's head. Each thread that reads has one.
#[derive(Default)]
pub struct Window {
    blocks: Option<Blocks>,
    segment: u32,
    sequence: u64,
    /// Blocks of the segment that are here.
    here: Range<usize>,
    /// Blocks to read next time, if it goes on.
    ahead: usize,
    /// Reads made.
    pub(super) reads: u64,
}

impl Window {
    /// The bytes of a segment at `range`, from here or from the disk. Says whether they were here already.
    pub(super) fn bytes(
        &mut self,
        disk: &dyn Disk,
        segment: u32,
        sequence: u64,
        range: Range<usize>,
    ) -> io::Result<(&[u8], bool)> {
        let wanted = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        let is_same = (self.segment, self.sequence) == (segment, sequence);
        let was_here = is_same && self.here.start <= wanted.start && wanted.end <= self.here.end;
        if !was_here {
            // Just behind what was here, or a little further: somebody is on the way.
            let goes_on = is_same && (self.here.start..self.here.end + MOST).contains(&wanted.start);
            self.ahead = if goes_on { (self.ahead * 2).clamp(FIRST, MOST) } else { FIRST };
            let end = (wanted.start + self.ahead).max(wanted.end).min(SEGMENT_SIZE / BLOCK_SIZE);
            self.forget();
            let blocks = self.blocks.get_or_insert_with(|| Blocks::new(MOST));
            let into = blocks.bytes_mut().get_mut(..(end - wanted.start) * BLOCK_SIZE);
            let into = into.ok_or(io::ErrorKind::InvalidInput)?;
            let offset = offset_of(segment) + (wanted.start * BLOCK_SIZE) as u64;
            self.reads += 1;
            let read = read_blocks(disk, offset, into, wanted.len() * BLOCK_SIZE)?;
            (self.segment, self.sequence) = (segment, sequence);
            self.here = wanted.start..wanted.start + read / BLOCK_SIZE;
        }
        let first = range.start - self.here.start * BLOCK_SIZE;
        let bytes = self.blocks.as_ref().map_or(&[][..], Blocks::bytes);
        let bytes = bytes.get(first..first + range.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((bytes, was_here))
    }

    /// What is here is not to be believed.
    pub(super) fn forget(&mut self) {
        self.here = 0..0;
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window")
            .field("segment", &self.segment)
            .field("here", &self.here)
            .finish_non_exhaustive()
    }
}
