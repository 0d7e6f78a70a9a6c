//! Page words: a word that is one is the word of its state, and no transition leads to one that is not.
use super::words_of;
use plimsoll_core::word::{Gift, ObjectRef, PageState, PageWord, PinCause, Transition};
use plimsoll_types::SlotPage;

/// Reads pairs of words: one as it stands in memory, and one that says what happens to the page.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let mut are_words = true;
    for pair in words_of(bytes).chunks(2) {
        let word = PageWord(pair[0]);
        match word.state() {
            Some(state) => {
                assert_eq!(PageWord::new(state).0, word.0, "{state:?} is written otherwise than it is read");
            }
            None => are_words = false,
        }
        let Some(transition) = pair.get(1).map(|bits| transition(*bits)) else { continue };
        match word.after(transition) {
            Ok(next) => assert!(word.state().is_some() && next.state().is_some(), "{word:?} {transition:?}"),
            Err(illegal) => assert_eq!((illegal.word, illegal.transition), (word, transition)),
        }
    }
    are_words
}

fn transition(bits: u64) -> Transition {
    let slot = SlotPage(u32::try_from(bits >> 8 & 0xff).unwrap());
    let object = ObjectRef::new(bits >> 16).unwrap();
    let cause = if bits & 0x100 == 0 { PinCause::Device } else { PinCause::Kernel };
    match bits & 0xf {
        0 => Transition::Install,
        1 => Transition::BeginCapture(slot),
        2 => Transition::Capture(slot),
        3 => Transition::Refuse(slot),
        4 => Transition::Vanish(slot),
        5 => Transition::BeginReturn(slot),
        6 => Transition::Store(slot, object),
        7 => Transition::DropZero(slot),
        8 => Transition::Discard,
        9 => Transition::Pin(cause),
        10 => Transition::Unpin,
        11 => Transition::Exclude,
        12 => Transition::Include,
        13 => Transition::Poison,
        14 => Transition::Find,
        15 if bits & 0x100 != 0 => Transition::Explain(Gift::Hinted),
        _ => Transition::Miss,
    }
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let slot = SlotPage(7);
    let states = [
        (PageState::Zero, 0),
        (PageState::Resident, 0x701),
        (PageState::Capturing(slot), 0x702),
        (PageState::Limbo(slot), 0x70706),
        (PageState::Stored(ObjectRef::new(1 << 50).unwrap()), 13),
        (PageState::File(9), 0),
        (PageState::Absent, 8),
        (PageState::Absent, 0x10f),
        (PageState::Given(Gift::Ballooned), 0),
        (PageState::Pinned(PinCause::Kernel), 10),
        (PageState::NeverPage, 12),
        (PageState::Poisoned, 8),
        (PageState::Unwatched, 14),
    ];
    let pair =
        |(state, bits): (PageState, u64)| [PageWord::new(state).0, bits].map(u64::to_le_bytes).concat();
    states.into_iter().map(pair).collect()
}
