//! The headers of an ELF core file: what is where enters, the bytes before the contents leave.
//!
//! ```text
//! 0        64              64 + 56 * (1 + loads)     ...            content (a whole page)
//! header | a PT_NOTE and  | a section header, where | notes, each  | pages, where a hole is
//!        | a PT_LOAD each | 65,534 loads or more    | padded to 4  | a page of zeros
//! ```
//!
//! ELF-64, little-endian, x86-64 (System V ABI, gabi chapters 4 and 5; `PN_XNUM` of Linux and Solaris). A PT_LOAD names bytes by where they
//! are in the contents, so several may name the same: a page that is mapped twice is in the file once.
use plimsoll_types::{Gpa, PAGE_SIZE};

const HEADER: u64 = 64;
const SEGMENT: u64 = 56;
const SECTION: u64 = 64;
/// More segments than this are counted by the first section header.
const SEGMENTS_MAX: u64 = 0xfffe;

/// A PT_LOAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Its virtual address.
    pub gva: u64,
    /// Its physical one.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
    /// Where they are in the contents.
    pub offset: u64,
}

/// One note, padded: notes follow each other without more between them.
pub fn note(name: &str, kind: u32, description: &[u8]) -> Vec<u8> {
    let name_len = name.len() as u64 + 1;
    let mut bytes = Vec::new();
    put(&mut bytes, 4, name_len);
    put(&mut bytes, 4, description.len() as u64);
    put(&mut bytes, 4, kind.into());
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(description);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// All that comes before the contents, which begin where this ends.
pub fn headers(loads: &[Load], notes: &[u8]) -> Vec<u8> {
    let segments = loads.len() as u64 + 1;
    let sections = u64::from(segments > SEGMENTS_MAX);
    let sections_at = HEADER + SEGMENT * segments;
    let notes_at = sections_at + SECTION * sections;
    let content = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE as u64);
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let count = if sections > 0 { 0xffff } else { segments };
    // ET_CORE, EM_X86_64, EV_CURRENT, no entry.
    for (width, value) in [(2, 4), (2, 62), (4, 1), (8, 0), (8, HEADER), (8, sections * sections_at), (4, 0)]
    {
        put(&mut bytes, width, value);
    }
    for value in [HEADER, SEGMENT, count, SECTION * sections, sections, 0] {
        put(&mut bytes, 2, value);
    }
    segment(&mut bytes, 4, 0, [notes_at, 0, 0, notes.len() as u64, 4]);
    for load in loads {
        // Readable, writable, executable: what the guest may is in its tables.
        segment(&mut bytes, 1, 7, [content + load.offset, load.gva, load.gpa.0, load.len, PAGE_SIZE as u64]);
    }
    if sections > 0 {
        let start = bytes.len();
        bytes.resize(start + 44, 0);
        put(&mut bytes, 4, segments);
        bytes.resize(start + 64, 0);
    }
    bytes.extend_from_slice(notes);
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
    bytes
}

fn segment(bytes: &mut Vec<u8>, kind: u64, flags: u64, [offset, gva, gpa, len, align]: [u64; 5]) {
    put(bytes, 4, kind);
    put(bytes, 4, flags);
    for value in [offset, gva, gpa, len, len, align] {
        put(bytes, 8, value);
    }
}

/// The lowest `width` bytes.
fn put(bytes: &mut Vec<u8>, width: usize, value: u64) {
    bytes.extend(value.to_le_bytes().iter().take(width));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
        let mut word = [0; 8];
        word[..width].copy_from_slice(&bytes[at..at + width]);
        u64::from_le_bytes(word)
    }

    #[test]
    fn a_load_is_where_its_header_says() {
        let load = Load { gva: 0xffff_8880_0000_0000, gpa: Gpa(0x10_0000), len: 0x3000, offset: 0x5000 };
        let notes = note("CORE", 1, &[1, 2, 3, 4, 5]);
        assert_eq!(notes.len(), 12 + 8 + 8);
        let bytes = headers(&[load], &notes);
        assert_eq!(bytes.len(), 4096);
        assert_eq!((number(&bytes, 16, 2), number(&bytes, 18, 2), number(&bytes, 56, 2)), (4, 62, 2));
        let second = 64 + 56;
        assert_eq!(number(&bytes, second, 4), 1);
        let fields: Vec<u64> = (0..6).map(|place| number(&bytes, second + 8 + 8 * place, 8)).collect();
        assert_eq!(fields, [4096 + 0x5000, load.gva, load.gpa.0, 0x3000, 0x3000, 4096]);
        assert_eq!(number(&bytes, 64 + 8, 8), 64 + 2 * 56);
        assert_eq!(&bytes[64 + 2 * 56..64 + 2 * 56 + notes.len()], notes.as_slice());
    }

    #[test]
    fn more_loads_than_the_header_counts_are_counted_by_a_section() {
        let load = Load { gva: 0, gpa: Gpa(0), len: 4096, offset: 0 };
        let bytes = headers(&vec![load; 70_000], &[]);
        assert_eq!((number(&bytes, 56, 2), number(&bytes, 60, 2)), (0xffff, 1));
        let section = usize::try_from(number(&bytes, 40, 8)).unwrap();
        assert_eq!((section, number(&bytes, section + 44, 4)), (64 + 56 * 70_001, 70_001));
    }
}
