//! What a memory manager says of each page of a guest, as a note of a core file.
//!
//! Enters: where RAM lies in the guest, and a state for each of its pages; or a note's description, written by anybody. Leaves: the other
//! of the two. What must never happen: pages believed of which a description has fewer, or room taken for more than it has.
//!
//! ```text
//! name "PLIMSOLL", type 0x504c494d; all integers little endian
//! 0   version u32 (1) | 4 flags u32 (1: the guest stood still while its pages' states were read) | 8 page size u32 | 12 names u32
//! 16  regions u64 | 24 pages u64
//! 32  region 0, 1, ...: first guest physical address u64 | pages u64, in ascending order
//! ..  name of state 0, 1, ...: 16 bytes each, padded with zeros
//! ..  state of page 0, 1, ...: u8, through all regions; 255: not known
//! ```
//!
//! The type is not a small number, because readers (BFD's, so gdb's) take a note of a name that they do not know for one of "CORE", whose
//! type 1 is a processor's registers.
use crate::elf::note;
use plimsoll_types::{Gpa, PAGE_SIZE};

/// The note's name.
const NAME: &str = "PLIMSOLL";
/// The note's type: "PLIM".
const KIND: u32 = 0x504c_494d;
const VERSION: u32 = 1;
const STOOD_STILL: u32 = 1;
const HEAD: usize = 32;
const REGION: usize = 16;
const NAME_SIZE: usize = 16;
/// A note's size is a u32, with its head: so many pages are 8 TiB.
const PAGES_MAX: u64 = 1 << 31;

/// Where the bytes of each of a guest's pages are, as its manager says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageStates {
    /// The guest stood still while they were read. They change all the same, as its manager moves pages.
    pub stood_still: bool,
    /// Where its pages are: the first address, and how many.
    pub regions: Vec<(Gpa, u64)>,
    /// What the states are called, by their numbers.
    pub names: Vec<String>,
    /// The number of each page's state, through all regions.
    pub states: Vec<u8>,
}

/// States that are no note, or a note that holds none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageStatesError {
    /// The description ends too early, or goes on behind its end.
    #[error("it has {found} bytes, and should have {expected}")]
    Length {
        /// What it should have.
        expected: u128,
        /// What it has.
        found: usize,
    },
    /// It is of another version.
    #[error("it is of version {0}, and {VERSION} is known")]
    Version(u32),
    /// Its pages are not of 4 KiB.
    #[error("its pages have {0} bytes")]
    PageSize(u32),
    /// A region is empty, unaligned, before the end of the one ahead of it, or has no end.
    #[error("its region at {0} is empty, unaligned, out of order, or has no end")]
    Region(Gpa),
    /// Regions have other pages than there are states.
    #[error("its regions have {regions} pages, of which {states} have a state")]
    Pages {
        /// Pages of all regions.
        regions: u64,
        /// Those with a state.
        states: u64,
    },
    /// A name is empty, too long, or not plain.
    #[error("{0:?} is no name of a state")]
    Name(String),
    /// A page has a state without a name.
    #[error("there is no state {0}")]
    State(u8),
    /// No note has room for it.
    #[error("{0} pages are too many for a note")]
    TooMany(u64),
}

impl PageStates {
    /// A page whose state is not known.
    pub const UNKNOWN: u8 = u8::MAX;

    /// How many pages are in each state, by its name.
    pub fn counts(&self) -> impl Iterator<Item = (&str, u64)> {
        let mut counts = [0u64; 256];
        self.states.iter().for_each(|state| counts[usize::from(*state)] += 1);
        let named = self.names.iter().map(String::as_str).zip(counts);
        named.chain([("unknown", counts[usize::from(Self::UNKNOWN)])]).filter(|(_, count)| *count > 0)
    }

    /// As a note, padded.
    ///
    /// # Errors
    /// [`PageStatesError`] when no note could hold it.
    pub fn note(&self) -> Result<Vec<u8>, PageStatesError> {
        self.check()?;
        let words = [VERSION, u32::from(self.stood_still) * STOOD_STILL];
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a page's size is small, and there are at most 255 names"
        )]
        let words = words.into_iter().chain([PAGE_SIZE as u32, self.names.len() as u32]);
        let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let sizes = [self.regions.len() as u64, self.states.len() as u64].into_iter();
        let regions = self.regions.iter().flat_map(|(gpa, pages)| [gpa.0, *pages]);
        bytes.extend(sizes.chain(regions).flat_map(u64::to_le_bytes));
        for name in &self.names {
            let end = bytes.len() + NAME_SIZE;
            bytes.extend(name.bytes());
            bytes.resize(end, 0);
        }
        bytes.extend(&self.states);
        Ok(note(NAME, KIND, &bytes))
    }

    /// What a note's description says.
    ///
    /// # Errors
    /// [`PageStatesError`].
    pub fn parse(description: &[u8]) -> Result<Self, PageStatesError> {
        let found = description.len();
        let cut = |expected| PageStatesError::Length { expected, found };
        let head = description.first_chunk::<HEAD>().ok_or_else(|| cut(HEAD as u128))?;
        let (words, _) = head.as_chunks::<4>();
        let [version, flags, page, names] = [0, 1, 2, 3].map(|at| u32::from_le_bytes(words[at]));
        if version != VERSION {
            return Err(PageStatesError::Version(version));
        }
        if page as usize != PAGE_SIZE {
            return Err(PageStatesError::PageSize(page));
        }
        let (sizes, _) = head.as_chunks::<8>();
        let [regions, pages] = [2, 3].map(|at| u64::from_le_bytes(sizes[at]));
        // Before anything of that size is made: numbers of a file's may be any.
        let of = |count: u64, size: usize| u128::from(count) * size as u128;
        let expected = HEAD as u128 + of(regions, REGION) + of(names.into(), NAME_SIZE) + u128::from(pages);
        if expected != found as u128 {
            return Err(cut(expected));
        }
        let sizes = [of(regions, REGION), of(names.into(), NAME_SIZE)].map(usize::try_from);
        let [Ok(regions), Ok(names)] = sizes else { return Err(cut(expected)) };
        let (regions, rest) = description[HEAD..].split_at(regions);
        let (names, states) = rest.split_at(names);
        let region = |bytes: &[u8; REGION]| {
            let number = u128::from_le_bytes(*bytes);
            #[expect(clippy::cast_possible_truncation, reason = "two numbers of 64 bits lie in one of 128")]
            (Gpa(number as u64), (number >> 64) as u64)
        };
        let read = Self {
            stood_still: flags & STOOD_STILL != 0,
            regions: regions.as_chunks().0.iter().map(region).collect(),
            names: names.chunks(NAME_SIZE).map(name).collect(),
            states: states.to_vec(),
        };
        read.check().map(|()| read)
    }

    fn check(&self) -> Result<(), PageStatesError> {
        let (mut end, mut pages) = (0, 0u64);
        for (gpa, count) in &self.regions {
            let wrong = || PageStatesError::Region(*gpa);
            let bytes = count.checked_mul(PAGE_SIZE as u64).filter(|bytes| *bytes > 0).ok_or_else(wrong)?;
            let is_next = gpa.0 >= end && gpa.0.is_multiple_of(PAGE_SIZE as u64);
            end = gpa.0.checked_add(bytes).filter(|_| is_next).ok_or_else(wrong)?;
            pages += count;
        }
        let states = self.states.len() as u64;
        if pages != states {
            return Err(PageStatesError::Pages { regions: pages, states });
        }
        if states > PAGES_MAX {
            return Err(PageStatesError::TooMany(states));
        }
        let is_name = |name: &String| {
            (1..=NAME_SIZE).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if let Some(wrong) = self.names.iter().find(|name| !is_name(name)) {
            return Err(PageStatesError::Name(wrong.clone()));
        }
        let is_none = |state: &&u8| usize::from(**state) >= self.names.len() && **state != Self::UNKNOWN;
        self.states.iter().find(is_none).map_or(Ok(()), |state| Err(PageStatesError::State(*state)))
    }
}

fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use PageStatesError as E;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn some() -> PageStates {
        PageStates {
            stood_still: true,
            regions: vec![(Gpa(0), 2), (Gpa(8 * PAGE), 3)],
            names: ["zero", "resident", "sixteen-letters-"].map(str::to_owned).to_vec(),
            states: vec![0, 1, 2, PageStates::UNKNOWN, 1],
        }
    }

    fn description(states: &PageStates) -> Vec<u8> {
        // Behind three numbers and a name of nine bytes, padded.
        states.note().unwrap()[24..].to_vec()
    }

    #[test]
    fn what_is_put_in_comes_out_and_lies_where_the_layout_says() {
        let states = some();
        let note = states.note().unwrap();
        let length = 32 + 2 * 16 + 3 * 16 + 5;
        assert_eq!(note[..4], 9u32.to_le_bytes());
        assert_eq!(note[4..12], [u32::to_le_bytes(length), *b"MILP"].concat());
        assert_eq!(note[12..24], *b"PLIMSOLL\0\0\0\0");
        let bytes = &note[24..24 + length as usize];
        assert_eq!(note.len(), 24 + bytes.len().next_multiple_of(4));
        assert_eq!(bytes[..16], [1u32, 1, 4096, 3].map(u32::to_le_bytes).concat());
        assert_eq!(bytes[16..64], [2u64, 5, 0, 2, 8 * PAGE, 3].map(u64::to_le_bytes).concat());
        assert_eq!(bytes[64..72], *b"zero\0\0\0\0");
        assert_eq!(bytes[112..], states.states);
        assert_eq!(PageStates::parse(bytes), Ok(states));
        let counts: Vec<_> = PageStates::parse(bytes)
            .unwrap()
            .counts()
            .map(|(name, count)| (name.to_owned(), count))
            .collect();
        let expected = [("zero", 1), ("resident", 2), ("sixteen-letters-", 1), ("unknown", 1)];
        assert_eq!(counts, expected.map(|(name, count)| (name.to_owned(), count)));
    }

    #[test]
    fn what_makes_no_sense_is_neither_written_nor_read() {
        let wrong = |change: fn(&mut PageStates)| {
            let mut states = some();
            change(&mut states);
            states.note().unwrap_err()
        };
        assert_eq!(wrong(|one| one.regions[1].1 = 4), E::Pages { regions: 6, states: 5 });
        assert_eq!(wrong(|one| one.regions[1].0 = Gpa(PAGE)), E::Region(Gpa(PAGE)));
        assert_eq!(wrong(|one| one.regions[0].0 = Gpa(7)), E::Region(Gpa(7)));
        assert_eq!(wrong(|one| one.regions[0].1 = 0), E::Region(Gpa(0)));
        assert_eq!(wrong(|one| one.regions[1].1 = u64::MAX), E::Region(Gpa(8 * PAGE)));
        assert_eq!(wrong(|one| one.names[2].push('-')), E::Name("sixteen-letters--".to_owned()));
        assert_eq!(wrong(|one| one.names[0].clear()), E::Name(String::new()));
        assert_eq!(wrong(|one| one.states[0] = 3), E::State(3));
    }

    #[test]
    fn a_description_of_anybodys_is_believed_no_further_than_it_goes() {
        let right = description(&some());
        let right = &right[..right.len() - 3];
        assert!(PageStates::parse(right).is_ok());
        for len in 0..right.len() {
            assert!(matches!(PageStates::parse(&right[..len]), Err(E::Length { .. })), "{len}");
        }
        assert!(PageStates::parse(&[right, &[0]].concat()).is_err(), "it goes on behind its end");
        let changed = |at: usize, to: &[u8]| {
            let mut bytes = right.to_vec();
            bytes[at..at + to.len()].copy_from_slice(to);
            PageStates::parse(&bytes)
        };
        assert_eq!(changed(0, &[2]), Err(E::Version(2)));
        assert_eq!(changed(9, &[0]), Err(E::PageSize(0)));
        for count in [12, 20, 28] {
            let huge = changed(count, &u32::MAX.to_le_bytes());
            assert!(matches!(huge, Err(E::Length { .. })), "{count}: {huge:?}");
        }
        assert_eq!(changed(32, &1u64.to_le_bytes()), Err(E::Region(Gpa(1))));
        assert_eq!(changed(66, &[0]), Err(E::Name("ze\0o".to_owned())));
        assert_eq!(changed(112, &[3]), Err(E::State(3)));
        // Whatever a byte is, it is read or refused.
        for (at, to) in (0..right.len()).flat_map(|at| [0, 1, 127, 255].map(|to| (at, to))) {
            let _ = changed(at, &[to]);
        }
    }
}
