//! Blocks of the disk, each of which must contain what its number and version say.
//!
//! Enters: permission to do one operation. Leaves: words that are not what they should be. Reads go past the guest's cache
//! (O_DIRECT), straight into pages of guest memory that stay as they are until their turn comes again: then they are
//! verified once more, so that memory written by a device and taken away meanwhile is looked at too.
use crate::memory::{Page, Wrongs};
use plimsoll_guest::PageWords;
use plimsoll_guest::content::Content;
use plimsoll_guest::random::Rng;
use plimsoll_guest::versions::PageState;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use zerocopy::IntoBytes;

const DEVICE: &str = "/dev/vda";
const BLOCK: u64 = 4096;
/// Pages that blocks are read into: 4 MiB.
const BUFFERS: usize = 1024;
/// One operation of so many writes.
const WRITE_ONE_IN: u64 = 8;

/// The disk, and what is known about it.
#[derive(Debug)]
pub(crate) struct Disk {
    device: File,
    content: Content,
    seed: u64,
    versions: Vec<u64>,
    buffers: Vec<Page>,
    /// Which block's bytes each buffer holds, and in which version.
    held: Vec<Option<(u64, PageState)>>,
    rng: Rng,
    scratch: Box<PageWords>,
    /// Blocks read.
    pub(crate) reads: u64,
    /// Blocks written.
    pub(crate) writes: u64,
}

impl Disk {
    /// Opens the disk, all of whose blocks are in their first version.
    pub(crate) fn open(content: Content, seed: u64) -> io::Result<Self> {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE)?;
        let blocks = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0))? / BLOCK;
        if blocks == 0 {
            return Err(io::Error::other(format!("{DEVICE} is empty")));
        }
        Ok(Self {
            device,
            content,
            seed,
            versions: (0..blocks).map(|block| PageState::FIRST.encode(seed, block)).collect(),
            buffers: (0..BUFFERS).map(|_| Page::ZERO).collect(),
            held: vec![None; BUFFERS],
            rng: Rng::new(seed),
            scratch: Box::new([0; 512]),
            reads: 0,
            writes: 0,
        })
    }

    /// Verifies what a buffer holds, then reads another block into it and verifies that, or writes one from it.
    pub(crate) fn operate(&mut self, wrongs: &mut Wrongs) -> io::Result<()> {
        let place = usize::try_from(self.rng.below(self.buffers.len() as u64)).unwrap_or(0);
        let block = self.rng.below(self.versions.len() as u64);
        let number = usize::try_from(block).unwrap_or(0);
        let (Some(buffer), Some(held), Some(version)) =
            (self.buffers.get_mut(place), self.held.get_mut(place), self.versions.get_mut(number))
        else {
            return Ok(());
        };
        if let Some((block, state)) = held.take() {
            self.content.fill(block, state.version(), &mut self.scratch);
            wrongs.compare("buffer", block, &buffer.0, &self.scratch);
        }
        let mut state = wrongs.decode("disk", *version, self.seed, block);
        if self.rng.below(WRITE_ONE_IN) == 0 {
            state = state.written();
            *version = state.encode(self.seed, block);
            self.content.fill(block, state.version(), &mut buffer.0);
            self.device.write_all_at(buffer.0.as_bytes(), block * BLOCK)?;
            self.writes += 1;
        } else {
            self.device.read_exact_at(buffer.0.as_mut_bytes(), block * BLOCK)?;
            self.content.fill(block, state.version(), &mut self.scratch);
            wrongs.compare("disk", block, &buffer.0, &self.scratch);
            self.reads += 1;
        }
        *held = Some((block, state));
        Ok(())
    }
}
