//! The note in a dump that says in which state each page was: whoever reads a file of somebody's believes it no further than it goes.
use plimsoll_inspect::PageStates;
use plimsoll_types::Gpa;

/// Bytes of a note before its description: three words, and its name, padded.
const BEFORE: usize = 24;

/// Reads a note's description.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let states = match PageStates::parse(bytes) {
        Ok(states) => states,
        Err(error) => {
            let said = error.to_string();
            assert!(!said.contains('\n'), "{said:?}");
            return false;
        }
    };
    let pages = states.states.len() as u64;
    assert_eq!(states.regions.iter().map(|(_, pages)| pages).sum::<u64>(), pages);
    assert_eq!(states.counts().map(|(_, pages)| pages).sum::<u64>(), pages);
    let note = states.note().unwrap();
    assert_eq!(PageStates::parse(&note[BEFORE..][..bytes.len()]).unwrap(), states);
    true
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let small = PageStates {
        stood_still: true,
        regions: vec![(Gpa(0), 2), (Gpa(1 << 32), 3)],
        names: vec!["resident".into(), "stored".into()],
        states: vec![0, 1, 1, PageStates::UNKNOWN, 0],
    };
    let none = PageStates { stood_still: false, regions: vec![], names: vec![], states: vec![] };
    // What pads a note is none of its description.
    let description = |states: &PageStates| {
        let size = 32 + states.regions.len() * 16 + states.names.len() * 16 + states.states.len();
        states.note().unwrap()[BEFORE..][..size].to_vec()
    };
    vec![description(&small), description(&none)]
}
