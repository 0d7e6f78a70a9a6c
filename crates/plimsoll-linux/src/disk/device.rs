//! A disk, as the tier sees one: places that are read and written, and that may fail in every way a disk can.
//!
//! Enters: offsets and buffers. Leaves: how many bytes were read or written, which may be fewer than asked for. [`Disk`] is the
//! boundary that tests put a failing disk behind; [`FileDisk`] is a real one, past the page cache where the file system allows.
//!
//! What must never happen: a file that is somebody's becomes the tier's. So one that is neither empty nor begins like a tier's
//! is refused, and one that is in use is locked. A block device is opened exclusively: what is mounted, swapped to or a part of
//! another device is refused by the kernel, whatever it begins with. A device may be named by a link, because the names under
//! `/dev/disk` that stay the same are links; a file may not.
//!
//! A file that an earlier process has left is not written to either: what that process was writing may still be under way, and
//! would be done over the new tier. It is removed, and another takes its name. A device has no such way out.
use super::format::{self, SEGMENT_SIZE};
use super::queue::{DEPTH, Queue};
use plimsoll_sys::ring::ReadRing;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags, fallocate, fchmod,
    fcntl_getfl, flock, fstat, ftruncate, open, seek, statx, unlink,
};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use thiserror::Error;

pub use plimsoll_sys::blocks::{BLOCK_SIZE, Blocks};

/// Somewhere to keep segments. Offsets and lengths are whole blocks.
pub trait Disk: Send + Sync {
    /// Reads at an offset; how many bytes, 0 at the end of what was ever written.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;

    /// A queue of its own for reads, over a ring where it can use one: the one that is there, or one that it makes. A disk that has
    /// none is read by threads, with [`read_at`](Self::read_at).
    ///
    /// # Errors
    /// Why there is none.
    fn queue(&self, ring: Option<ReadRing>) -> io::Result<Box<dyn Queue>> {
        drop(ring);
        Err(io::Error::new(io::ErrorKind::Unsupported, "this disk has no queue"))
    }

    /// Writes at an offset; how many bytes. Of what was not written, or of all after an error, nobody knows whether it still
    /// will be.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] and [`io::ErrorKind::QuotaExceeded`] where there is no room; whatever else the disk says.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Sees to it that so many bytes at an offset have room on the disk, where it can say, without writing any.
    ///
    /// # Errors
    /// As for [`write_at`](Self::write_at).
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// True where what is read has been written to the disk itself. A page cache shows what may yet have to be written.
    fn shows_what_has_landed(&self) -> bool;

    /// Gives up everything that was written.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn empty(&self) -> io::Result<()>;

    /// A descriptor for whoever keeps it for the next manager; `None` for a disk that does not outlive its process.
    fn keepsake(&self) -> Option<BorrowedFd<'_>>;
}

/// Reads at least `needed` bytes to the front of `into`, which is whole blocks, in as many pieces as the disk gives; how many.
pub(super) fn read_blocks(disk: &dyn Disk, offset: u64, into: &mut [u8], needed: usize) -> io::Result<usize> {
    pieces(into.len(), needed, |done| {
        into.get_mut(done..).map_or(Ok(0), |rest| disk.read_at(offset + done as u64, rest))
    })
}

/// Writes whole blocks in one call, or has failed: to go on behind what was written would be to write a second time what may be
/// under way, and nobody could tell any more when the first has ended.
pub(super) fn write_once(disk: &dyn Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
    match disk.write_at(offset, bytes)? {
        done if done == bytes.len() => Ok(()),
        done => {
            let what = format!("{done} of {} bytes were written", bytes.len());
            Err(io::Error::new(io::ErrorKind::WriteZero, what))
        }
    }
}

/// Goes on with a piece at a time until `needed` bytes are done.
fn pieces(
    length: usize,
    needed: usize,
    mut piece: impl FnMut(usize) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut pieces = Pieces { length, needed, done: 0, vain: 0 };
    loop {
        let outcome = piece(pieces.begun());
        if let Some(over) = pieces.took(outcome) {
            return over;
        }
    }
}

/// How often in a row a disk may have been interrupted, or have had nothing for now, before that is an error.
const VAIN_MAX: u32 = 100;

/// A read that is done a piece at a time. A piece that ends within a block is taken up at the block's beginning, because direct I/O
/// begins nowhere else; one that comes no further is an error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    /// Bytes asked for.
    pub(super) length: usize,
    /// With so many it is done.
    pub(super) needed: usize,
    /// Bytes that are there.
    pub(super) done: usize,
    /// Pieces in a row that were interrupted.
    pub(super) vain: u32,
}

impl Pieces {
    /// Where the next piece begins.
    pub(super) const fn begun(&self) -> usize {
        self.done / BLOCK_SIZE * BLOCK_SIZE
    }

    /// What has become of the next piece. How many bytes there are, or why they are not, if that was the last.
    pub(super) fn took(&mut self, outcome: io::Result<usize>) -> Option<io::Result<usize>> {
        match outcome {
            Err(error) => {
                let is_passing =
                    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
                self.vain += 1;
                if !is_passing || self.vain > VAIN_MAX {
                    return Some(Err(error));
                }
            }
            Ok(more) => {
                let now = self.begun().saturating_add(more).min(self.length);
                if now <= self.done {
                    return Some(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                (self.done, self.vain) = (now, 0);
            }
        }
        (self.done >= self.needed).then_some(Ok(self.done))
    }
}

/// A disk could not be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It could not be opened.
    #[error("{path} cannot be opened as a disk tier")]
    Open {
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no file and no block device.
    #[error(
        "{path} is neither a file nor a block device: name a file that may be made, or a device of its own"
    )]
    Kind {
        /// Where.
        path: String,
    },
    /// It has something else in it.
    #[error("{path} holds something that is not a disk tier: name another file, or empty this one")]
    Foreign {
        /// Where.
        path: String,
    },
    /// Another process uses it, or it is a device that is mounted or a part of another.
    #[error("{path} is in use: give each daemon a file or a device of its own")]
    InUse {
        /// Where.
        path: String,
    },
}

/// A file, or a block device.
#[derive(Debug)]
pub struct FileDisk {
    file: OwnedFd,
    is_file: bool,
    is_direct: bool,
}

/// Where others begin at the latest: btrfs 64 KiB, ISO 9660 32 KiB, ZFS 16 KiB, MD and bcachefs 4 KiB behind the start.
const FOREIGN_MAX: usize = 2 * SEGMENT_SIZE;

/// Where writes go through the page cache all the same, they are not to fail after their pages' memory was given back.
const FLAGS: OFlags = OFlags::RDWR.union(OFlags::CLOEXEC).union(OFlags::DSYNC);
/// Of a file that is made.
const OWNERS: Mode = Mode::RUSR.union(Mode::WUSR);

fn failed(path: &Path) -> impl Fn(Errno) -> OpenError {
    |source| OpenError::Open { path: path.display().to_string(), source: source.into() }
}

/// What was opened, locked. `taken` is how opening says that it is another's.
fn locked(opened: rustix::io::Result<OwnedFd>, taken: Errno, path: &Path) -> Result<OwnedFd, OpenError> {
    let in_use = || OpenError::InUse { path: path.display().to_string() };
    let file = match opened {
        Err(errno) if errno == taken => return Err(in_use()),
        opened => opened.map_err(failed(path))?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::AGAIN) => Err(in_use()),
        done => done.map(|()| file).map_err(failed(path)),
    }
}

impl FileDisk {
    /// Opens a file that is the tier's alone, makes it if there is none, and puts an empty one in the place of an earlier
    /// process's: without the key that went with it, what is in that is nothing.
    ///
    /// # Errors
    /// [`OpenError`]; what was there is then as it was.
    pub fn create(path: &Path) -> Result<Self, OpenError> {
        let shown = || path.display().to_string();
        let device = device(path);
        let is_file = device.is_none();
        let opened = match &device {
            // The very device that was looked at, whatever the path names by now.
            Some(seen) => {
                let seen = format!("/proc/self/fd/{}", seen.as_raw_fd());
                open(seen, FLAGS | OFlags::EXCL | OFlags::DIRECT, OWNERS)
            }
            // Not every file system can go past the page cache; those that cannot are slower, and as right.
            None => {
                let flags = FLAGS | OFlags::CREATE | OFlags::NOFOLLOW;
                match open(path, flags | OFlags::DIRECT, OWNERS) {
                    Err(Errno::INVAL) => open(path, flags, OWNERS),
                    opened => opened,
                }
            }
        };
        let file = locked(opened, Errno::BUSY, path)?;
        let stat = fstat(&file).map_err(failed(path))?;
        let expected = if is_file { FileType::RegularFile } else { FileType::BlockDevice };
        if FileType::from_raw_mode(stat.st_mode) != expected {
            return Err(OpenError::Kind { path: shown() });
        }
        let disk = Self::of(file, is_file);
        let mut start = Blocks::new(FOREIGN_MAX / BLOCK_SIZE);
        let mut read = 0;
        while let Some(rest) = start.bytes_mut().get_mut(read..).filter(|rest| !rest.is_empty()) {
            let more = disk.read_at(read as u64, rest);
            let more = more.map_err(|source| OpenError::Open { path: shown(), source })?;
            read += more;
            // The end, in the middle of a block or at one.
            if more == 0 || !more.is_multiple_of(BLOCK_SIZE) {
                break;
            }
        }
        if !format::may_be_overwritten(start.bytes()) {
            return Err(OpenError::Foreign { path: shown() });
        }
        if is_file && stat.st_size > 0 && unlink(path).is_ok() {
            return disk.replaced(path, Mode::from_raw_mode(stat.st_mode));
        }
        // A name that cannot be removed, as that of a file that is mounted, stays that of the same file.
        disk.empty().map_err(|source| OpenError::Open { path: shown(), source })?;
        Ok(disk)
    }

    /// An empty file, opened as this one, under a name that is free now.
    fn replaced(self, path: &Path, mode: Mode) -> Result<Self, OpenError> {
        let direct = fcntl_getfl(&self.file).map_err(failed(path))? & OFlags::DIRECT;
        let opened = open(path, FLAGS | direct | OFlags::CREATE | OFlags::EXCL, OWNERS);
        let file = locked(opened, Errno::EXIST, path)?;
        fchmod(&file, mode).map_err(failed(path))?;
        Ok(Self::of(file, true))
    }

    /// Goes on with a descriptor of an earlier process, whose lock it holds.
    ///
    /// # Errors
    /// [`io::Error`] when it is not one that can be looked at.
    pub fn inherit(file: OwnedFd) -> io::Result<Self> {
        let stat = fstat(&file)?;
        Ok(Self::of(file, FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile))
    }

    fn of(file: OwnedFd, is_file: bool) -> Self {
        let is_direct = is_direct(&file).unwrap_or(false);
        Self { file, is_file, is_direct }
    }
}

/// True where the descriptor goes past the page cache and the kernel says that the file system really does: some take the flag
/// and read and write through the cache all the same. Network file systems say nothing.
fn is_direct(file: &OwnedFd) -> rustix::io::Result<bool> {
    let seen = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let is_real = seen.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && seen.stx_dio_offset_align != 0;
    Ok(is_real && fcntl_getfl(file)?.contains(OFlags::DIRECT))
}

/// The block device that a path names, as a link or not, without opening it.
fn device(path: &Path) -> Option<OwnedFd> {
    let seen = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let is_device = FileType::from_raw_mode(fstat(&seen).ok()?.st_mode) == FileType::BlockDevice;
    is_device.then_some(seen)
}

impl Disk for FileDisk {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::pread(&self.file, into, offset)?)
    }

    fn queue(&self, ring: Option<ReadRing>) -> io::Result<Box<dyn Queue>> {
        let ring = match ring {
            Some(ring) => ring,
            None => ReadRing::new(DEPTH).map_err(io::Error::other)?,
        };
        ring.set_file(Some(self.file.as_fd())).map_err(io::Error::other)?;
        Ok(Box::new(ring))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::pwrite(&self.file, bytes, offset)?)
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if !self.is_file {
            let has_room = offset + bytes <= seek(&self.file, SeekFrom::End(0))?;
            return if has_room { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) };
        }
        match fallocate(&self.file, FallocateFlags::empty(), offset, bytes) {
            // A file system that cannot promise room says so when it is written to.
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn shows_what_has_landed(&self) -> bool {
        self.is_direct
    }

    fn empty(&self) -> io::Result<()> {
        if self.is_file { Ok(ftruncate(&self.file, 0)?) } else { Ok(()) }
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn pieces_go_on_at_the_beginning_of_a_block_until_all_is_done() {
        let begun = RefCell::new(Vec::new());
        let mut given = [Ok(5000), Err(io::ErrorKind::Interrupted), Ok(100), Ok(5000)].into_iter();
        let piece = |at: usize| {
            begun.borrow_mut().push(at);
            given.next().unwrap().map_err(io::Error::from)
        };
        let outcome = pieces(16384, 9000, piece);
        // 100 bytes from 4096 come no further than the 5000 that there were.
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(begun.into_inner(), [0, 4096, 4096]);
        let mut given = [5000, 4096, 4096].into_iter();
        let done = pieces(12288, 12288, |_| Ok(given.next().unwrap()));
        assert_eq!(done.unwrap(), 12288);
    }

    #[test]
    fn a_file_that_is_somebodys_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, b"a letter").unwrap();
        assert!(matches!(FileDisk::create(&path), Err(OpenError::Foreign { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"a letter");
        // As an image of a btrfs begins, and what is nobody's yet.
        let mut image = vec![0; 1 << 20];
        image[(64 << 10) + 64..][..8].copy_from_slice(b"_BHRfS_M");
        std::fs::write(&path, &image).unwrap();
        assert!(matches!(FileDisk::create(&path), Err(OpenError::Foreign { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), image);
        let empty = directory.path().join("empty");
        std::fs::write(&empty, vec![0; 5000]).unwrap();
        assert!(FileDisk::create(&empty).is_ok());
        assert!(matches!(FileDisk::create(directory.path()), Err(OpenError::Open { .. })));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(FileDisk::create(&link), Err(OpenError::Open { .. })));
    }

    #[test]
    fn a_file_is_one_process_s_at_a_time_and_what_that_was_still_writing_is_not_in_the_next_one_s() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let disk = FileDisk::create(&path).unwrap();
        assert!(matches!(FileDisk::create(&path), Err(OpenError::InUse { .. })));
        let mut block = Blocks::new(1);
        format::Header::new(0, 1, 0, 1).write(block.bytes_mut());
        write_once(&disk, 0, block.bytes()).unwrap();
        let late = disk.keepsake().unwrap().try_clone_to_owned().unwrap();
        flock(&late, FlockOperation::Unlock).unwrap();
        drop(disk);
        let disk = FileDisk::create(&path).unwrap();
        assert!(matches!(FileDisk::create(&path), Err(OpenError::InUse { .. })));
        rustix::io::pwrite(&late, block.bytes(), 0).unwrap();
        assert_eq!(disk.read_at(0, block.bytes_mut()).unwrap(), 0);
    }
}
