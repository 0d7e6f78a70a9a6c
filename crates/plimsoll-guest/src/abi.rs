//! The contract between a guest program and whatever runs it: addresses, ports, and two kinds of page.
//!
//! What enters: a [`Params`] page that the VMM writes before the first vCPU starts, the `stop`, `window` and `balloon`
//! words of each [`Channel`] page, which it may write at any time, and the `command` in it. What leaves: the rest of
//! the channel page, which the guest writes and the VMM reads while that vCPU waits in a port exit. What must never happen: the
//! VMM believing a number found here. Everything a guest writes is an allegation of the guest.
//!
//! # Memory
//!
//! | guest physical address     | what                                                          |
//! |----------------------------|---------------------------------------------------------------|
//! | `0x1000`                   | [`Params`]                                                    |
//! | `0x2000 + vcpu * 0x1000`   | the vCPU's [`Channel`], at most [`MAX_VCPUS`] of them          |
//! | `0x4_0000`                 | the [`Listing`] of the balloon, which vCPU 0 serves           |
//! | `0x10_0000 .. 0x20_0000`   | page tables; the VMM's business, the guest never looks        |
//! | `0x20_0000 .. 0x40_0000`   | the image, `.bss` included                                    |
//! | `0x40_0000 + vcpu * 64 KiB`| the vCPU's stack, growing down from the end of its 64 KiB     |
//! | `0x60_0000 ..`             | workload memory, to the end of the regions, holes skipped     |
//!
//! Workload memory reads as zero at the start and is identity mapped, writable, with the layout of
//! [`crate::layout`]. Everything below it may be prefilled or demand-zero.
//!
//! # Start of a vCPU
//!
//! 64-bit user mode (CPL 3, IOPL 3), SSE2 usable (`CR4.OSFXSR`), `RDTSC` permitted (`CR4.TSD` clear),
//! interrupts never delivered: the image's code uses the red zone. `rip` is the ELF entry, `rdi` the vCPU's
//! index, `rsp` the top of its stack, [`stack_top`].
//!
//! # Ports
//!
//! Each is a dword `out` whose value is the vCPU's index; the VMM answers by resuming the vCPU.
//!
//! | port  | name            | the channel page holds            | the VMM                                          |
//! |-------|-----------------|-----------------------------------|--------------------------------------------------|
//! | 0x510 | [`PORT_REPORT`] | `report`                          | copies the report                                |
//! | 0x511 | [`PORT_DISCARD`]| `request_gpa`, `request_len`      | frees those whole pages; they read as zero after |
//! | 0x512 | [`PORT_DONE`]   | `report`, the last                | does not resume the vCPU                         |
//! | 0x513 | [`PORT_PANIC`]  | `message_len`, `message`          | does not resume the vCPU                         |
//! | 0x514 | [`PORT_IDLE`]   | `request_ns`                      | sleeps that long at most, then resumes           |
//! | 0x515 | [`PORT_COMMAND`]| `probed`, of the command before   | writes `command` when there is one, then resumes |
//! | 0x516 | [`PORT_BALLOON`]| nothing; the [`Listing`] counts   | drops the memory it lists, or stops counting it  |
//! | 0x517 | [`PORT_INSTALL`]| `request_gpa`, of a frame         | says in the frame's word that it may be touched  |
//!
//! All integers are little-endian. `usize` appears nowhere.
use crate::content::Mix;
use crate::probe::{ProbeCommand, Probed};
use crate::spec::WorkloadSpec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// Where the [`Params`] page lies.
pub const PARAMS_GPA: u64 = 0x1000;
/// Where the first vCPU's [`Channel`] page lies; the others follow, a page each.
pub const CHANNEL_GPA: u64 = 0x2000;
/// Where the [`Listing`] of the balloon lies.
pub const LISTING_GPA: u64 = 0x4_0000;
/// Where the VMM keeps page tables.
pub const PAGE_TABLES_GPA: u64 = 0x10_0000;
/// The first byte behind the room for page tables.
pub const PAGE_TABLES_END: u64 = 0x20_0000;
/// The first byte of the window the image is linked into.
pub const IMAGE_GPA: u64 = 0x20_0000;
/// The first byte behind the image's window.
pub const IMAGE_END: u64 = 0x40_0000;
/// Where the first vCPU's stack starts (its lowest byte).
pub const STACKS_GPA: u64 = 0x40_0000;
/// Bytes of each vCPU's stack.
pub const STACK_SIZE: u64 = 0x1_0000;
/// Where workload memory starts.
pub const WORKLOAD_GPA: u64 = 0x60_0000;

/// The most vCPUs a guest can have.
pub const MAX_VCPUS: u32 = 32;
/// The most regions of memory a guest can have.
pub const MAX_REGIONS: usize = 4;

/// The guest has written a report.
pub const PORT_REPORT: u16 = 0x510;
/// The guest gives memory back.
pub const PORT_DISCARD: u16 = 0x511;
/// The guest has finished; its report is final.
pub const PORT_DONE: u16 = 0x512;
/// The guest cannot go on; its channel page says why.
pub const PORT_PANIC: u16 = 0x513;
/// The guest has nothing to do for a while.
pub const PORT_IDLE: u16 = 0x514;
/// The guest has done what it was asked and waits to be asked for more.
pub const PORT_COMMAND: u16 = 0x515;
/// The balloon's listing is to be read.
pub const PORT_BALLOON: u16 = 0x516;
/// The guest wants to touch a frame that the host has the memory of.
pub const PORT_INSTALL: u16 = 0x517;

/// `"PLIMGST\0"` read as a little-endian number: the first word of a [`Params`] page.
pub const PARAMS_MAGIC: u64 = u64::from_le_bytes(*b"PLIMGST\0");
/// Changes whenever anything in this file, in [`crate::spec`], in [`crate::probe`], in
/// [`crate::frames`] or in [`Mix`] changes its meaning.
pub const ABI_VERSION: u32 = 3;

/// The guest goes on.
pub const STOP_NO: u64 = 0;
/// The guest ends after the operation at hand, and after its final check if it was asked for one.
pub const STOP_FINISH: u64 = 1;
/// The guest ends after the operation at hand, without a final check.
pub const STOP_NOW: u64 = 2;

/// The channel page of one vCPU.
pub const fn channel_gpa(vcpu: u32) -> u64 {
    CHANNEL_GPA + vcpu as u64 * PAGE_SIZE
}

/// What `rsp` holds when a vCPU starts: the first byte behind its stack, 16-byte aligned.
pub const fn stack_top(vcpu: u32) -> u64 {
    STACKS_GPA + (vcpu as u64 + 1) * STACK_SIZE
}

/// A range of guest physical memory.
///
/// ```text
///  0  gpa   first byte, page aligned
///  8  len   bytes, a multiple of the page size
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Region {
    /// The first byte.
    pub gpa: u64,
    /// How many bytes.
    pub len: u64,
}

/// What the VMM tells the guest before it starts.
///
/// ```text
///    0  magic           PARAMS_MAGIC
///    8  version         ABI_VERSION
///   12  vcpus           1 to MAX_VCPUS
///   16  tsc_hz          ticks of the guest's clock in a second, not 0
///   24  seed            the machine's own randomness
///   32  pool_seed       what the duplicate pages of all guests that may share are made from
///   40  pool_pages      distinct pages in that pool, not 0
///   48  region_count    1 to MAX_REGIONS
///   52  reserved        0
///   56  regions         4 x Region, ascending, disjoint; all of RAM, what lies below WORKLOAD_GPA included
///  120  mix             Mix, 16 bytes
///  136  workload        WorkloadSpec, 96 bytes
///  232  end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Params {
    /// [`PARAMS_MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub version: u32,
    /// How many vCPUs share the work.
    pub vcpus: u32,
    /// Ticks of the guest's clock in a second.
    pub tsc_hz: u64,
    /// The machine's own randomness.
    pub seed: u64,
    /// The randomness of the pool of duplicate pages, equal in all guests that shall have pages in common.
    pub pool_seed: u64,
    /// Distinct pages in the pool of duplicates.
    pub pool_pages: u64,
    /// How many of `regions` count.
    pub region_count: u32,
    /// Zero.
    pub reserved: u32,
    /// The guest's memory, ascending.
    pub regions: [Region; MAX_REGIONS],
    /// What pages contain.
    pub mix: Mix,
    /// What the guest does.
    pub workload: WorkloadSpec,
}

/// A word that was not what it should have been.
///
/// ```text
///  0  gpa        address of the word
///  8  expected   what it should hold
/// 16  found      what it held
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WrongWord {
    /// Address of the word.
    pub gpa: u64,
    /// What it should hold.
    pub expected: u64,
    /// What it held.
    pub found: u64,
}

/// How many wrong words a report describes; all are counted.
pub const WRONG_KEPT: usize = 16;
/// Buckets of the latency histogram, see [`latency_bucket`].
pub const LATENCY_BUCKETS: usize = 256;

/// What a vCPU is doing, as kept in [`Report::phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Writing each page for the first time.
    Populating = 1,
    /// Running the workload.
    Running = 2,
    /// Reading every page once more, at the end.
    Checking = 3,
    /// Finished.
    Done = 4,
}

impl Phase {
    /// The phase a report alleges, or `None` if there is no such phase.
    pub const fn from_wire(phase: u32) -> Option<Self> {
        match phase {
            1 => Some(Self::Populating),
            2 => Some(Self::Running),
            3 => Some(Self::Checking),
            4 => Some(Self::Done),
            _ => None,
        }
    }
}

/// What one vCPU has done so far. Counts never go back.
///
/// ```text
///    0  sequence           reports of this vCPU so far, this one included
///    8  phase              Phase
///   12  vcpu               its index
///   16  now_ticks          its clock when the report was written
///   24  running_ticks      its clock when population ended, 0 before
///   32  operations         gets and puts since population ended
///   40  puts               those of them that wrote
///   48  footprint_pages    pages this vCPU owns
///   56  populated_pages    pages of them written for the first time so far
///   64  checked_pages      pages read in the final check so far
///   72  discarded_pages    pages given back, each time counted
///   80  verified_pages     whole pages compared with what they should contain
///   88  wrong_words        words found wrong
///   96  wrong_pages        pages in which they lay, each time counted
///  104  window             the last window that is complete, 0 if none
///  112  window_pages       distinct pages touched in it
///  120  latency_max_ticks  the slowest operation
///  128  wrong              16 x WrongWord, the first found
///  512  latency            256 x u32, operations by latency_bucket, each stops at its largest value
/// 1536  end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Report {
    /// Reports of this vCPU so far, this one included.
    pub sequence: u64,
    /// [`Phase`].
    pub phase: u32,
    /// Index of the vCPU.
    pub vcpu: u32,
    /// The guest's clock when the report was written.
    pub now_ticks: u64,
    /// The guest's clock when population ended, 0 before.
    pub running_ticks: u64,
    /// Gets and puts since population ended.
    pub operations: u64,
    /// Those of the operations that wrote.
    pub puts: u64,
    /// Pages this vCPU owns.
    pub footprint_pages: u64,
    /// Pages written for the first time so far.
    pub populated_pages: u64,
    /// Pages read in the final check so far.
    pub checked_pages: u64,
    /// Pages given back, each time counted.
    pub discarded_pages: u64,
    /// Whole pages compared with what they should contain.
    pub verified_pages: u64,
    /// Words found wrong.
    pub wrong_words: u64,
    /// Pages in which wrong words lay, each time counted.
    pub wrong_pages: u64,
    /// The last window that is complete, 0 if none is.
    pub window: u64,
    /// Distinct pages touched in that window: the vCPU's part of the true working set.
    pub window_pages: u64,
    /// The slowest operation.
    pub latency_max_ticks: u64,
    /// The first wrong words found; `min(wrong_words, 16)` of them count.
    pub wrong: [WrongWord; WRONG_KEPT],
    /// Operations by [`latency_bucket`] of the ticks they took.
    pub latency: [u32; LATENCY_BUCKETS],
}

impl Report {
    /// A report in which nothing has happened yet.
    pub const EMPTY: Self = Self {
        sequence: 0,
        phase: Phase::Populating as u32,
        vcpu: 0,
        now_ticks: 0,
        running_ticks: 0,
        operations: 0,
        puts: 0,
        footprint_pages: 0,
        populated_pages: 0,
        checked_pages: 0,
        discarded_pages: 0,
        verified_pages: 0,
        wrong_words: 0,
        wrong_pages: 0,
        window: 0,
        window_pages: 0,
        latency_max_ticks: 0,
        wrong: [WrongWord { gpa: 0, expected: 0, found: 0 }; WRONG_KEPT],
        latency: [0; LATENCY_BUCKETS],
    };
}

/// Bytes of a message that fit in a channel page.
pub const MESSAGE_SIZE: usize = 256;

/// Where in a channel page the command for a probing guest lies.
pub const COMMAND_OFFSET: u64 = 2048;

/// What one vCPU and the VMM say to each other.
///
/// ```text
///    0  stop          VMM: STOP_NO, STOP_FINISH or STOP_NOW
///    8  window        VMM: number of the window that runs now; a change ends the one before
///   16  balloon       VMM: BalloonTarget; vCPU 0's alone is looked at
///   24  reserved      0
///   64  request_gpa   guest: DISCARD, first byte, page aligned; INSTALL, first byte of the frame
///   72  request_len   guest: DISCARD, bytes, a multiple of the page size
///   80  request_ns    guest: IDLE, how long
///   88  message_len   guest: PANIC, bytes of `message` that count
///   96  message       guest: PANIC, UTF-8
///  352  reserved      0
///  512  report        guest: Report
/// 2048  command       VMM: COMMAND, ProbeCommand, 64 bytes
/// 2112  probed        guest: COMMAND, Probed
/// 4096  end
/// ```
///
/// `command` is written while the vCPU waits in its port exit. The three words that the VMM may write at any time lie in a
/// cache line of their own. Each is one aligned 8-byte store and one
/// aligned 8-byte load: neither side ever sees half a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Channel {
    /// Whether the guest shall end.
    pub stop: u64,
    /// Number of the window that runs now.
    pub window: u64,
    /// [`BalloonTarget`].
    pub balloon: u64,
    /// Zero.
    pub reserved_vmm: [u64; 5],
    /// First byte of what the guest gives back.
    pub request_gpa: u64,
    /// Bytes the guest gives back.
    pub request_len: u64,
    /// How long the guest wants to sleep.
    pub request_ns: u64,
    /// Bytes of `message` that count.
    pub message_len: u64,
    /// Why the guest cannot go on.
    pub message: [u8; MESSAGE_SIZE],
    /// Zero.
    pub reserved_guest: [u64; 20],
    /// What the vCPU has done so far.
    pub report: Report,
    /// What a probing guest shall do next.
    pub command: ProbeCommand,
    /// What became of what it did last.
    pub probed: Probed,
}

/// Where in a channel page the balloon's target lies.
pub const BALLOON_OFFSET: u64 = 16;

/// How much memory the balloon shall have, and in what pieces it is to be taken.
///
/// ```text
///  0..46  pages of 4 KiB
///     46  scattered: each page from another frame than the one before
///     47  0: page by page, 1: frame by frame
/// 48..64  counts the targets from 1, so that each is answered, the same one too; 0: there was none yet
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonTarget(pub u64);

/// The order in which a balloon finds free pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finds {
    /// One after the other, as in a guest whose free memory is not fragmented.
    InOrder,
    /// Each in another frame than the one before, as in one whose free memory is.
    Scattered,
}

/// The pieces in which a balloon takes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Piece {
    /// Pages of 4 KiB.
    Page = 0,
    /// Frames of 2 MiB.
    Frame = 1,
}

impl Piece {
    /// The piece of this number, or `None` if there is none.
    pub const fn from_wire(piece: u32) -> Option<Self> {
        match piece {
            0 => Some(Self::Page),
            1 => Some(Self::Frame),
            _ => None,
        }
    }

    /// Its size in pages.
    pub const fn pages(self) -> u64 {
        match self {
            Self::Page => 1,
            Self::Frame => crate::frames::FRAME_PAGES,
        }
    }
}

impl BalloonTarget {
    /// The most pages a target can name.
    pub const PAGES_MAX: u64 = (1 << 46) - 1;

    /// The target after this one; more pages than there can be are all of them.
    #[must_use]
    pub const fn next(self, pages: u64, piece: Piece, finds: Finds) -> Self {
        // 0 stays the number of no target.
        let number = if self.0 >> 48 == 0xffff { 1 } else { (self.0 >> 48) + 1 };
        let pages = if pages > Self::PAGES_MAX { Self::PAGES_MAX } else { pages };
        Self(pages | (finds as u64) << 46 | (piece as u64) << 47 | number << 48)
    }

    /// Pages that the balloon shall have.
    pub const fn pages(self) -> u64 {
        self.0 & Self::PAGES_MAX
    }

    /// Where it finds more.
    pub const fn finds(self) -> Finds {
        if self.0 >> 46 & 1 == 0 { Finds::InOrder } else { Finds::Scattered }
    }

    /// In what pieces it takes more.
    pub const fn piece(self) -> Piece {
        if self.0 >> 47 & 1 == 0 { Piece::Page } else { Piece::Frame }
    }
}

/// How many pieces a listing has room for: as many pages as virtio-balloon's driver lists at once.
pub const LISTED_MAX: usize = 256;

/// What a listing is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Listed {
    /// Pieces that the guest gives and will not touch.
    Given = 1,
    /// Pieces that it is about to use again. Told before they are.
    WantedBack = 2,
    /// Nothing: the target is reached, or the guest has no more to give.
    Settled = 3,
}

impl Listed {
    /// What has this number, or `None` if nothing has.
    pub const fn from_wire(what: u32) -> Option<Self> {
        match what {
            1 => Some(Self::Given),
            2 => Some(Self::WantedBack),
            3 => Some(Self::Settled),
            _ => None,
        }
    }
}

/// What the balloon gives or wants back, listed by vCPU 0 as virtio-balloon lists it.
///
/// ```text
///    0  what      Listed
///    4  piece     Piece
///    8  count     entries of `pages` that count, at most 256
///   12  reserved  0
///   16  pages     256 x u32, each piece's first page: guest physical address / 4096
/// 1040  end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Listing {
    /// [`Listed`].
    pub what: u32,
    /// [`Piece`].
    pub piece: u32,
    /// Entries that count.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
    /// The first page of each piece.
    pub pages: [u32; LISTED_MAX],
}

impl Listing {
    /// A listing of nothing yet.
    pub const fn new(what: Listed, piece: Piece) -> Self {
        Self { what: what as u32, piece: piece as u32, count: 0, reserved: 0, pages: [0; LISTED_MAX] }
    }

    /// Lists a piece; what does not fit is not listed.
    pub fn push(&mut self, page: u32) {
        if let Some(place) = self.pages.get_mut(self.count as usize) {
            *place = page;
            self.count += 1;
        }
    }

    /// Whether there is no room for more.
    pub const fn is_full(&self) -> bool {
        self.count as usize == LISTED_MAX
    }
}

/// The bucket of the latency histogram for an operation that took `ticks`.
///
/// Four buckets to each power of two: bucket `4 * e + s` holds the ticks whose highest set bit is bit `e` and
/// whose next two bits are `s`. Below 4 ticks there are fewer than two such bits and the missing ones count
/// as 0.
pub const fn latency_bucket(ticks: u64) -> usize {
    if ticks == 0 {
        return 0;
    }
    let exponent = ticks.ilog2();
    let sub = if exponent >= 2 { ticks >> (exponent - 2) } else { ticks << (2 - exponent) } & 3;
    exponent as usize * 4 + (sub & 3) as usize
}

/// The fewest ticks that fall into a bucket: `latency_bucket(latency_floor(b)) == b` for buckets from 8 on.
pub const fn latency_floor(bucket: usize) -> u64 {
    let (exponent, sub) = (bucket / 4, (bucket % 4) as u64);
    if exponent >= 64 {
        return u64::MAX;
    }
    let mantissa = 4 + sub;
    if exponent >= 2 { mantissa << (exponent - 2) } else { mantissa >> (2 - exponent) }
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(offset_of!(Params, tsc_hz) == 16);
    assert!(offset_of!(Params, regions) == 56);
    assert!(offset_of!(Params, mix) == 120);
    assert!(offset_of!(Params, workload) == 136);
    assert!(size_of::<Mix>() == 16 && size_of::<WorkloadSpec>() == 96);
    assert!(size_of::<Params>() == 232);
    assert!(offset_of!(Report, running_ticks) == 24);
    assert!(offset_of!(Report, latency_max_ticks) == 120);
    assert!(offset_of!(Report, wrong) == 128);
    assert!(offset_of!(Report, latency) == 512);
    assert!(size_of::<Report>() == 1536);
    assert!(offset_of!(Channel, request_gpa) == 64);
    assert!(offset_of!(Channel, message) == 96);
    assert!(offset_of!(Channel, report) == 512);
    assert!(offset_of!(Channel, command) as u64 == COMMAND_OFFSET);
    assert!(size_of::<ProbeCommand>() == 64 && offset_of!(Probed, latency) == 64);
    assert!(size_of::<Channel>() as u64 == PAGE_SIZE);
    assert!(offset_of!(Channel, balloon) as u64 == BALLOON_OFFSET);
    assert!(offset_of!(Listing, pages) == 16 && size_of::<Listing>() == 1040);
    assert!(channel_gpa(MAX_VCPUS) <= LISTING_GPA && LISTING_GPA + PAGE_SIZE <= PAGE_TABLES_GPA);
    assert!(PAGE_TABLES_END <= IMAGE_GPA && IMAGE_END <= STACKS_GPA);
    assert!(stack_top(MAX_VCPUS - 1) == WORKLOAD_GPA);
    assert!(latency_bucket(u64::MAX) == LATENCY_BUCKETS - 1);
};
