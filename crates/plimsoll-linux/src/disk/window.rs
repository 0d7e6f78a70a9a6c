//! What was read of the disk last, by one reader.
//!
//! Enters: places to read. Leaves: their bytes, encrypted as they are, read together with what was written after them. Pages
//! that were written together are read together, so that a guest that comes back costs few reads; a few places are followed at
//! once, because pages that a machine has several times lead elsewhere and back. What must never happen:
//! bytes of a segment's earlier contents that are taken for its present ones; the tag tells, and a view that was wrong is
//! read anew.
use super::device::{BLOCK_SIZE, Blocks, Disk, read_blocks};
use super::format::{SEGMENT_SIZE, offset_of};
use std::io;
use std::ops::Range;

/// Places followed at once.
const VIEWS: usize = 4;
/// Blocks read for a place that nothing led to.
const FIRST: usize = 4;
/// Blocks read at most. A disk that seeks in 8 ms reads 256 KiB in 2 ms more, an SSD in 0.1.
const MOST: usize = 64;

/// See the file's head. Each thread that reads has one.
#[derive(Default)]
pub struct Window {
    /// The one that was looked at last is the last.
    views: Vec<View>,
    /// Reads made.
    pub(super) reads: u64,
}

/// A part of one segment.
struct View {
    segment: u32,
    sequence: u64,
    /// Which blocks of the segment are here.
    here: Range<usize>,
    blocks: Blocks,
    /// Blocks that were read at once.
    stride: usize,
}

impl View {
    fn has(&self, segment: u32, sequence: u64, wanted: &Range<usize>) -> bool {
        let is_same = (self.segment, self.sequence) == (segment, sequence);
        is_same && self.here.start <= wanted.start && wanted.end <= self.here.end
    }

    /// True for a place just behind what is here, or a little further: somebody is on the way.
    fn leads_to(&self, segment: u32, sequence: u64, block: usize) -> bool {
        let is_same = (self.segment, self.sequence) == (segment, sequence);
        is_same && (self.here.start..self.here.end + MOST).contains(&block)
    }
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
        let known = self.views.iter().position(|view| view.has(segment, sequence, &wanted));
        let view = match known {
            Some(place) => self.views.remove(place),
            None => self.read(disk, segment, sequence, &wanted)?,
        };
        self.views.push(view);
        let Some(view) = self.views.last() else { return Err(io::ErrorKind::Other.into()) };
        let first = range.start - view.here.start * BLOCK_SIZE;
        let bytes = view.blocks.bytes().get(first..first + range.len());
        Ok((bytes.ok_or(io::ErrorKind::UnexpectedEof)?, known.is_some()))
    }

    /// Reads a new view, which takes the place of the one that leads to it, or else of the one not looked at for longest.
    fn read(
        &mut self,
        disk: &dyn Disk,
        segment: u32,
        sequence: u64,
        wanted: &Range<usize>,
    ) -> io::Result<View> {
        let before = self.views.iter().position(|view| view.leads_to(segment, sequence, wanted.start));
        let before = before.map(|place| self.views.remove(place));
        if self.views.len() == VIEWS {
            self.views.remove(0);
        }
        let stride = before.map_or(FIRST, |view| (view.stride * 2).min(MOST));
        let end = (wanted.start + stride).min(SEGMENT_SIZE / BLOCK_SIZE).max(wanted.end);
        let mut blocks = Blocks::new(end - wanted.start);
        let offset = offset_of(segment) + (wanted.start * BLOCK_SIZE) as u64;
        self.reads += 1;
        let read = read_blocks(disk, offset, blocks.bytes_mut(), wanted.len() * BLOCK_SIZE)?;
        let here = wanted.start..wanted.start + read / BLOCK_SIZE;
        Ok(View { segment, sequence, here, blocks, stride })
    }

    /// What was looked at last is not to be believed.
    pub(super) fn forget(&mut self) {
        self.views.pop();
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window").field("views", &self.views.len()).finish_non_exhaustive()
    }
}
