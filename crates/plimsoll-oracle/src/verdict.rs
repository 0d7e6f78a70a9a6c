//! What a case should come to, what it came to, and the difference.
use crate::Ram;
use std::collections::BTreeMap;
use std::fmt::{self, Write};

/// One access, with all it depends on.
pub trait Case: Clone + fmt::Debug {
    /// What the outcome's words are called; `None` for those that say nothing.
    const OUTPUTS: [Option<&'static str>; 7];

    /// The eight words that the program reads.
    fn head(&self) -> [u64; 8];

    /// Memory before the access.
    fn memory(&self) -> &Ram;

    /// The outcome's words as they are compared, of those that the program wrote.
    fn outputs(&self, written: [u64; 7]) -> [u64; 7] {
        written
    }

    /// What the crate says of it.
    fn expect(&self) -> Expected;

    /// The entries on the way, decoded.
    fn path(&self) -> String;
}

/// What a case should come to.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its kind, to be counted by.
    pub kind: String,
    /// The outcome's words, as far as they are known.
    pub outputs: [Option<u64>; 7],
    /// Memory after the access.
    pub after: BTreeMap<u64, u64>,
    /// Bits that may have been set in memory besides: accessed bits of entries that the walk passed before a fault.
    pub may_be_set: u64,
}

/// What a case came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The outcome's words.
    pub outputs: [u64; 7],
    /// Memory after the access, where there was a word before.
    pub after: BTreeMap<u64, u64>,
}

/// A case on which the crate and the model disagree.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// Its number in the batch.
    pub number: usize,
    /// What differs.
    pub difference: String,
    /// The case and the entries on its way.
    pub case: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {}: {}\n{}", self.number, self.difference, self.case)
    }
}

/// What a batch came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cases of each kind.
    pub kinds: BTreeMap<String, usize>,
    /// Where the two disagree.
    pub mismatches: Vec<Mismatch>,
}

impl Report {
    /// Compares the expectations of `cases` with what the same, or others, came to.
    pub fn new<C: Case>(cases: &[C], outcomes: &[Outcome]) -> Self {
        let mut report = Self::default();
        for (number, (case, outcome)) in cases.iter().zip(outcomes).enumerate() {
            let expected = case.expect();
            if let Some(difference) = difference(case, &expected, outcome) {
                let case = format!("expected: {}\n{case:x?}\n{}", expected.kind, case.path());
                report.mismatches.push(Mismatch { number, difference, case });
            }
            *report.kinds.entry(expected.kind).or_default() += 1;
        }
        report
    }

    /// How many cases there were.
    pub fn cases(&self) -> usize {
        self.kinds.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} cases, {} mismatches", self.cases(), self.mismatches.len())?;
        self.kinds.iter().try_for_each(|(kind, count)| writeln!(f, "{count:>7} {kind}"))
    }
}

fn difference<C: Case>(case: &C, expected: &Expected, outcome: &Outcome) -> Option<String> {
    let mut found = String::new();
    for ((name, wanted), got) in C::OUTPUTS.iter().zip(expected.outputs).zip(case.outputs(outcome.outputs)) {
        if let (Some(name), Some(wanted)) = (name, wanted)
            && wanted != got
        {
            let _ = write!(found, "{name} is {got:#x} and not {wanted:#x}; ");
        }
    }
    for (at, got) in &outcome.after {
        let wanted = expected.after.get(at).copied().unwrap_or(0);
        let more = got & !wanted;
        if wanted & !got != 0 || more & !expected.may_be_set != 0 {
            let _ = write!(found, "the word at {at:#x} is {got:#x} and not {wanted:#x}; ");
        }
    }
    (!found.is_empty()).then_some(found)
}
