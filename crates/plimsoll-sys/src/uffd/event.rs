//! Events of a userfaultfd: raw messages enter in batches, typed events leave in the order the kernel gave them.
//! No event may be lost: it left the kernel's queue when it was read, and a thread waits for most of them.
#![expect(unsafe_code, reason = "a fork event brings a descriptor as a bare number, to be owned at once")]

use super::abi::{self, Message};
use plimsoll_types::{ByteCount, Hva};
use std::num::NonZeroU32;
use std::os::fd::{FromRawFd, OwnedFd};
use std::vec::Drain;

/// How a page was touched when it faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The access only reads.
    Read,
    /// The access writes.
    Write,
}

/// Why a touch of a page faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// There is no page.
    Missing,
    /// There is one, and it is write-protected.
    WriteProtect,
    /// There is one in the page cache, and it is not mapped.
    Minor,
}

/// An event code this build does not know. The thread that caused it may be waiting; do not go on as if nothing was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown userfaultfd event {code:#x}: the kernel is newer than this build, or the descriptor is not what it seems"
)]
pub struct UnknownEvent {
    /// The kernel's number for the event.
    pub code: u8,
}

/// Something that happened in a registered range. All but page faults need their feature in the handshake.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A thread touched a page and waits until the page is installed and the thread woken.
    PageFault {
        /// The page's address, or the exact one with [`Features::EXACT_ADDRESS`](super::Features::EXACT_ADDRESS).
        address: Hva,
        /// How it was touched.
        access: Access,
        /// Why it faulted.
        kind: FaultKind,
        /// The thread, with [`Features::THREAD_ID`](super::Features::THREAD_ID).
        thread: Option<NonZeroU32>,
    },
    /// The process forked. The child waits for this event to be read.
    Fork {
        /// The userfaultfd of the child's copy of the memory; dropping it unregisters that copy.
        uffd: OwnedFd,
    },
    /// A range was moved by mremap, which waits for this event to be read.
    Remap {
        /// Where it was.
        from: Hva,
        /// Where it is.
        to: Hva,
        /// How long it is.
        len: ByteCount,
    },
    /// The pages were discarded (MADV_DONTNEED, MADV_REMOVE). The discarder waits for this event to be read, and
    /// **continues at once** then: what is known about these pages has to be forgotten before the next COPY.
    Remove {
        /// The first address.
        start: Hva,
        /// The address after the last.
        end: Hva,
    },
    /// The range was unmapped, and is not registered any more. Waits like `Remove`.
    Unmap {
        /// The first address.
        start: Hva,
        /// The address after the last.
        end: Hva,
    },
    /// Something this build does not know. It is an event and not the failure of the whole read because the others
    /// of the batch would be lost with it.
    Unknown(UnknownEvent),
}

/// Room for a batch of events, reused from read to read.
#[derive(Debug)]
pub struct EventBuffer {
    messages: Vec<Message>,
    events: Vec<Event>,
}

impl EventBuffer {
    /// Room for `capacity` events per read, at least one.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self { messages: vec![Message::default(); capacity], events: Vec::with_capacity(capacity) }
    }

    pub(super) fn messages(&mut self) -> &mut [Message] {
        &mut self.messages
    }

    /// Turns the first `count` messages into events and lends them out.
    ///
    /// # Safety
    ///
    /// Those messages were just read from a userfaultfd by this process and were not decoded before: a descriptor
    /// in them must have exactly one owner.
    pub(super) unsafe fn decode(&mut self, count: usize) -> Drain<'_, Event> {
        // Events nobody took (a leaked `Drain`) go first, so that their descriptors are closed and none seen twice.
        self.events.clear();
        for message in self.messages.iter().take(count) {
            // SAFETY: forwarded from the caller; each message is visited once.
            self.events.push(unsafe { Event::decode(message) });
        }
        self.events.drain(..)
    }
}

impl Event {
    /// What another process has read: the descriptor of a fork was its own, so there is no such event.
    pub(super) fn without_descriptor(message: &Message) -> Option<Self> {
        let is_there = message.event != 0 && message.event != abi::EVENT_FORK;
        // SAFETY: only a fork's message has a descriptor to be owned.
        is_there.then(|| unsafe { Self::decode(message) })
    }

    /// # Safety
    ///
    /// As for [`EventBuffer::decode`].
    pub(super) unsafe fn decode(message: &Message) -> Self {
        let [first, second, third] = message.arg;
        match message.event {
            abi::EVENT_PAGEFAULT => Self::PageFault {
                address: Hva(second),
                access: if first & abi::PAGEFAULT_FLAG_WRITE == 0 { Access::Read } else { Access::Write },
                kind: if first & abi::PAGEFAULT_FLAG_WP != 0 {
                    FaultKind::WriteProtect
                } else if first & abi::PAGEFAULT_FLAG_MINOR != 0 {
                    FaultKind::Minor
                } else {
                    FaultKind::Missing
                },
                thread: NonZeroU32::new(low_half(third)),
            },
            abi::EVENT_FORK => match i32::try_from(low_half(first)) {
                // SAFETY: the kernel installed this descriptor into this process for this message alone (the
                // caller's promise), so nobody else owns it; a number that fits i32 is not -1.
                Ok(number) => Self::Fork { uffd: unsafe { OwnedFd::from_raw_fd(number) } },
                Err(_) => Self::Unknown(UnknownEvent { code: message.event }),
            },
            abi::EVENT_REMAP => Self::Remap { from: Hva(first), to: Hva(second), len: ByteCount(third) },
            abi::EVENT_REMOVE => Self::Remove { start: Hva(first), end: Hva(second) },
            abi::EVENT_UNMAP => Self::Unmap { start: Hva(first), end: Hva(second) },
            code => Self::Unknown(UnknownEvent { code }),
        }
    }
}

/// The first four bytes of an argument: the others are padding of the kernel's union.
#[expect(clippy::cast_possible_truncation, reason = "dropping the padding is the purpose")]
const fn low_half(arg: u64) -> u32 {
    arg as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(event: u8, arg: [u64; 3]) -> Event {
        assert_ne!(event, abi::EVENT_FORK, "would own a descriptor that is not there");
        // SAFETY: not a fork event, so no descriptor is owned.
        unsafe { Event::decode(&Message { event, reserved: [0; 7], arg }) }
    }

    #[test]
    fn flags_say_how_and_why_a_page_faulted() {
        for (flags, access, kind) in [
            (0, Access::Read, FaultKind::Missing),
            (1, Access::Write, FaultKind::Missing),
            (3, Access::Write, FaultKind::WriteProtect),
            (4, Access::Read, FaultKind::Minor),
        ] {
            match decode(abi::EVENT_PAGEFAULT, [flags, 0x7000, 0xdead_0000_0007]) {
                Event::PageFault { address, access: a, kind: k, thread } => {
                    assert_eq!((address, a, k, thread), (Hva(0x7000), access, kind, NonZeroU32::new(7)));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_unknown_event_is_a_value() {
        match decode(0x77, [0; 3]) {
            Event::Unknown(UnknownEvent { code }) => assert_eq!(code, 0x77),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_buffer_has_room_for_at_least_one_event() {
        assert_eq!(EventBuffer::new(0).messages().len(), 1);
    }
}
