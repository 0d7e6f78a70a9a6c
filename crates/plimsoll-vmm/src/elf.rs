//! The program headers of a static 64-bit x86 ELF file: where each piece of the guest image goes.
//!
//! Enters: the bytes of a file. Leaves: its entry point and its loadable segments, each inside the window the image
//! may occupy, none overlapping another. Every number of the file is checked before it is used, although the file is
//! our own build's: a linker that changes its mind shall end in a sentence, not in a guest that jumps into nothing.
//! Layout and names are those of the System V ABI, "Object Files".
use plimsoll_types::Gpa;
use std::ops::Range;
use thiserror::Error;

const HEADER_BYTES: usize = 64;
const SEGMENT_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;

/// A guest program, ready to be copied.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program<'file> {
    /// Where the first instruction lies.
    pub(crate) entry: Gpa,
    /// What to copy where, ascending.
    pub(crate) segments: Vec<Segment<'file>>,
}

/// One piece of a program. Memory behind `bytes` up to `memory_bytes` must read as zero.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Segment<'file> {
    /// Where it starts.
    pub(crate) start: Gpa,
    /// What the file holds of it.
    pub(crate) bytes: &'file [u8],
    /// How long it is in memory.
    pub(crate) memory_bytes: u64,
}

/// A file that is not a program we can load.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ElfError {
    /// Not a static x86-64 ELF executable.
    #[error("the guest image is not a static little-endian x86-64 ELF executable")]
    Kind,
    /// A header or segment reaches past the end of the file.
    #[error("the guest image ends inside the {bytes} bytes at offset {offset}")]
    Truncated {
        /// Where the piece starts.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// A segment lies outside the window, is out of order, or is larger in the file than in memory.
    #[error(
        "the guest image's segment of {bytes} bytes at {start} lies outside its window or on another one"
    )]
    Segment {
        /// Where it wants to go.
        start: Gpa,
        /// Its length in memory.
        bytes: u64,
    },
    /// The entry point is in no segment.
    #[error("the guest image's entry point {entry} is in none of its segments")]
    Entry {
        /// As the header says.
        entry: Gpa,
    },
}

fn bytes_at(file: &[u8], offset: u64, bytes: u64) -> Result<&[u8], ElfError> {
    let truncated = ElfError::Truncated { offset, bytes };
    let range = || {
        let start = usize::try_from(offset).ok()?;
        file.get(start..start.checked_add(usize::try_from(bytes).ok()?)?)
    };
    range().ok_or(truncated)
}

fn number<const N: usize>(file: &[u8], offset: u64) -> Result<[u8; N], ElfError> {
    let truncated = ElfError::Truncated { offset, bytes: N as u64 };
    bytes_at(file, offset, N as u64)?.first_chunk().copied().ok_or(truncated)
}

fn u16_at(file: &[u8], offset: u64) -> Result<u16, ElfError> {
    number(file, offset).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], offset: u64) -> Result<u32, ElfError> {
    number(file, offset).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], offset: u64) -> Result<u64, ElfError> {
    number(file, offset).map(u64::from_le_bytes)
}

/// Reads the headers of `file`, whose segments must lie in `window`.
///
/// # Errors
/// [`ElfError`] names what is wrong.
pub(crate) fn parse(file: &[u8], window: Range<u64>) -> Result<Program<'_>, ElfError> {
    bytes_at(file, 0, HEADER_BYTES as u64)?;
    // Magic, 64-bit, little endian.
    if file[..6] != [0x7f, b'E', b'L', b'F', 2, 1]
        || u16_at(file, 16)? != ET_EXEC
        || u16_at(file, 18)? != EM_X86_64
        || usize::from(u16_at(file, 54)?) != SEGMENT_HEADER_BYTES
    {
        return Err(ElfError::Kind);
    }
    let entry = Gpa(u64_at(file, 24)?);
    let table = u64_at(file, 32)?;
    let mut segments = Vec::new();
    let mut free_from = window.start;
    for index in 0..u64::from(u16_at(file, 56)?) {
        let truncated = ElfError::Truncated { offset: table, bytes: SEGMENT_HEADER_BYTES as u64 };
        let at = table.checked_add(index * SEGMENT_HEADER_BYTES as u64).ok_or(truncated)?;
        let header = bytes_at(file, at, SEGMENT_HEADER_BYTES as u64)?;
        let memory_bytes = u64_at(header, 40)?;
        if u32_at(header, 0)? != PT_LOAD || memory_bytes == 0 {
            continue;
        }
        let start = u64_at(header, 16)?;
        let bytes = bytes_at(file, u64_at(header, 8)?, u64_at(header, 32)?)?;
        let end = start
            .checked_add(memory_bytes)
            .filter(|end| start >= free_from && *end <= window.end && bytes.len() as u64 <= memory_bytes);
        free_from = end.ok_or(ElfError::Segment { start: Gpa(start), bytes: memory_bytes })?;
        segments.push(Segment { start: Gpa(start), bytes, memory_bytes });
    }
    let inside = |segment: &Segment<'_>| entry.0.wrapping_sub(segment.start.0) < segment.memory_bytes;
    if segments.iter().any(inside) { Ok(Program { entry, segments }) } else { Err(ElfError::Entry { entry }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Range<u64> = 0x20_0000..0x40_0000;

    /// A file with one segment of four bytes at `start` that is `memory` bytes long in memory.
    fn file(start: u64, memory: u64) -> Vec<u8> {
        let mut file = vec![0; HEADER_BYTES + SEGMENT_HEADER_BYTES];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        file[16] = 2;
        file[18] = 62;
        file[24..32].copy_from_slice(&start.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 1;
        file[64 + 8] = 120;
        file[64 + 16..64 + 24].copy_from_slice(&start.to_le_bytes());
        file[64 + 32] = 4;
        file[64 + 40..64 + 48].copy_from_slice(&memory.to_le_bytes());
        file.extend_from_slice(b"code");
        file
    }

    #[test]
    fn a_segment_is_found_with_its_bytes_and_its_zeroes() {
        let file = file(0x20_1000, 0x2000);
        let program = parse(&file, WINDOW).unwrap();
        assert_eq!(program.entry, Gpa(0x20_1000));
        let expected = Segment { start: Gpa(0x20_1000), bytes: b"code", memory_bytes: 0x2000 };
        assert_eq!(program.segments, [expected]);
    }

    #[test]
    fn segments_outside_the_window_or_larger_in_the_file_are_refused() {
        for (start, memory) in
            [(0x1f_f000, 16), (0x3f_f000, 0x1001), (0x20_0000, 3), (u64::MAX - 1, 16), (0x20_0000, u64::MAX)]
        {
            let error = ElfError::Segment { start: Gpa(start), bytes: memory };
            assert_eq!(parse(&file(start, memory), WINDOW), Err(error));
        }
    }

    #[test]
    fn every_truncation_of_a_good_file_is_an_error() {
        let good = file(0x20_0000, 4096);
        for len in 0..good.len() {
            assert!(matches!(parse(&good[..len], WINDOW), Err(ElfError::Truncated { .. })), "{len} bytes");
        }
    }

    #[test]
    fn other_files_and_entry_points_in_nothing_are_refused() {
        let mut script = file(0x20_0000, 16);
        script[..4].copy_from_slice(b"#!sh");
        assert_eq!(parse(&script, WINDOW), Err(ElfError::Kind));
        let mut astray = file(0x20_0000, 16);
        astray[24] = 16;
        assert_eq!(parse(&astray, WINDOW), Err(ElfError::Entry { entry: Gpa(0x20_0010) }));
    }

    #[test]
    fn no_single_byte_change_makes_the_parser_panic_or_leave_the_window() {
        let good = file(0x20_0000, 4096);
        for index in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[index] = value;
                if let Ok(program) = parse(&bad, WINDOW) {
                    for segment in program.segments {
                        assert!(segment.start.0 >= WINDOW.start);
                        assert!(segment.start.0 + segment.memory_bytes <= WINDOW.end);
                    }
                }
            }
        }
    }
}
