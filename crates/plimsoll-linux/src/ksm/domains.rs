//! Whose pages may be merged with whose.
//!
//! Enters: the machines that are to share, each with its domain, and every other process of the host. Leaves: nothing, or
//! the two that must not be merged. What must never happen: KSM scanning while memory of two domains is mergeable. KSM knows
//! no domains and merges whatever is alike; a guest that times its writes then learns what others have in memory.
//!
//! A machine without a domain is one of its own. A process that is mergeable and not among the machines is of an
//! *unknown* domain, which is nobody's.
//!
//! Known hole: a process may make itself mergeable between two looks. It is found at the next one, and everything is
//! unmerged then.
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::{self, ProcfsError};
use plimsoll_types::DomainId;
use std::fmt;
use std::io;

/// Somebody whose pages KSM may merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// What the operator calls it, or its program.
    pub name: String,
    /// Its process.
    pub process: ProcessId,
    /// Which domain.
    pub domain: Domain,
}

/// Where a party belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// It shares with the others of this domain.
    Shared(DomainId),
    /// It shares with nobody.
    Own,
    /// It is not ours.
    Unknown,
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared(domain) => write!(f, "{domain}"),
            Self::Own => f.write_str("a domain of its own"),
            Self::Unknown => f.write_str("an unknown domain"),
        }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({}, {})", self.name, self.process, self.domain)
    }
}

/// Memory cannot be merged on this host as it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DomainError {
    /// Two parties that must not share.
    #[error(
        "{first} and {second} could have pages merged with each other, and KSM knows no domains: put both into one sharing \
         domain, or end one, or start it without merging (QEMU: -machine mem-merge=off)"
    )]
    Conflict {
        /// A machine.
        first: Party,
        /// Another machine, or a process that is none.
        second: Party,
    },
    /// The processes of the host cannot be listed.
    #[error("cannot list /proc")]
    List(#[source] io::Error),
    /// Whether a process is mergeable cannot be seen.
    #[error("cannot see whose memory is mergeable")]
    Look(#[from] ProcfsError),
}

/// Looks whether all parties, and every other process of the host whose memory is mergeable, may share.
///
/// # Errors
/// [`DomainError`].
pub fn check(parties: &[Party]) -> Result<(), DomainError> {
    let mut all = parties.to_vec();
    for entry in std::fs::read_dir("/proc").map_err(DomainError::List)? {
        let name = entry.map_err(DomainError::List)?.file_name();
        let process = name.to_str().and_then(|name| name.parse().ok()).and_then(ProcessId::new);
        let Some(process) = process.filter(|process| parties.iter().all(|party| party.process != *process))
        else {
            continue;
        };
        match procfs::is_mergeable(process) {
            Ok(true) => all.push(stranger(process)),
            Ok(false) | Err(ProcfsError::NoProcess(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match conflict(&all) {
        Some((first, second)) => Err(DomainError::Conflict { first: first.clone(), second: second.clone() }),
        None => Ok(()),
    }
}

fn stranger(process: ProcessId) -> Party {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", process.get())).unwrap_or_default();
    Party { name: name.trim_end().to_owned(), process, domain: Domain::Unknown }
}

/// The first two that must not share. A stranger alone is no conflict: nobody of ours is merged with it.
fn conflict(parties: &[Party]) -> Option<(&Party, &Party)> {
    let (first, others) = parties.split_first()?;
    let may_share = |other: &Party| matches!(first.domain, Domain::Shared(_)) && other.domain == first.domain;
    let second = others.iter().find(|other| !may_share(other))?;
    Some((first, second))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parties(domains: &[Domain]) -> Vec<Party> {
        let party = |(number, domain): (u32, &Domain)| Party {
            name: format!("m{number}"),
            process: ProcessId::new(number).unwrap(),
            domain: *domain,
        };
        (1..).zip(domains).map(party).collect()
    }

    #[test]
    fn only_machines_of_one_domain_may_share() {
        use Domain::{Own, Shared, Unknown};
        let (one, two) = (Shared(DomainId(1)), Shared(DomainId(2)));
        for (domains, is_fine) in [
            (&[][..], true),
            (&[Own], true),
            (&[one, one, one], true),
            (&[one, one, two], false),
            (&[Own, Own], false),
            (&[one, Own], false),
            (&[one, Unknown], false),
            (&[Own, Unknown], false),
            (&[Unknown, Unknown], false),
        ] {
            assert_eq!(conflict(&parties(domains)).is_none(), is_fine, "{domains:?}");
        }
    }

    #[test]
    fn a_conflict_names_both_with_their_domains_and_says_what_to_do() {
        let both = parties(&[Domain::Shared(DomainId(1)), Domain::Unknown]);
        let (first, second) = conflict(&both).map(|(a, b)| (a.clone(), b.clone())).unwrap();
        let text = DomainError::Conflict { first, second }.to_string();
        for part in ["\"m1\" (pid 1, domain1)", "\"m2\" (pid 2, an unknown domain)", "mem-merge=off"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
