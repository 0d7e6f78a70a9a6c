//! userfaultfd: page faults become messages, and pages are installed, taken out, poisoned and protected by name.
//!
//! What enters: a descriptor (this process's own, or one passed by the process whose memory it governs), ranges and
//! bytes. What leaves: [`Outcome`]s and [`Event`]s. What must never happen: a partial result taken for a whole one,
//! an event lost, or a call that changes memory which a Rust reference promises is unchanged.
//!
//! # Which call carries the memory-safety obligation
//!
//! A userfaultfd can make memory of this process change under a program that holds `&[u8]` to it. Not every call
//! can, though, and saying which keeps `unsafe` to one constructor:
//!
//! * [`copy`](Userfaultfd::copy), [`zeropage`](Userfaultfd::zeropage), [`continue_`](Userfaultfd::continue_) and
//!   [`poison`](Userfaultfd::poison) act only on pages that are **absent** from a range that is **registered** with
//!   this very descriptor; the kernel answers EEXIST and ENOENT otherwise. They define what an absent (or poisoned) page holds.
//!   Nobody can have read it: since the registration, a reader of an absent page waits.
//!   [`write_protect`](Userfaultfd::write_protect) and [`wake`](Userfaultfd::wake) change no bytes. All are safe.
//! * [`register`](Userfaultfd::register) turns absent pages, until then guaranteed to read as zeros, into pages that
//!   hold whatever is installed later. So it asks for an [`UnborrowedRange`].
//! * [`move_pages`](Userfaultfd::move_pages) takes pages *out* of its source, which need not be registered: it is a
//!   discard of any private anonymous memory of the process. Its source is an [`UnborrowedRange`]; its destination
//!   must be absent and registered, and is covered like COPY's.
//! * [`unregister`](Userfaultfd::unregister) and dropping the last descriptor let absent pages read as zeros again.
//!   Only a page that a discard or a MOVE made absent can change its contents so, and those asked already. It is
//!   safe for memory; it is *wrong* while pages of a guest are elsewhere, because the guest would read zeros.
//!
//! Discards are the other half of the argument:
//! [`AnonymousMapping::discard`](crate::mapping::AnonymousMapping::discard) exists only on a type that lends no
//! references. A registration follows its mapping (mremap) and ends with it (munmap), so memory that the allocator
//! maps later at the same address is not affected.
//!
//! A descriptor of *another* process governs that process's memory, and nothing here can touch ours through it.
//!
//! # Reading events
//!
//! One thread reads a descriptor: two readers would see the events of one page in either order. With
//! [`Features::EVENT_REMOVE`] a discarder waits until its event is read and all installing calls answer
//! [`Stop::Again`] until then; so the reader must never itself discard in a range of the descriptor it reads.
#![expect(unsafe_code, reason = "userfaultfd is a set of ioctls on addresses")]

mod abi;
mod event;
mod journal;
mod open;
mod outcome;

pub use event::{Access, Event, EventBuffer, FaultKind, UnknownEvent};
pub use journal::Journal;
pub use open::{AdoptError, DeviceObstacle, Mode, OpenError};
pub use outcome::{OsError, Outcome, Stop};

use crate::{HvaRange, UnborrowedRange};
use abi::{Message, Request};
use bitflags::bitflags;
use plimsoll_types::{ByteCount, Hva};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use std::ffi::c_void;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::vec::Drain;
use zerocopy::IntoBytes;

bitflags! {
    /// What a userfaultfd can be asked to do. The names are the kernel's (UFFD_FEATURE_*).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Write-protect faults are told apart.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// Forks are reported, each with the child's descriptor. Needs CAP_SYS_PTRACE.
        const EVENT_FORK = 1 << 1;
        /// mremap is reported.
        const EVENT_REMAP = 1 << 2;
        /// Discards are reported.
        const EVENT_REMOVE = 1 << 3;
        /// hugetlbfs memory can be registered.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Shared memory (memfd) can be registered.
        const MISSING_SHMEM = 1 << 5;
        /// munmap is reported.
        const EVENT_UNMAP = 1 << 6;
        /// Faults raise SIGBUS instead of waiting. Not under KVM, whose own accesses would fail.
        const SIGBUS = 1 << 7;
        /// Faults carry the thread's id.
        const THREAD_ID = 1 << 8;
        /// Minor faults on hugetlbfs.
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults on shared memory.
        const MINOR_SHMEM = 1 << 10;
        /// Faults carry the exact address instead of the page's.
        const EXACT_ADDRESS = 1 << 11;
        /// Write protection on hugetlbfs and shared memory.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Absent anonymous pages can be write-protected too.
        const WP_UNPOPULATED = 1 << 13;
        /// POISON.
        const POISON = 1 << 14;
        /// Write-protect faults resolve themselves and only leave a mark.
        const WP_ASYNC = 1 << 15;
        /// MOVE.
        const MOVE = 1 << 16;
    }
}

bitflags! {
    /// Calls that a descriptor or a registered range supports, by the kernel's numbers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Ioctls: u64 {
        /// REGISTER.
        const REGISTER = 1 << 0x00;
        /// UNREGISTER.
        const UNREGISTER = 1 << 0x01;
        /// WAKE.
        const WAKE = 1 << 0x02;
        /// COPY.
        const COPY = 1 << 0x03;
        /// ZEROPAGE.
        const ZEROPAGE = 1 << 0x04;
        /// MOVE.
        const MOVE = 1 << 0x05;
        /// WRITEPROTECT.
        const WRITEPROTECT = 1 << 0x06;
        /// CONTINUE.
        const CONTINUE = 1 << 0x07;
        /// POISON.
        const POISON = 1 << 0x08;
        /// API.
        const API = 1 << 0x3f;
    }
}

bitflags! {
    /// Which touches of a registered range fault.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct RegisterMode: u64 {
        /// Touches of absent pages.
        const MISSING = 1 << 0;
        /// Writes to pages under [`Userfaultfd::write_protect`].
        const WRITE_PROTECT = 1 << 1;
        /// Touches of pages that are in the page cache and not mapped.
        const MINOR = 1 << 2;
    }
}

/// What the kernel answered to the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApiReply {
    /// Everything this kernel supports, not only what was asked for.
    pub features: Features,
    /// The calls the descriptor supports.
    pub ioctls: Ioctls,
}

/// The handshake failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The kernel lacks a feature, or the handshake was made before. [`Userfaultfd::supported`] tells the first.
    #[error(
        "the kernel refuses the features {requested:?}: it lacks one (a newer kernel is needed), or the handshake was made already"
    )]
    Refused {
        /// What was asked for.
        requested: Features,
    },
    /// Fork events were asked for without the right to them.
    #[error("fork events need CAP_SYS_PTRACE: grant it, or leave EVENT_FORK out")]
    NotPermitted,
    /// Something else failed.
    #[error("the userfaultfd handshake failed")]
    Other(#[source] io::Error),
}

/// A probe of the kernel failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No descriptor to ask.
    #[error("cannot ask the kernel for its userfaultfd features")]
    Open(#[from] OpenError),
    /// The descriptor did not answer.
    #[error("cannot ask the kernel for its userfaultfd features")]
    Handshake(#[from] HandshakeError),
}

/// A range could not be registered or unregistered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// Another userfaultfd has it.
    #[error(
        "{range} is registered with another userfaultfd (a live migration or a background snapshot of the VMM?)"
    )]
    Taken {
        /// The range.
        range: HvaRange,
    },
    /// The range cannot be registered so.
    #[error(
        "{range} cannot be registered: it must be page-aligned, mapped without a gap, and memory of a kind that supports the mode"
    )]
    Unsuitable {
        /// The range.
        range: HvaRange,
    },
    /// No memory, or the process that owns the range is gone (the kernel does not tell them apart).
    #[error("{range} cannot be registered: no memory, or its process is gone")]
    NoMemoryOrProcess {
        /// The range.
        range: HvaRange,
    },
    /// Something else failed.
    #[error("registering {range} failed")]
    Other {
        /// The range.
        range: HvaRange,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl RegisterError {
    fn new(range: HvaRange, errno: Errno) -> Self {
        match errno {
            Errno::BUSY => Self::Taken { range },
            Errno::INVAL => Self::Unsuitable { range },
            Errno::NOMEM => Self::NoMemoryOrProcess { range },
            errno => Self::Other { range, source: errno.into() },
        }
    }
}

/// Whether threads that wait for the pages go on now, or at a later [`Userfaultfd::wake`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// They go on as soon as the pages are there.
    Yes,
    /// They wait on.
    No,
}

impl Wake {
    const fn mode(self) -> u64 {
        match self {
            Self::Yes => 0,
            Self::No => abi::MODE_DONTWAKE,
        }
    }
}

/// What MOVE does at a hole in its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// It stops there, with [`Stop::NotMapped`] or, after some progress, [`Stop::Again`].
    Refuse,
    /// It leaves a hole in the destination and counts it as done.
    Allow,
}

/// How [`Userfaultfd::move_pages`] moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveMode {
    /// Whether threads waiting at the destination go on.
    pub wake: Wake,
    /// What happens at a hole in the source.
    pub holes: Holes,
}

/// What [`Userfaultfd::write_protect`] does. Protecting never wakes anyone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The next write of each page faults.
    Protect,
    /// Pages are writable again.
    Release(Wake),
}

/// A userfaultfd: the right to decide what is in the registered memory of one process. Non-blocking, close-on-exec.
///
/// Dropping the last copy (across all processes) of a descriptor unregisters everything: absent pages then read as
/// zeros. Keep one for as long as a page's bytes are elsewhere.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// A new descriptor for this process, before its [`handshake`](Self::handshake). Tries userfaultfd(2), then
    /// /dev/userfaultfd.
    pub fn open(mode: Mode) -> Result<Self, OpenError> {
        open::open(mode).map(Self)
    }

    /// What this kernel supports, asked with a descriptor made for that.
    pub fn supported() -> Result<ApiReply, ProbeError> {
        Ok(Self::open(Mode::UserOnly)?.handshake(Features::empty())?)
    }

    /// Agrees on the API version and on `features`, once per descriptor and before anything else.
    pub fn handshake(&self, features: Features) -> Result<ApiReply, HandshakeError> {
        let mut api = abi::Api { api: abi::UFFD_API, features: features.bits(), ioctls: 0 };
        // SAFETY: the handshake touches no memory but its argument.
        unsafe { self.call(&mut api) }.map_err(|errno| match errno {
            Errno::INVAL => HandshakeError::Refused { requested: features },
            Errno::PERM => HandshakeError::NotPermitted,
            errno => HandshakeError::Other(errno.into()),
        })?;
        Ok(ApiReply {
            features: Features::from_bits_retain(api.features),
            ioctls: Ioctls::from_bits_retain(api.ioctls),
        })
    }

    /// Registers a range: from now on touches of it fault as `mode` says. Returns the calls it supports.
    ///
    /// The proof must hold for as long as the registration, which lasts until [`unregister`](Self::unregister), the
    /// unmapping of the range, or the drop of the last copy of the descriptor.
    pub fn register(&self, range: UnborrowedRange<'_>, mode: RegisterMode) -> Result<Ioctls, RegisterError> {
        let range = range.range();
        let mut register =
            abi::Register { start: range.start().0, len: range.len().0, mode: mode.bits(), ioctls: 0 };
        // SAFETY: absent pages of the range may hold anything from now on; that no reference sees it is what the
        // `UnborrowedRange` proves.
        unsafe { self.call(&mut register) }.map_err(|errno| RegisterError::new(range, errno))?;
        Ok(Ioctls::from_bits_retain(register.ioctls))
    }

    /// Ends the registration of a range and wakes all who wait there. Absent pages read as zeros afterwards.
    pub fn unregister(&self, range: HvaRange) -> Result<(), RegisterError> {
        let mut request = abi::Unregister { start: range.start().0, len: range.len().0 };
        // SAFETY: see the module documentation: only pages made absent by calls that asked for a proof can change
        // what they read as.
        unsafe { self.call(&mut request) }.map_err(|errno| RegisterError::new(range, errno))
    }

    /// Installs a copy of `bytes` at `dst`; both the address and the length are multiples of the page size. Memory
    /// is allocated at once and charged to the memory cgroup of the process that owns `dst`.
    pub fn copy(&self, dst: Hva, bytes: &[u8], wake: Wake) -> Outcome {
        let len = bytes.len() as u64;
        let src = bytes.as_ptr().expose_provenance() as u64;
        let mut copy = abi::Copy { dst: dst.0, src, len, mode: wake.mode(), copied: 0 };
        // SAFETY: reads the `len` bytes at `src`, which `bytes` keeps alive, and writes only absent, registered
        // pages (module documentation).
        let status = unsafe { self.call(&mut copy) };
        Outcome::new(status, copy.copied, ByteCount(len))
    }

    /// Installs zeros. On anonymous memory this maps the shared zero page, and the owner's next write allocates a
    /// page without a fault that anyone sees: count such pages as used.
    pub fn zeropage(&self, range: HvaRange, wake: Wake) -> Outcome {
        let mut zero =
            abi::ZeroPage { start: range.start().0, len: range.len().0, mode: wake.mode(), zeroed: 0 };
        // SAFETY: writes only absent, registered pages (module documentation).
        let status = unsafe { self.call(&mut zero) };
        Outcome::new(status, zero.zeroed, range.len())
    }

    /// Lets the threads that wait in the range try again. A thread whose page is still absent faults anew.
    pub fn wake(&self, range: HvaRange) -> Result<(), Stop> {
        let mut request = abi::WakeUp { start: range.start().0, len: range.len().0 };
        // SAFETY: changes no memory.
        unsafe { self.call(&mut request) }.map_err(Stop::from)
    }

    /// Marks absent pages so that a touch is answered with SIGBUS (a machine check to a guest): better than wrong
    /// bytes. Wakes those who wait. The mark is no page: a later COPY replaces it, a discard removes it, and a page
    /// map shows the place as populated.
    pub fn poison(&self, range: HvaRange) -> Outcome {
        let mut poison = abi::Poison { start: range.start().0, len: range.len().0, mode: 0, updated: 0 };
        // SAFETY: changes only absent, registered pages (module documentation).
        let status = unsafe { self.call(&mut poison) };
        Outcome::new(status, poison.updated, range.len())
    }

    /// Protects a range registered with [`RegisterMode::WRITE_PROTECT`] against writes, or releases it. The kernel
    /// tells no progress: after a `Stop` some pages may be changed; repeating the call is harmless.
    pub fn write_protect(&self, range: HvaRange, protection: Protection) -> Result<(), Stop> {
        let mode = match protection {
            Protection::Protect => abi::WRITEPROTECT_MODE_WP,
            Protection::Release(Wake::Yes) => 0,
            Protection::Release(Wake::No) => abi::WRITEPROTECT_MODE_DONTWAKE,
        };
        let mut request = abi::WriteProtect { start: range.start().0, len: range.len().0, mode };
        // SAFETY: changes no bytes, only whether a write has to wait, in registered ranges.
        unsafe { self.call(&mut request) }.map_err(Stop::from)
    }

    /// Maps pages that are in the page cache already, after a minor fault.
    pub fn continue_(&self, range: HvaRange, wake: Wake) -> Outcome {
        let mut request =
            abi::Continue { start: range.start().0, len: range.len().0, mode: wake.mode(), mapped: 0 };
        // SAFETY: maps what the registered shared memory holds already (module documentation).
        let status = unsafe { self.call(&mut request) };
        Outcome::new(status, request.mapped, range.len())
    }

    /// Moves the pages of `src` to `dst` without copying: atomically for each page, it is either here or there. Only
    /// works in the process that made the descriptor, on private anonymous memory; `dst` must be absent and
    /// registered, `src` need not be. Whole huge pages move whole if both ends are aligned to one.
    ///
    /// Refuses ([`Stop::Busy`]) pages pinned for I/O, but does **not** see users who hold a page without pinning it
    /// (vmsplice, O_DIRECT on some network file systems): the caller keeps such I/O away from what it moves.
    pub fn move_pages(&self, dst: Hva, src: UnborrowedRange<'_>, mode: MoveMode) -> Outcome {
        let src = src.range();
        let holes = match mode.holes {
            Holes::Refuse => 0,
            Holes::Allow => abi::MOVE_MODE_ALLOW_SRC_HOLES,
        };
        let mut request = abi::Move {
            dst: dst.0,
            src: src.start().0,
            len: src.len().0,
            mode: mode.wake.mode() | holes,
            moved: 0,
        };
        // SAFETY: empties the source, into which no reference points (the proof), and fills only absent, registered
        // pages of the destination (module documentation).
        let status = unsafe { self.call(&mut request) };
        Outcome::new(status, request.moved, src.len())
    }

    /// Reads the events that wait, as many as the buffer has room for, in their order; none if there are none.
    ///
    /// What the caller does not take out of the returned iterator is dropped with it.
    pub fn read_events<'b>(&self, buffer: &'b mut EventBuffer) -> io::Result<Drain<'b, Event>> {
        let bytes = until_read(|| self.read_now(buffer.messages().as_mut_bytes()))?.unwrap_or(0);
        let read = bytes / size_of::<Message>();
        // SAFETY: the first `read` messages were written by the read above, from a descriptor that is known to be a
        // userfaultfd (`open` made it or `adopt` checked it), and are decoded here once.
        Ok(unsafe { buffer.decode(read) })
    }

    /// Like [`read_events`](Self::read_events), at most `most` of them, into memory that outlives this process: they stay in
    /// the journal until they are [forgotten](Journal::forget).
    pub fn read_journaled(&self, journal: &mut Journal, most: usize) -> io::Result<Vec<Event>> {
        let read = until_read(|| journal.read(&self.0, most))?.unwrap_or(0..0);
        // SAFETY: these messages were written by the read above, from a descriptor that is known to be a userfaultfd, and are
        // decoded here once: a journal's next reader leaves descriptors out.
        Ok(journal.messages(read).map(|message| unsafe { Event::decode(&message) }).collect())
    }

    /// Reads without waiting, whatever the descriptor's mode is now: O_NONBLOCK belongs to the open file, which whoever
    /// passed the descriptor shares and can change. Kernels that do not know RWF_NOWAIT here (before 6.8, which also
    /// lack MOVE) are trusted to have it as it was set.
    fn read_now(&self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let flags = ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.0, &mut [IoSliceMut::new(bytes)], u64::MAX, flags) {
            Err(Errno::OPNOTSUPP) => rustix::io::read(&self.0, bytes),
            result => result,
        }
    }

    /// Another descriptor for the same userfaultfd, for example to be kept by somebody who outlives this process.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// # Safety
    ///
    /// What the request does to memory beyond its own argument does not contradict any reference.
    unsafe fn call<T: Request>(&self, request: &mut T) -> Result<(), Errno> {
        // SAFETY: `Request` promises that the opcode and structure belong together; the descriptor is known to be a
        // userfaultfd; the effect on other memory is the caller's promise.
        unsafe { rustix::ioctl::ioctl(&self.0, Call(request)) }
    }
}

/// Reads until that succeeds; `None` when nothing waits.
fn until_read<T>(mut read: impl FnMut() -> Result<T, Errno>) -> io::Result<Option<T>> {
    loop {
        match read() {
            Ok(read) => return Ok(Some(read)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// An ioctl that reads and updates its structure in place, also when it fails: progress is reported that way.
struct Call<'a, T>(&'a mut T);

// SAFETY: `Request` promises that the kernel reads and writes exactly a `T` for this opcode. No output is read
// through the pointer; callers look at the structure itself, which the kernel's writes left valid.
unsafe impl<T: Request> Ioctl for Call<'_, T> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        T::OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

impl TryFrom<OwnedFd> for Userfaultfd {
    type Error = AdoptError;

    /// Takes a descriptor that came from elsewhere (SCM_RIGHTS, pidfd_getfd, a fork event) after checking that it is
    /// a userfaultfd, and makes it non-blocking and close-on-exec. The first is a property of the open file, so it
    /// becomes non-blocking for the sender, too.
    fn try_from(fd: OwnedFd) -> Result<Self, AdoptError> {
        open::adopt(fd).map(Self)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Userfaultfd> for OwnedFd {
    fn from(uffd: Userfaultfd) -> Self {
        uffd.0
    }
}
