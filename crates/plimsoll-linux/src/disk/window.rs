//! What was read of the disk last, by one reader, and what is being read for it.
//!
//! Enters: places to read. Leaves: their bytes, encrypted as they are, read together with what was written after them; or what is to
//! be read of the disk for them. Pages that were written together are read together, so that a guest that comes back costs few
//! reads; a few places are followed at once, because pages that a machine has several times lead elsewhere and back. What must
//! never happen: bytes of a segment's earlier contents that are taken for its present ones; the tag tells, and a view that was
//! wrong is read anew.
//!
//! Nothing here reads: `bytes` says what is wanted, and whoever has read it says what [came](Window::came). Meanwhile the
//! part counts as on its way: who wants something in it waits for the same read, and what is behind it is read in a longer piece.
use super::device::{BLOCK_SIZE, Blocks};
use super::format::{SEGMENT_SIZE, offset_of};
use super::reader::{Came, Wanted};
use std::io;
use std::ops::Range;

/// Places followed at once, beside what is on its way.
const VIEWS: usize = 4;
/// Blocks read for a place that nothing led to.
const FIRST: usize = 4;
/// Blocks read at most. A disk that seeks in 8 ms reads 256 KiB in 2 ms more, an SSD in 0.1.
const MOST: usize = 64;

/// See the file's head. Each pager has one.
#[derive(Default)]
pub struct Window {
    /// The one that was looked at last is the last.
    views: Vec<View>,
    /// The number of the next read.
    pub(super) next: u64,
    /// Reads that have not been counted.
    pub(super) reads: u64,
}

/// A part of one segment.
struct View {
    segment: u32,
    sequence: u64,
    /// Which blocks of the segment are here, or on their way.
    here: Range<usize>,
    /// `None` while they are.
    blocks: Option<Blocks>,
    /// The read that it came with.
    ticket: u64,
    /// Blocks that were read at once.
    stride: usize,
}

/// What a window has of a place.
pub(super) enum Seen<'a> {
    /// Its bytes, and the read that they came with.
    Here(&'a [u8], u64),
    /// Nothing: that read is to be waited for.
    UnderWay(u64),
    /// Nothing: this is to be read, and counts as under way.
    Wanted(Wanted),
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
    /// The bytes of a segment at `range`, or what they wait for.
    ///
    /// # Errors
    /// For a range behind a segment's end.
    pub(super) fn bytes(&mut self, segment: u32, sequence: u64, range: Range<usize>) -> io::Result<Seen<'_>> {
        let wanted = range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE);
        let Some(place) = self.views.iter().rposition(|view| view.has(segment, sequence, &wanted)) else {
            return Ok(Seen::Wanted(self.plan(segment, sequence, &wanted)));
        };
        let view = self.views.remove(place);
        self.views.push(view);
        let Some(View { blocks, here, ticket, .. }) = self.views.last() else {
            return Err(io::ErrorKind::Other.into());
        };
        let Some(blocks) = blocks else { return Ok(Seen::UnderWay(*ticket)) };
        let first = range.start - here.start * BLOCK_SIZE;
        let bytes = blocks.bytes().get(first..first + range.len());
        Ok(Seen::Here(bytes.ok_or(io::ErrorKind::UnexpectedEof)?, *ticket))
    }

    /// What is to be read for a place of which nothing is here. It takes the place of the view that leads to it.
    fn plan(&mut self, segment: u32, sequence: u64, wanted: &Range<usize>) -> Wanted {
        let leads = |view: &View| view.leads_to(segment, sequence, wanted.start);
        // Where several do, each read behind the other, the last.
        let before = (0..self.views.len()).filter(|place| self.views.get(*place).is_some_and(leads));
        let before = before.max_by_key(|place| self.views.get(*place).map(|view| view.here.end));
        let stride = before.and_then(|place| self.views.get(place)).map(|view| view.stride);
        if let Some(place) = before
            && self.views.get(place).is_some_and(|view| view.blocks.is_some())
        {
            self.views.remove(place);
        }
        let stride = stride.map_or(FIRST, |stride| (stride * 2).min(MOST));
        let end = (wanted.start + stride).min(SEGMENT_SIZE / BLOCK_SIZE).max(wanted.end);
        let ticket = self.next;
        self.next += 1;
        let here = wanted.start..end;
        let (blocks, offset) = (here.len(), offset_of(segment) + (here.start * BLOCK_SIZE) as u64);
        self.views.push(View { segment, sequence, here, blocks: None, ticket, stride });
        Wanted { ticket, offset, blocks, needed: wanted.len() * BLOCK_SIZE }
    }

    /// What was wanted has come, or why it has not.
    ///
    /// # Errors
    /// That; nothing is on its way any more then.
    pub fn came(&mut self, ticket: u64, came: Came) -> io::Result<()> {
        self.reads += 1;
        let is_it = |view: &View| view.ticket == ticket;
        let (blocks, bytes) = match came {
            Ok(came) => came,
            Err(error) => {
                self.views.retain(|view| !is_it(view));
                return Err(error);
            }
        };
        if let Some(view) = self.views.iter_mut().find(|view| is_it(view)) {
            view.here.end = view.here.end.min(view.here.start + bytes / BLOCK_SIZE);
            view.blocks = Some(blocks);
        }
        let is_there = |view: &View| view.blocks.is_some() && !is_it(view);
        if self.views.iter().filter(|view| is_there(view)).count() >= VIEWS
            && let Some(place) = self.views.iter().position(is_there)
        {
            self.views.remove(place);
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCE: u64 = 9;

    /// The blocks of segment 0 that are wanted for that one; `None` where they are here or under way.
    fn wanted(window: &mut Window, block: usize) -> Option<Wanted> {
        let range = block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE;
        match window.bytes(0, SEQUENCE, range).unwrap() {
            Seen::Wanted(wanted) => Some(wanted),
            _ => None,
        }
    }

    fn blocks(wanted: Option<Wanted>) -> Range<u64> {
        let wanted = wanted.unwrap();
        let first = wanted.offset / BLOCK_SIZE as u64;
        first..first + wanted.blocks as u64
    }

    #[test]
    fn who_goes_on_gets_longer_pieces_whether_the_earlier_ones_have_come_or_not() {
        for is_late in [false, true] {
            let (mut window, mut late, mut read) = (Window::default(), Vec::new(), Vec::new());
            for block in 0..256 {
                let Some(wanted) = wanted(&mut window, block) else { continue };
                read.push(blocks(Some(wanted)));
                late.push(wanted);
                if !is_late {
                    for Wanted { ticket, blocks, .. } in late.drain(..) {
                        window.came(ticket, Ok((Blocks::new(blocks), blocks * BLOCK_SIZE))).unwrap();
                    }
                }
            }
            assert_eq!(read, [0..4, 4..12, 12..28, 28..60, 60..124, 124..188, 188..252, 252..256]);
            // In another order than that in which they were asked for.
            for Wanted { ticket, blocks, .. } in late.into_iter().rev() {
                window.came(ticket, Ok((Blocks::new(blocks), blocks * BLOCK_SIZE))).unwrap();
            }
            assert!(window.views.len() <= VIEWS, "what was left behind is given up");
        }
    }

    #[test]
    fn what_came_short_or_not_at_all_is_not_taken_to_be_here() {
        let mut window = Window::default();
        let first = wanted(&mut window, 0).unwrap();
        assert_eq!(wanted(&mut window, 3), None, "it is under way");
        window.came(first.ticket, Ok((Blocks::new(4), 2 * BLOCK_SIZE + 100))).unwrap();
        assert_eq!(wanted(&mut window, 1), None, "it is here");
        let rest = wanted(&mut window, 2).unwrap();
        assert_eq!(rest.needed, BLOCK_SIZE);
        assert!(window.came(rest.ticket, Err(io::ErrorKind::Other.into())).is_err());
        assert!(wanted(&mut window, 2).is_some(), "it is asked for anew");
    }
}
