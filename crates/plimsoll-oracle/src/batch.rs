//! A batch of cases as the programs read it, and as they leave it.
//!
//! Words of eight bytes, little-endian, from 4 MiB into RAM on:
//!
//! ```text
//! word  0    1     2..15      16..              of the batch
//!       n    done  the run's  n cases
//!
//! word  0..7       8..14      15     16..       of a case
//!       the case's outcome    words  that many pairs of address and word
//! ```
//!
//! The program counts in `done`, writes the outcome, and puts into the place of each word what it found there after the access. Then
//! it gives memory back what was there before the case.
use crate::verdict::{Case, Outcome};

/// Where a batch begins in RAM.
pub const OFFSET: u64 = 4 << 20;
/// How long it may be: what comes next is the tables'.
pub const BYTES_MAX: u64 = 120 << 20;
/// Words before the cases, and before a case's pairs.
const HEAD: usize = 16;
const DONE: usize = 1;
/// Where the words that are the run's begin.
const RUN: usize = 2;
const OUTCOME: usize = 8;
const COUNT: usize = 15;

/// The bytes of a batch.
pub fn write<C: Case>(run: &[u64], cases: &[C]) -> Vec<u8> {
    let mut words = vec![0; HEAD];
    words[0] = cases.len() as u64;
    words[RUN..RUN + run.len()].copy_from_slice(run);
    for case in cases {
        let memory = case.memory().words();
        words.extend(case.head());
        words.extend([0; COUNT - OUTCOME]);
        words.push(memory.len() as u64);
        words.extend(memory.iter().flat_map(|(at, word)| [*at, *word]));
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// How many cases of a batch are done.
pub fn done(bytes: &[u8]) -> u64 {
    word(bytes, DONE)
}

/// What came of the cases of a batch, all of which are done.
pub fn read<C: Case>(bytes: &[u8], cases: &[C]) -> Vec<Outcome> {
    let mut at = HEAD;
    let outcome = |case: &C| {
        let outputs = std::array::from_fn(|number| word(bytes, at + OUTCOME + number));
        at += HEAD;
        let memory = case.memory().words();
        let after = memory.keys().map(|address| {
            at += 2;
            (*address, word(bytes, at - 1))
        });
        Outcome { outputs, after: after.collect() }
    };
    cases.iter().map(outcome).collect()
}

fn word(bytes: &[u8], number: usize) -> u64 {
    let found = bytes.get(number * 8..number * 8 + 8).and_then(|bytes| bytes.try_into().ok());
    found.map_or(0, u64::from_le_bytes)
}
