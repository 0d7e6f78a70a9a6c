//! The page word: eight bytes that say where the bytes of one guest page are.
//!
//! Enters: a word as it stands in memory and what happened to its page. Leaves: the next word, or the refusal of a
//! transition that must not happen. This is the only place that knows which transitions are legal.
//!
//! ```text
//!  63                                    4 3    0
//! +---------------------------------------+------+
//! |               payload                 | state|
//! +---------------------------------------+------+
//! ```
//!
//! | state | payload | where the bytes are |
//! |---|---|---|
//! | 0 zero | 0 | nowhere: the page reads as zeros |
//! | 1 resident | 0 | in guest RAM |
//! | 2 capturing | slot page | in guest RAM or in that slot page: a move is under way |
//! | 3 limbo | slot page | in that slot page |
//! | 4 stored | object | in the store |
//! | 5 file | page offset | in the machine's snapshot file, not yet read |
//! | 6 absent | 0 | nowhere: the guest gave the page back; it reads as zeros |
//! | 7 pinned | cause | in guest RAM, and cannot be moved for now |
//! | 8 never-page | 0 | in guest RAM, and must not be moved |
//! | 9 poisoned | 0 | lost: a touch must fail, never read wrong bytes |
//! | 10 unwatched | 0 | in guest RAM, or nowhere and reads as zeros: the kernel serves it, nobody is told |
//! | 11 reported | 0 | as absent; the guest said by itself that it does not use the page |
//! | 12 hinted | 0 | as absent; the host found the page free where the guest shows it |
//! | 13 ballooned | 0 | as absent; the guest gave the page into its balloon |
//!
//! A fresh, zeroed word is a valid one: a page nobody has touched.
use core::fmt;
use plimsoll_types::SlotPage;

/// Bits of payload in a word.
pub const PAYLOAD_BITS: u32 = 60;
const STATE_BITS: u32 = 64 - PAYLOAD_BITS;

/// Names an object of the store. Its meaning is the store's; it fits in [`PAYLOAD_BITS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef(u64);

impl ObjectRef {
    /// `None` if the bits do not fit in a page word.
    pub const fn new(bits: u64) -> Option<Self> {
        if bits >> PAYLOAD_BITS == 0 { Some(Self(bits)) } else { None }
    }

    /// The bits given to [`ObjectRef::new`].
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// Why a resident page cannot be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinCause {
    /// The VMM's own pin table holds it for a device.
    Device,
    /// The kernel found a reference it will not move under (`FOLL_PIN`, KSM, a forked child), even after the page was
    /// made the process's own again.
    Kernel,
}

/// How a guest gave a page back. Its VMM knows; where the bytes are does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gift {
    /// The guest told by itself that it does not use the page: free page reporting.
    Reported,
    /// The host asked, or looked where the guest shows what it has free: free page hinting, an allocator that is shared.
    Hinted,
    /// It went into the guest's balloon, or out of the guest's circulation: the guest does not use it before it asks.
    Ballooned,
}

/// Where the bytes of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Nowhere: the page reads as zeros.
    Zero,
    /// In guest RAM.
    Resident,
    /// On the way from guest RAM to a slot page; the kernel knows which of the two holds it.
    Capturing(SlotPage),
    /// In a slot page of the airlock.
    Limbo(SlotPage),
    /// In the store.
    Stored(ObjectRef),
    /// In the machine's snapshot file, at this page offset.
    File(u32),
    /// Nowhere: the guest gave the page back, it is not known how. Reads as zeros; counted apart from [`PageState::Zero`].
    Absent,
    /// Nowhere: the guest gave the page back in this way, and has not used it since.
    Given(Gift),
    /// In guest RAM, not movable for now.
    Pinned(PinCause),
    /// In guest RAM, never to be moved.
    NeverPage,
    /// Lost. A touch must fail.
    Poisoned,
    /// In guest RAM, or nowhere and reads as zeros: its block is not registered, so the kernel serves its faults, with
    /// huge pages where it can, and nobody hears of its discards. Counted as used.
    Unwatched,
}

/// The states without their payloads, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(
    missing_docs,
    reason = "each is the PageState of the same name, or the Gift of a page that was given"
)]
pub enum StateKind {
    Zero = 0,
    Resident = 1,
    Capturing = 2,
    Limbo = 3,
    Stored = 4,
    File = 5,
    Absent = 6,
    Pinned = 7,
    NeverPage = 8,
    Poisoned = 9,
    Unwatched = 10,
    Reported = 11,
    Hinted = 12,
    Ballooned = 13,
}

impl StateKind {
    /// All kinds, in the order of their codes.
    pub const ALL: [Self; 14] = [
        Self::Zero,
        Self::Resident,
        Self::Capturing,
        Self::Limbo,
        Self::Stored,
        Self::File,
        Self::Absent,
        Self::Pinned,
        Self::NeverPage,
        Self::Poisoned,
        Self::Unwatched,
        Self::Reported,
        Self::Hinted,
        Self::Ballooned,
    ];

    /// The word the field uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Resident => "resident",
            Self::Capturing => "capturing",
            Self::Limbo => "limbo",
            Self::Stored => "stored",
            Self::File => "file",
            Self::Absent => "absent",
            Self::Pinned => "pinned",
            Self::NeverPage => "never-page",
            Self::Poisoned => "poisoned",
            Self::Unwatched => "unwatched",
            Self::Reported => "reported",
            Self::Hinted => "hinted",
            Self::Ballooned => "ballooned",
        }
    }
}

impl PageState {
    /// The state without its payload.
    pub const fn kind(self) -> StateKind {
        match self {
            Self::Zero => StateKind::Zero,
            Self::Resident => StateKind::Resident,
            Self::Capturing(_) => StateKind::Capturing,
            Self::Limbo(_) => StateKind::Limbo,
            Self::Stored(_) => StateKind::Stored,
            Self::File(_) => StateKind::File,
            Self::Absent => StateKind::Absent,
            Self::Pinned(_) => StateKind::Pinned,
            Self::NeverPage => StateKind::NeverPage,
            Self::Poisoned => StateKind::Poisoned,
            Self::Unwatched => StateKind::Unwatched,
            Self::Given(Gift::Reported) => StateKind::Reported,
            Self::Given(Gift::Hinted) => StateKind::Hinted,
            Self::Given(Gift::Ballooned) => StateKind::Ballooned,
        }
    }

    /// True when the page's bytes are in guest RAM for certain, unless the guest has just discarded them.
    pub const fn is_in_ram(self) -> bool {
        matches!(self, Self::Resident | Self::Pinned(_) | Self::NeverPage)
    }
}

/// A page word as it stands in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageWord(pub u64);

impl PageWord {
    /// The word for a state.
    pub const fn new(state: PageState) -> Self {
        let payload = match state {
            PageState::Capturing(slot) | PageState::Limbo(slot) => slot.0 as u64,
            PageState::Stored(object) => object.0,
            PageState::File(offset) => offset as u64,
            PageState::Pinned(PinCause::Kernel) => 1,
            _ => 0,
        };
        Self(payload << STATE_BITS | state.kind() as u64)
    }

    /// The state a word stands for, or `None` for bits that no transition writes.
    pub const fn state(self) -> Option<PageState> {
        let payload = self.0 >> STATE_BITS;
        #[expect(clippy::cast_possible_truncation, reason = "what was cut off is missed below")]
        let small = payload as u32;
        let state = match self.0 & ((1 << STATE_BITS) - 1) {
            0 => PageState::Zero,
            1 => PageState::Resident,
            2 => PageState::Capturing(SlotPage(small)),
            3 => PageState::Limbo(SlotPage(small)),
            4 => PageState::Stored(ObjectRef(payload)),
            5 => PageState::File(small),
            6 => PageState::Absent,
            7 if payload == 0 => PageState::Pinned(PinCause::Device),
            7 => PageState::Pinned(PinCause::Kernel),
            8 => PageState::NeverPage,
            9 => PageState::Poisoned,
            10 => PageState::Unwatched,
            11 => PageState::Given(Gift::Reported),
            12 => PageState::Given(Gift::Hinted),
            13 => PageState::Given(Gift::Ballooned),
            _ => return None,
        };
        // A payload that is not the state's is damage, also where the state has none.
        if Self::new(state).0 == self.0 { Some(state) } else { None }
    }
}

impl fmt::Debug for PageWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state() {
            Some(state) => write!(f, "{state:?}"),
            None => write!(f, "PageWord({:#x})", self.0),
        }
    }
}

/// Something that happened to a page, or is about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transition {
    /// The page's bytes were put into guest RAM.
    Install,
    /// The page will be moved to the slot page. Written *before* the move: intent precedes action.
    BeginCapture(SlotPage),
    /// The move to the slot page was done.
    Capture(SlotPage),
    /// The move to the slot page was refused; the page stayed.
    Refuse(SlotPage),
    /// The move found nothing: the guest had discarded the page.
    Vanish(SlotPage),
    /// The page will be moved back from the slot page. Written *before* the move, as for a capture: which of the two
    /// places holds it, the kernel knows.
    BeginReturn(SlotPage),
    /// The bytes in the slot page were stored as the object.
    Store(SlotPage, ObjectRef),
    /// The bytes in the slot page were found to be all zero.
    DropZero(SlotPage),
    /// The guest gave the page back.
    Discard,
    /// It was heard how the guest gave the page back.
    Explain(Gift),
    /// The page was found immovable.
    Pin(PinCause),
    /// The page may be tried again.
    Unpin,
    /// The page must never be moved.
    Exclude,
    /// The page may be moved again.
    Include,
    /// The page's bytes were found to be lost.
    Poison,
    /// The page's block is no longer registered: the kernel serves it from here on.
    Unwatch,
    /// The block was registered, and the page found in guest RAM.
    Find,
    /// The block was registered, and nothing found in the page's place.
    Miss,
}

/// A transition that the page's state does not allow. The word is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IllegalTransition {
    /// The word found; it may itself be one that no transition writes.
    pub word: PageWord,
    /// What was tried.
    pub transition: Transition,
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a page that is {:?} cannot take {:?}", self.word, self.transition)
    }
}

impl core::error::Error for IllegalTransition {}

impl PageWord {
    /// The word after `transition`.
    ///
    /// # Errors
    /// [`IllegalTransition`] when the state does not allow it, or a slot page is not the one the word names.
    #[inline]
    pub fn after(self, transition: Transition) -> Result<Self, IllegalTransition> {
        use PageState as S;
        use Transition as T;
        let illegal = IllegalTransition { word: self, transition };
        let next = match (self.state().ok_or(illegal)?, transition) {
            (S::Zero | S::Absent | S::Given(_) | S::Limbo(_) | S::Stored(_) | S::File(_), T::Install) => {
                S::Resident
            }
            (S::Resident, T::BeginCapture(slot)) => S::Capturing(slot),
            (S::Capturing(named), T::Capture(slot)) if named == slot => S::Limbo(slot),
            (S::Capturing(named), T::Refuse(slot)) if named == slot => S::Resident,
            (S::Capturing(named), T::Vanish(slot)) if named == slot => S::Absent,
            (S::Limbo(named), T::BeginReturn(slot)) if named == slot => S::Capturing(slot),
            (S::Limbo(named), T::Store(slot, object)) if named == slot => S::Stored(object),
            (S::Limbo(named), T::DropZero(slot)) if named == slot => S::Zero,
            // The guest may discard at any time, whatever the page is going through. A lost page that the guest no
            // longer wants is no longer lost.
            (S::Unwatched, T::Discard) => S::Unwatched,
            (_, T::Discard) => S::Absent,
            (S::Absent, T::Explain(gift)) => S::Given(gift),
            (S::Resident, T::Pin(cause)) => S::Pinned(cause),
            (S::Pinned(_), T::Unpin) => S::Resident,
            (S::Resident | S::Pinned(_), T::Exclude) => S::NeverPage,
            (S::NeverPage, T::Include) => S::Resident,
            (S::Limbo(_) | S::Stored(_) | S::File(_), T::Poison) => S::Poisoned,
            (S::Zero | S::Absent | S::Given(_), T::Unwatch) => S::Unwatched,
            (S::Unwatched, T::Find) => S::Resident,
            (S::Unwatched, T::Miss) => S::Absent,
            _ => return Err(illegal),
        };
        Ok(Self::new(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const GIFTS: [Gift; 3] = [Gift::Reported, Gift::Hinted, Gift::Ballooned];

    fn every_state() -> Vec<PageState> {
        let mut states = alloc::vec![
            PageState::Zero,
            PageState::Resident,
            PageState::Absent,
            PageState::Pinned(PinCause::Device),
            PageState::Pinned(PinCause::Kernel),
            PageState::NeverPage,
            PageState::Poisoned,
            PageState::Unwatched,
        ];
        states.extend(GIFTS.map(PageState::Given));
        for slot in [0, 7, u32::MAX].map(SlotPage) {
            states.extend([PageState::Capturing(slot), PageState::Limbo(slot), PageState::File(slot.0)]);
        }
        states.extend(
            [0, (1 << PAYLOAD_BITS) - 1].map(|bits| PageState::Stored(ObjectRef::new(bits).unwrap())),
        );
        states
    }

    #[test]
    fn every_state_survives_its_word() {
        for state in every_state() {
            assert_eq!(PageWord::new(state).state(), Some(state));
        }
        assert_eq!(PageWord(0).state(), Some(PageState::Zero), "fresh memory is a valid word");
    }

    #[test]
    fn bits_no_transition_writes_are_no_state_and_take_no_transition() {
        let with_a_payload_that_is_not_theirs = [0, 1, 6, 8, 9, 10, 11, 12, 13].map(|kind| 1 << 40 | kind);
        for bits in [14, 15, 1 << 63 | 2, 2 << 4 | 7].into_iter().chain(with_a_payload_that_is_not_theirs) {
            assert_eq!(PageWord(bits).state(), None);
            assert!(PageWord(bits).after(Transition::Discard).is_err());
        }
        assert_eq!(ObjectRef::new(1 << PAYLOAD_BITS), None);
    }

    #[test]
    fn a_page_held_elsewhere_is_never_captured_and_a_page_in_ram_is_never_installed() {
        for state in every_state() {
            let word = PageWord::new(state);
            let captured = word.after(Transition::BeginCapture(SlotPage(1)));
            assert_eq!(captured.is_ok(), state == PageState::Resident, "{state:?}");
            let installable = !state.is_in_ram()
                && !matches!(state, PageState::Capturing(_) | PageState::Poisoned | PageState::Unwatched);
            assert_eq!(word.after(Transition::Install).is_ok(), installable, "{state:?}");
        }
    }

    #[test]
    fn only_a_page_that_was_given_is_told_how_and_the_next_gift_is_another() {
        for (state, gift) in every_state().into_iter().flat_map(|state| GIFTS.map(|gift| (state, gift))) {
            let explained = PageWord::new(state).after(Transition::Explain(gift));
            assert_eq!(explained.is_ok(), state == PageState::Absent, "{state:?}");
        }
        for gift in GIFTS {
            let given = PageWord::new(PageState::Given(gift));
            let after = |transition| given.after(transition).unwrap().state();
            assert_eq!(after(Transition::Install), Some(PageState::Resident));
            assert_eq!(after(Transition::Discard), Some(PageState::Absent));
            assert_eq!(StateKind::ALL[PageState::Given(gift).kind() as usize], PageState::Given(gift).kind());
        }
    }

    #[test]
    fn a_move_that_finished_late_cannot_claim_another_moves_page() {
        let word = PageWord::new(PageState::Capturing(SlotPage(4)));
        for late in [
            Transition::Capture(SlotPage(5)),
            Transition::Refuse(SlotPage(5)),
            Transition::Vanish(SlotPage(5)),
        ] {
            assert!(word.after(late).is_err());
        }
        let discarded = word.after(Transition::Discard).unwrap();
        assert!(
            discarded.after(Transition::Capture(SlotPage(4))).is_err(),
            "a discard wins over the move under it"
        );
    }
}
