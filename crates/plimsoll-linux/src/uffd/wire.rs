//! The hand-over protocol, version 3: how a VMM gives the memory of one machine to a manager.
//!
//! Enters: datagrams of a `SOCK_SEQPACKET` Unix socket, written by a VMM that may be hostile. Leaves: values whose
//! every field has been checked, or a [`WireError`] that says what was found. Nothing here does I/O.
//!
//! A large machine is handed over in *shards*: parts of its guest physical memory, each with descriptors, an airlock and
//! an agent of its own. Most machines have one. A machine is taken with all its shards or not at all.
//!
//! One socket serves one shard for its whole life. All shards are handed over on the first one's; the others' are made by
//! the manager, so that the VMM never holds the manager's end of any, and come with the `Welcome`. All integers are
//! little endian; one message is one datagram, so there is no framing and a short datagram is an error, never a wait.
//!
//! ```text
//! VMM                                     manager
//!  | Hello + regions, fds [ram, airlock]    |    once for each shard, in the order of their guest addresses
//!  |--------------------------------------->|
//!  |  Welcome, fds [socket of shard 1, ...] |    accepted: vCPUs may start; refused: says why, no fds, socket closes
//!  |<---------------------------------------|
//!  |                  Request (op, items)   |    on each shard's socket: the manager drives its agent from here on
//!  |<---------------------------------------|
//!  | Reply (same sequence, one outcome/item)|    in order, exactly one per request
//!  |--------------------------------------->|
//! ```
//!
//! A manager that gives a machine back says so with a `Welcome` of that status on each shard's socket, when all of it is
//! unregistered, and closes the socket.
//!
//! The agent answers every request in the order received and does nothing of its own accord. A request carries the
//! manager's *epoch*. `SetEpoch` raises it; because the socket is ordered, the answer to `SetEpoch` proves that
//! everything queued by an earlier manager has been done or refused, and from then on the agent refuses every item of
//! an older epoch (`StaleEpoch`). Pages are named by index within the shard, never by address, so the agent can check
//! each against what it handed over. The agent holds its pin lock while it moves pages and stops at a pinned one, so that
//! a page is never moved under a device.
//!
//! ```text
//! Hello    0 magic u64 | 8 version u32 | 12 page size u32 | 16 uffd features u64 | 24 airlock base u64
//!          32 airlock slots u32 | 36 regions u32 | 40 shard u32 | 44 shards u32 | 48 name [u8; 32]   = 80 bytes
//! Region   0 gpa u64 | 8 hva u64 | 16 bytes u64                                          = 24 bytes, follows Hello
//! Welcome  0 magic u64 | 8 version u32 | 12 status u32 | 16 epoch u64 | 24 machine u32 | 28 zero u32
//!          32 reason [u8; 96]                                                                       = 128 bytes
//! Header   0 epoch u64 | 8 sequence u32 | 12 op u32 | 16 items u32 | 20 zero u32  = 24 bytes, Request and Reply
//! Item     0 page u32 | 4 slot page u32 | 8 pages u32                               = 12 bytes, follows a Request
//! Outcome  0 pages done u32 | 4 stop u16 | 6 errno, or pages given, u16               = 8 bytes, follows a Reply
//! ```
use plimsoll_core::layout::{GuestLayout, LayoutError, Region};
use plimsoll_core::word::Gift;
use plimsoll_sys::uffd::Features;
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, Gpa, Hva, PAGE_SIZE, PageIndex, SlotPage};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The first eight bytes of a `Hello` and of a `Welcome`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PLIMSOLL");
/// The protocol version this build speaks.
pub const VERSION: u32 = 3;
/// Most regions a shard may have.
pub const REGIONS_MAX: usize = 64;
/// Most shards a machine may have.
pub const SHARDS_MAX: u32 = 64;
/// Most items in one request: a block of single pages.
pub const ITEMS_MAX: usize = 512;
/// What the RAM descriptor must have been opened with: without events a discarded page would come back, without MOVE
/// nothing can be taken, without POISON a damaged page could not be told from a good one.
pub const FEATURES_NEEDED: u64 =
    Features::EVENT_REMOVE.union(Features::EVENT_UNMAP).union(Features::MOVE).union(Features::POISON).bits();
/// Bytes of a `Welcome`.
pub const WELCOME_SIZE: usize = 128;
/// An airlock of this many pages is accepted from the smallest machine, too.
const AIRLOCK_PAGES_ALWAYS: u64 = 16 * BLOCK_PAGES as u64;
/// The largest datagram either side sends, and so the size of a receive buffer.
pub const DATAGRAM_MAX: usize = size_of::<Header>() + ITEMS_MAX * size_of::<Item>();

/// The fixed part of the message that opens a hand-over.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHello {
    magic: u64,
    version: u32,
    page_size: u32,
    features: u64,
    airlock_base: u64,
    airlock_slots: u32,
    regions: u32,
    shard: u32,
    shards: u32,
    name: [u8; 32],
}
const _: () = assert!(size_of::<RawHello>() == 80);

/// One contiguous piece of guest RAM as the VMM maps it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRegion {
    gpa: u64,
    hva: u64,
    bytes: u64,
}
const _: () = assert!(size_of::<RawRegion>() == 24);

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawWelcome {
    magic: u64,
    version: u32,
    status: u32,
    epoch: u64,
    machine: u32,
    zero: u32,
    reason: [u8; 96],
}
const _: () = assert!(size_of::<RawWelcome>() == WELCOME_SIZE);

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    epoch: u64,
    sequence: u32,
    op: u32,
    items: u32,
    zero: u32,
}
const _: () = assert!(size_of::<Header>() == 24);

/// A run of pages an operation is about. Operations that need no airlock page ignore `slot`, and the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Item {
    page: u32,
    slot: u32,
    /// How many pages, one after the other on both sides.
    pub pages: u32,
}
const _: () = assert!(size_of::<Item>() == 12);

impl Item {
    /// A run of `pages` guest pages from `page` and airlock pages from `slot`.
    pub const fn new(page: PageIndex, slot: SlotPage, pages: u32) -> Self {
        Self { page: page.0, slot: slot.0, pages }
    }

    /// The first guest page.
    pub const fn page(&self) -> PageIndex {
        PageIndex(self.page)
    }

    /// The first airlock page.
    pub const fn slot(&self) -> SlotPage {
        SlotPage(self.slot)
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawOutcome {
    done: u32,
    stop: u16,
    errno: u16,
}
const _: () = assert!(size_of::<RawOutcome>() == 8);

/// What the manager asks the agent to do with each item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Adopt the header's epoch and refuse older ones from now on. No items.
    SetEpoch = 1,
    /// `UFFDIO_MOVE` guest pages into airlock pages. Stops at the first page that is absent or cannot be moved.
    MoveOut = 2,
    /// `UFFDIO_MOVE` airlock pages back to guest pages and wake whoever waits for them.
    MoveIn = 3,
    /// `MADV_DONTNEED` airlock pages.
    Zap = 4,
    /// `MADV_POPULATE_WRITE` guest pages that are present, to break what makes them immovable (copy-on-write).
    Populate = 5,
    /// Register guest pages: from here on absent ones are the manager's to bring.
    Watch = 6,
    /// Unregister guest pages and wake whoever waits there: from here on absent ones are the kernel's to bring, as zeros.
    Unwatch = 7,
    /// How guest pages were given back. Stops at the first of which the VMM knows, with [`Stop::Given`].
    Gifts = 8,
}

impl Op {
    fn from_code(code: u32) -> Option<Self> {
        const ALL: [Op; 8] =
            [Op::SetEpoch, Op::MoveOut, Op::MoveIn, Op::Zap, Op::Populate, Op::Watch, Op::Unwatch, Op::Gifts];
        ALL.into_iter().find(|op| *op as u32 == code)
    }
}

/// Why an item stopped before all its pages were done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An event is waiting to be read on the descriptor; nothing is wrong, try again after reading it.
    Again,
    /// The next page is not there: discarded, or never touched.
    Missing,
    /// The destination of the next page is occupied.
    Exists,
    /// The kernel refused to move the next page (`EBUSY`): something holds a reference to it.
    Busy,
    /// The VMM's own pin table holds the next page for a device.
    Pinned,
    /// The request is older than the epoch the agent has adopted.
    StaleEpoch,
    /// The item names pages outside what was handed over, or crosses a region.
    Invalid,
    /// The next pages, so many, were given back in this way.
    Given {
        /// How.
        gift: Gift,
        /// How many.
        pages: u16,
    },
    /// Any other error of the system call.
    Failed {
        /// The error number.
        errno: u16,
    },
}

impl Stop {
    fn to_codes(stop: Option<Self>) -> (u16, u16) {
        match stop {
            None => (0, 0),
            Some(Self::Again) => (1, 0),
            Some(Self::Missing) => (2, 0),
            Some(Self::Exists) => (3, 0),
            Some(Self::Busy) => (4, 0),
            Some(Self::Pinned) => (5, 0),
            Some(Self::StaleEpoch) => (6, 0),
            Some(Self::Invalid) => (7, 0),
            Some(Self::Failed { errno }) => (8, errno),
            Some(Self::Given { gift: Gift::Reported, pages }) => (9, pages),
            Some(Self::Given { gift: Gift::Hinted, pages }) => (10, pages),
            Some(Self::Given { gift: Gift::Ballooned, pages }) => (11, pages),
        }
    }

    fn from_codes(code: u16, errno: u16) -> Result<Option<Self>, WireError> {
        Ok(Some(match code {
            0 => return Ok(None),
            1 => Self::Again,
            2 => Self::Missing,
            3 => Self::Exists,
            4 => Self::Busy,
            5 => Self::Pinned,
            6 => Self::StaleEpoch,
            7 => Self::Invalid,
            8 => Self::Failed { errno },
            9 => Self::Given { gift: Gift::Reported, pages: errno },
            10 => Self::Given { gift: Gift::Hinted, pages: errno },
            11 => Self::Given { gift: Gift::Ballooned, pages: errno },
            _ => return Err(WireError::UnknownStop { code }),
        }))
    }
}

/// What became of one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Outcome {
    /// Pages done, from the item's first.
    pub done: u32,
    /// Why it went no further; `None` means all of it was done.
    pub stop: Option<Stop>,
}

/// A message that cannot be accepted. The sender is at fault unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The datagram is shorter or longer than its own counts say.
    #[error("the message has {found} bytes where {expected} were expected")]
    Length {
        /// Bytes received.
        found: usize,
        /// Bytes the header calls for.
        expected: usize,
    },
    /// The first bytes are not [`MAGIC`].
    #[error(
        "the message does not start with the hand-over magic (found {found:#x}); is the peer a plimsoll VMM?"
    )]
    Magic {
        /// What stood there.
        found: u64,
    },
    /// The peer speaks another version.
    #[error("the peer speaks hand-over version {found}, this build speaks {VERSION}; use matching builds")]
    Version {
        /// The peer's version.
        found: u32,
    },
    /// The peer's pages are not 4 KiB.
    #[error("the peer's page size is {found} bytes; only 4096 is supported")]
    PageSize {
        /// The peer's page size.
        found: u32,
    },
    /// No region, or more than [`REGIONS_MAX`].
    #[error("the machine has {found} memory regions; between 1 and {REGIONS_MAX} are supported")]
    RegionCount {
        /// Regions announced.
        found: u32,
    },
    /// A region or the airlock is empty, unaligned or does not fit into an address space.
    #[error("the range of {bytes} bytes at {hva} is empty, unaligned or wraps around")]
    BadRange {
        /// Where it starts.
        hva: Hva,
        /// How long it claims to be.
        bytes: ByteCount,
    },
    /// Two host ranges overlap: a page would have two owners.
    #[error("the host ranges at {first} and {second} overlap")]
    Overlap {
        /// The lower range.
        first: Hva,
        /// The upper range.
        second: Hva,
    },
    /// The guest physical layout is not acceptable.
    #[error("the guest physical layout is not acceptable")]
    Layout(#[source] LayoutError),
    /// The airlock is larger than the machine could ever fill.
    #[error("an airlock of {slots} slots of 2 MiB is larger than the machine's memory")]
    Airlock {
        /// Slots announced.
        slots: u32,
    },
    /// The RAM descriptor lacks features without which bytes would be lost.
    #[error(
        "the machine's userfaultfd lacks features {missing:#x} (events of discards and unmaps, move, poison)"
    )]
    Features {
        /// Bits of `UFFD_FEATURE_*` that are needed and not there.
        missing: u64,
    },
    /// The wrong number of descriptors came along.
    #[error("{found} descriptors came with the message where {expected} were expected")]
    Descriptors {
        /// Descriptors received.
        found: usize,
        /// Descriptors the message calls for.
        expected: usize,
    },
    /// The name is not UTF-8 or holds control characters.
    #[error("the machine's name is not printable UTF-8")]
    Name,
    /// A shard that cannot be.
    #[error("shard {shard} of {shards} cannot be; between 1 and {SHARDS_MAX} are supported, counted from 0")]
    Shard {
        /// Which it claims to be.
        shard: u32,
        /// Of how many.
        shards: u32,
    },
    /// Another shard than the one that comes next.
    #[error("shard {shard} of {shards} was handed over as {name:?} where shard {due} of {of} was due")]
    WrongShard {
        /// Which it claims to be.
        shard: u32,
        /// Of how many.
        shards: u32,
        /// Of which machine.
        name: String,
        /// Which was due.
        due: u32,
        /// Of how many, as the first one said.
        of: u32,
    },
    /// The operation is not known.
    #[error("operation {code} is not known")]
    UnknownOp {
        /// Its code.
        code: u32,
    },
    /// A reply holds a stop reason that is not known.
    #[error("stop reason {code} is not known")]
    UnknownStop {
        /// Its code.
        code: u16,
    },
    /// More items than a request may have.
    #[error("the message announces {found} items; at most {ITEMS_MAX} are allowed")]
    TooManyItems {
        /// Items announced.
        found: u32,
    },
    /// An answer does not belong to the question.
    #[error("the reply is to request {found}, not to {expected}")]
    OutOfStep {
        /// The sequence number in the reply.
        found: u32,
        /// The sequence number asked.
        expected: u32,
    },
    /// An answer claims more pages than were asked for.
    #[error("the reply claims {found} pages done of an item of {asked}")]
    Overdone {
        /// Pages claimed.
        found: u32,
        /// Pages asked.
        asked: u32,
    },
    /// The manager refused the machine, for this reason.
    #[error("the manager refused the machine: {reason}")]
    Refused {
        /// The manager's words.
        reason: String,
    },
}

/// A shard of a machine as handed over: every range page aligned, non-empty, inside the address space, overlapping no
/// other of the shard's. Of several shards together [`super::handover`] says the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the operator calls the machine.
    pub name: String,
    /// Which shard of the machine this is, less than `shards`.
    pub shard: u32,
    /// How many it has, at least 1 and at most [`SHARDS_MAX`].
    pub shards: u32,
    /// Guest physical layout; regions in ascending order, page indices dense.
    pub layout: GuestLayout,
    /// Where each region of `layout` is mapped in the VMM, in the same order.
    pub hvas: Vec<Hva>,
    /// The airlock's base, aligned to a block.
    pub airlock_base: Hva,
    /// The airlock's size in slots of one block.
    pub airlock_slots: u32,
    /// The features the RAM descriptor was opened with (`UFFD_FEATURE_*`).
    pub features: u64,
}

/// The manager's answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Welcome {
    /// The machine is managed from now on; its vCPUs may start.
    Accepted {
        /// The machine's identity under this manager.
        machine: u32,
        /// The first epoch.
        epoch: u64,
    },
    /// The machine is not taken.
    Refused {
        /// Why, for the operator.
        reason: String,
    },
    /// To an agent: the machine is its VMM's alone from now on.
    GivenBack,
}

fn fixed_text<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let mut end = text.len().min(N);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
    bytes
}

fn text_of(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = std::str::from_utf8(&bytes[..end]).ok()?;
    (!text.chars().any(char::is_control)).then(|| text.to_owned())
}

/// A count as it is sent. One that does not fit is refused by the receiver, which allows far fewer.
fn count(items: usize) -> u32 {
    u32::try_from(items).unwrap_or(u32::MAX)
}

fn check_range(hva: Hva, bytes: ByteCount, alignment: usize) -> Result<(), WireError> {
    let aligned = hva.0.is_multiple_of(alignment as u64) && bytes.is_multiple_of(alignment);
    // The upper half of the address space is the kernel's; a range that reaches it is a lie.
    let fits = hva.checked_add(bytes.0).is_some_and(|end| end.0 <= 1 << 47);
    if aligned && fits && bytes.0 > 0 && hva.0 > 0 { Ok(()) } else { Err(WireError::BadRange { hva, bytes }) }
}

/// Checks that no two ranges, each of which fits into the address space, have a byte in common.
pub(super) fn check_apart(mut ranges: Vec<(Hva, ByteCount)>) -> Result<(), WireError> {
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].0.0 + pair[0].1.0 > pair[1].0.0) {
        Some(pair) => Err(WireError::Overlap { first: pair[0].0, second: pair[1].0 }),
        None => Ok(()),
    }
}

impl Hello {
    /// Bytes of the airlock.
    pub fn airlock_bytes(&self) -> ByteCount {
        ByteCount(u64::from(self.airlock_slots) * BLOCK_SIZE as u64)
    }

    /// The message as sent, to go with the descriptors `[ram, airlock]`.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawHello {
            magic: MAGIC,
            version: VERSION,
            page_size: count(PAGE_SIZE),
            features: self.features,
            airlock_base: self.airlock_base.0,
            airlock_slots: self.airlock_slots,
            regions: count(self.hvas.len()),
            shard: self.shard,
            shards: self.shards,
            name: fixed_text(&self.name),
        };
        let mut bytes = raw.as_bytes().to_vec();
        for (region, hva) in self.layout.regions().iter().zip(&self.hvas) {
            let raw = RawRegion { gpa: region.start.0, hva: hva.0, bytes: region.bytes.0 };
            bytes.extend_from_slice(raw.as_bytes());
        }
        bytes
    }

    /// Checks a message from a VMM that is not trusted, and the number of descriptors that came with it.
    ///
    /// # Errors
    /// Any [`WireError`] about what the VMM claims.
    pub fn decode(bytes: &[u8], descriptors: usize) -> Result<Self, WireError> {
        let short = |expected| WireError::Length { found: bytes.len(), expected };
        let (raw, rest) = RawHello::read_from_prefix(bytes).map_err(|_| short(size_of::<RawHello>()))?;
        if raw.magic != MAGIC {
            return Err(WireError::Magic { found: raw.magic });
        }
        if raw.version != VERSION {
            return Err(WireError::Version { found: raw.version });
        }
        if raw.page_size as usize != PAGE_SIZE {
            return Err(WireError::PageSize { found: raw.page_size });
        }
        let count = raw.regions as usize;
        if count == 0 || count > REGIONS_MAX {
            return Err(WireError::RegionCount { found: raw.regions });
        }
        let expected = size_of::<RawHello>() + count * size_of::<RawRegion>();
        let (regions, tail) =
            <[RawRegion]>::ref_from_prefix_with_elems(rest, count).map_err(|_| short(expected))?;
        if !tail.is_empty() {
            return Err(short(expected));
        }
        if descriptors != 2 {
            return Err(WireError::Descriptors { found: descriptors, expected: 2 });
        }
        if raw.shards > SHARDS_MAX || raw.shard >= raw.shards {
            return Err(WireError::Shard { shard: raw.shard, shards: raw.shards });
        }
        let missing = FEATURES_NEEDED & !raw.features;
        if missing != 0 {
            return Err(WireError::Features { missing });
        }
        let airlock = (Hva(raw.airlock_base), ByteCount(u64::from(raw.airlock_slots) * BLOCK_SIZE as u64));
        check_range(airlock.0, airlock.1, BLOCK_SIZE)?;
        let mut ranges = vec![airlock];
        for region in regions {
            let range = (Hva(region.hva), ByteCount(region.bytes));
            check_range(range.0, range.1, PAGE_SIZE)?;
            ranges.push(range);
        }
        check_apart(ranges)?;
        let layout = GuestLayout::new(
            regions.iter().map(|raw| Region { start: Gpa(raw.gpa), bytes: ByteCount(raw.bytes) }).collect(),
        )
        .map_err(WireError::Layout)?;
        if u64::from(raw.airlock_slots) * u64::from(BLOCK_PAGES) > layout.pages().0.max(AIRLOCK_PAGES_ALWAYS)
        {
            return Err(WireError::Airlock { slots: raw.airlock_slots });
        }
        Ok(Self {
            name: text_of(&raw.name).ok_or(WireError::Name)?,
            shard: raw.shard,
            shards: raw.shards,
            layout,
            hvas: regions.iter().map(|raw| Hva(raw.hva)).collect(),
            airlock_base: airlock.0,
            airlock_slots: raw.airlock_slots,
            features: raw.features,
        })
    }
}

impl Welcome {
    /// The message as sent.
    pub fn encode(&self) -> Vec<u8> {
        let (status, epoch, machine, reason) = match self {
            Self::Accepted { machine, epoch } => (0, *epoch, *machine, ""),
            Self::Refused { reason } => (1, 0, 0, reason.as_str()),
            Self::GivenBack => (2, 0, 0, ""),
        };
        RawWelcome {
            magic: MAGIC,
            version: VERSION,
            status,
            epoch,
            machine,
            zero: 0,
            reason: fixed_text(reason),
        }
        .as_bytes()
        .to_vec()
    }

    /// Checks the manager's answer.
    ///
    /// # Errors
    /// [`WireError::Length`], [`WireError::Magic`], [`WireError::Version`] or [`WireError::Name`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let raw = RawWelcome::read_from_bytes(bytes)
            .map_err(|_| WireError::Length { found: bytes.len(), expected: size_of::<RawWelcome>() })?;
        if raw.magic != MAGIC {
            return Err(WireError::Magic { found: raw.magic });
        }
        if raw.version != VERSION {
            return Err(WireError::Version { found: raw.version });
        }
        Ok(match raw.status {
            0 => Self::Accepted { machine: raw.machine, epoch: raw.epoch },
            2 => Self::GivenBack,
            _ => Self::Refused { reason: text_of(&raw.reason).ok_or(WireError::Name)? },
        })
    }
}

/// Which request a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The manager's epoch.
    pub epoch: u64,
    /// Counts requests of one manager.
    pub sequence: u32,
    /// What is asked.
    pub op: Op,
}

/// Writes a request into `bytes`, whose capacity is reused.
pub fn encode_request(bytes: &mut Vec<u8>, ticket: Ticket, items: &[Item]) {
    encode(bytes, ticket, items.len(), items.as_bytes());
}

/// Writes a reply into `bytes`, whose capacity is reused.
pub fn encode_reply(bytes: &mut Vec<u8>, ticket: Ticket, outcomes: &[Outcome]) {
    let raw: Vec<RawOutcome> = outcomes
        .iter()
        .map(|outcome| {
            let (stop, errno) = Stop::to_codes(outcome.stop);
            RawOutcome { done: outcome.done, stop, errno }
        })
        .collect();
    encode(bytes, ticket, raw.len(), raw.as_bytes());
}

fn encode(bytes: &mut Vec<u8>, ticket: Ticket, items: usize, body: &[u8]) {
    let Ticket { epoch, sequence, op } = ticket;
    bytes.clear();
    bytes.extend_from_slice(
        Header { epoch, sequence, op: op as u32, items: count(items), zero: 0 }.as_bytes(),
    );
    bytes.extend_from_slice(body);
}

fn decode<T: FromBytes + Immutable + KnownLayout + Copy>(
    bytes: &[u8],
) -> Result<(Ticket, Vec<T>), WireError> {
    let short = |expected| WireError::Length { found: bytes.len(), expected };
    let (header, body) = Header::read_from_prefix(bytes).map_err(|_| short(size_of::<Header>()))?;
    if header.items as usize > ITEMS_MAX {
        return Err(WireError::TooManyItems { found: header.items });
    }
    let expected = size_of::<Header>() + header.items as usize * size_of::<T>();
    if bytes.len() != expected {
        return Err(short(expected));
    }
    let op = Op::from_code(header.op).ok_or(WireError::UnknownOp { code: header.op })?;
    let ticket = Ticket { epoch: header.epoch, sequence: header.sequence, op };
    // Item by item: a datagram's body has no alignment to rely on.
    let items =
        body.chunks_exact(size_of::<T>()).filter_map(|chunk| T::read_from_bytes(chunk).ok()).collect();
    Ok((ticket, items))
}

/// Reads a request. The items' ranges are the agent's to check against what it handed over.
///
/// # Errors
/// [`WireError::Length`], [`WireError::TooManyItems`], [`WireError::UnknownOp`].
pub fn decode_request(bytes: &[u8]) -> Result<(Ticket, Vec<Item>), WireError> {
    decode(bytes)
}

/// Reads the reply to `ticket` about `items` and checks that it can be true. A reply to a request of an older epoch
/// gives `None`: it belongs to a manager that is gone.
///
/// # Errors
/// [`WireError::OutOfStep`], [`WireError::Overdone`] and those of [`decode_request`].
pub fn decode_reply(bytes: &[u8], ticket: Ticket, items: &[Item]) -> Result<Option<Vec<Outcome>>, WireError> {
    let (answered, raw) = decode::<RawOutcome>(bytes)?;
    if answered.epoch < ticket.epoch {
        return Ok(None);
    }
    if answered != ticket {
        return Err(WireError::OutOfStep { found: answered.sequence, expected: ticket.sequence });
    }
    if raw.len() != items.len() {
        return Err(WireError::Length { found: raw.len(), expected: items.len() });
    }
    let check = |(raw, item): (&RawOutcome, &Item)| {
        let stop = Stop::from_codes(raw.stop, raw.errno)?;
        let all = raw.done == item.pages;
        let left = item.pages.saturating_sub(raw.done);
        // Of none, whoever asks about the rest would ask for ever.
        let is_overdone =
            matches!(stop, Some(Stop::Given { pages, .. }) if !(1..=left).contains(&u32::from(pages)));
        if raw.done > item.pages || all != stop.is_none() || is_overdone {
            return Err(WireError::Overdone { found: raw.done, asked: item.pages });
        }
        Ok(Outcome { done: raw.done, stop })
    };
    raw.iter().zip(items).map(check).collect::<Result<_, _>>().map(Some)
}
