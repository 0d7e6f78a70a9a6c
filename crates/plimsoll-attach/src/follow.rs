//! Keeping up with a machine: its dossier enters, what changed leaves, each time somebody asks. A look at a machine that
//! did not change costs one read of maps. One that is migrated or served by a userfaultfd is inspected again and again until
//! that has ended.
//!
//! What must never happen: a range that is not the machine's any more goes on being managed. After an exec the same
//! process with the same start time runs another program over new mappings; that ends the machine as its exit does.

use crate::Refusal;
use crate::dossier::Dossier;
use crate::held::Held;
use crate::inspect::{Request, inspect};
use crate::ram::RamRange;
use plimsoll_types::ByteCount;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Smaller mappings are not watched: thread stacks and arenas come and go, RAM blocks are not that small.
const WATCHED_MIN: ByteCount = ByteCount::mib(16);
/// Between two inspections of a machine that is in a passing state: each walks its page tables, 10 ms for a GiB or so.
const PASSING_EVERY: Duration = Duration::from_secs(2);

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Guest RAM was added.
    Came(RamRange),
    /// Guest RAM is gone: stop managing it at once.
    Went(RamRange),
    /// The process ended.
    Exited,
    /// The process runs another program: the machine is gone.
    Execed {
        /// What it runs now.
        program: PathBuf,
    },
}

/// A machine that is followed.
#[derive(Debug)]
pub struct Follower {
    held: Held,
    request: Request,
    dossier: Dossier,
    fingerprint: u64,
    inspected: Instant,
    ended: bool,
}

impl Follower {
    /// Inspects the machine and follows it from there.
    pub fn new(held: Held, request: Request) -> Result<Self, Refusal> {
        // In this order: what changes in between is seen by the first look.
        let fingerprint = held.fingerprint(WATCHED_MIN)?;
        let dossier = inspect(&held, &request)?;
        Ok(Self { held, request, dossier, fingerprint, inspected: Instant::now(), ended: false })
    }

    /// What is known now.
    pub fn dossier(&self) -> &Dossier {
        &self.dossier
    }

    /// The process.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Looks again. An error says that something could not be found out, and leaves everything as it was, so that the
    /// next look tries again; ranges that are gone are reported even so.
    pub fn poll(&mut self) -> Result<Vec<Change>, Refusal> {
        if self.ended {
            return Ok(Vec::new());
        }
        match self.look() {
            Err(Refusal::Ended(_)) => Ok(self.end(Change::Exited)),
            outcome => outcome,
        }
    }

    fn look(&mut self) -> Result<Vec<Change>, Refusal> {
        let fingerprint = self.held.fingerprint(WATCHED_MIN)?;
        let may_have_passed = self.dossier.is_passing() && self.inspected.elapsed() >= PASSING_EVERY;
        if fingerprint == self.fingerprint && !may_have_passed {
            return Ok(Vec::new());
        }
        let program = self.held.program()?.path;
        if program != self.dossier.program && !is_replaced(&program, &self.dossier) {
            return Ok(self.end(Change::Execed { program }));
        }
        let mut gone = Vec::new();
        for range in &self.dossier.ram {
            if !self.held.has_mapped(range.hva)? {
                gone.push(range.clone());
            }
        }
        let is_gone = |range: &RamRange| gone.iter().any(|other| other.hva == range.hva);
        if !gone.is_empty() && gone.len() == self.dossier.ram.len() {
            // The same program again, or one that has thrown its machine away.
            return Ok(self.end(Change::Execed { program }));
        }
        self.inspected = Instant::now();
        let now = match inspect(&self.held, &self.request_without(&gone)) {
            Ok(now) => now,
            Err(_) if !gone.is_empty() => {
                // Until something changes again, it would not add up any better.
                self.fingerprint = fingerprint;
                self.dossier.ram.retain(|range| !is_gone(range));
                return Ok(gone.into_iter().map(Change::Went).collect());
            }
            Err(error) => return Err(error),
        };
        let knows = |ram: &[RamRange], range: &RamRange| ram.iter().any(|other| other.hva == range.hva);
        let went = self.dossier.ram.iter().filter(|range| !knows(&now.ram, range));
        let came = now.ram.iter().filter(|range| !knows(&self.dossier.ram, range));
        let changes = went.cloned().map(Change::Went).chain(came.cloned().map(Change::Came)).collect();
        (self.dossier, self.fingerprint) = (now, fingerprint);
        Ok(changes)
    }

    /// Ranges that the operator named and that are gone would be refused.
    fn request_without(&self, gone: &[RamRange]) -> Request {
        let mut request = self.request.clone();
        request.ranges.retain(|range| gone.iter().all(|other| other.hva != *range));
        request
    }

    fn end(&mut self, how: Change) -> Vec<Change> {
        self.ended = true;
        let went = std::mem::take(&mut self.dossier.ram).into_iter().map(Change::Went);
        went.chain([how]).collect()
    }
}

/// True when the only difference is that the program's file was replaced under the running process.
fn is_replaced(now: &std::path::Path, before: &Dossier) -> bool {
    let bare = |path: &std::path::Path| path.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
    bare(now) == bare(&before.program)
}
