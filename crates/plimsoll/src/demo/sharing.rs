//! Pages that the demo's guests have in common, kept once while they stay in use.
//!
//! Enters: running guests of one sharing domain. Leaves: KSM run over the blocks that have twins, which their VMMs were asked
//! to mark, and what that saved and cost. At the end KSM is as it was found. What must never happen: a VMM that does not answer
//! keeps the demo waiting.
//!
//! Only a process itself can mark its memory, and a VMM of ours obeys nobody but its starter. That is the demo, so it is here
//! that our own machines are guided; `plimsoll share` has no line to a machine that somebody else started.
use super::Interrupt;
use super::fleet::{Guest, Merging as Answer, send};
use super::report::SharingReport;
use plimsoll_linux::explain;
use plimsoll_linux::ksm::{Guide, KsmError, Marker, Member, Merged, Options};
use plimsoll_sys::mapping::Merging;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{BLOCK_SIZE, ByteCount, DomainId, Hva, MachineId};
use plimsoll_vmm::control::{Command, MergeRange, Ram};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Between two looks at what is worth merging. KSM's pace is set at every turn.
const ROUND: Duration = Duration::from_secs(2);
/// How long a guest may take until it runs, once its memory is in place and handed over.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether it does.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a VMM may take to mark some blocks, for which it waits for no page. It is waited for that long once: after that it is
/// asked again only when its answer has come.
const MARK_PATIENCE: Duration = Duration::from_secs(5);

/// Guided sharing of the demo's guests.
pub(super) struct Sharing {
    guide: Guide,
    next_round: Instant,
    blocks: u64,
    /// Why everything was unmerged last, if so.
    hindered: Option<String>,
    /// Why nothing is shared any more, if so.
    failed: Option<String>,
}

impl Sharing {
    /// Takes KSM for these guests, once they run.
    pub(super) fn start(
        guests: &mut [Guest],
        ids: &[MachineId],
        domain: DomainId,
        interrupt: &Interrupt,
    ) -> Result<Self, String> {
        let members = guests.iter_mut().zip(ids).map(|(guest, id)| member(guest, *id, domain, interrupt));
        let members: Vec<Member> = members.collect::<Result<_, _>>()?;
        let bytes = members.iter().flat_map(|member| &member.ranges).map(|range| range.len().0).sum::<u64>();
        let guide = Guide::start(members, Options::default())
            .map_err(|error| format!("--share: {}", explain(&error)))?;
        let blocks = bytes / BLOCK_SIZE as u64;
        Ok(Self { guide, next_round: Instant::now(), blocks, hindered: None, failed: None })
    }

    /// Looks for twins when that is due, and sets KSM's pace.
    pub(super) fn turn(&mut self) {
        if self.failed.is_some() {
            return;
        }
        let mut outcome = Ok(());
        if Instant::now() >= self.next_round {
            self.next_round = Instant::now() + ROUND;
            outcome = self.guide.round().map(drop);
        }
        match outcome.and_then(|()| self.guide.tick()) {
            Ok(_) => {}
            // Everything is unmerged, and merged again once nobody is in the way any more.
            Err(error @ KsmError::Domains(_)) => self.hindered = Some(explain(&error)),
            Err(error) => self.failed = Some(explain(&error)),
        }
    }

    /// Gives KSM back. What is merged stays so until it is written or captured, and goes with its guests.
    pub(super) fn end(self) -> Result<SharingReport, String> {
        let report = self.guide.end(Merged::Keep).map_err(|error| explain(&error))?;
        if let Some(why) = self.failed {
            return Err(format!("pages were not shared to the end: {why}"));
        }
        Ok(SharingReport {
            hindered: self.hindered,
            saved_bytes: report.saved.bytes().0,
            merged_bytes: report.merged.bytes().0,
            marked_blocks: report.seen.marked,
            blocks: self.blocks,
            refused_blocks: report.refused,
            ksmd_cpu_seconds: report.ksmd.as_secs_f64(),
            looking_cpu_seconds: report.scout.as_secs_f64(),
            us_a_merged_page: report.cost().map(|cost| cost.as_secs_f64() * 1e6),
        })
    }
}

fn member(
    guest: &mut Guest,
    id: MachineId,
    domain: DomainId,
    interrupt: &Interrupt,
) -> Result<Member, String> {
    let ram = started(guest, interrupt)?;
    let range = |ram: &Ram| HvaRange::new(Hva(ram.hva), ByteCount(ram.bytes));
    let ranges = ram.iter().map(range).collect::<Option<_>>();
    let ranges = ranges.ok_or_else(|| format!("{} says that its memory is nowhere", guest.name))?;
    let (control, answers) = guest.merging()?;
    let process = ProcessId::new(guest.pid()).ok_or_else(|| format!("{} has no process", guest.name))?;
    let marker: Box<dyn Marker> =
        Box::new(Asked { ram, control, answers, patience: MARK_PATIENCE, owes: false });
    Ok(Member { id, name: guest.name.clone(), process, domain: Some(domain), ranges, marker: Some(marker) })
}

/// Waits until a guest runs, and says where its memory is.
fn started(guest: &mut Guest, interrupt: &Interrupt) -> Result<Vec<Ram>, String> {
    let begun = Instant::now();
    loop {
        let state = guest.state();
        if !state.ram.is_empty() {
            return Ok(state.ram);
        }
        let ended = state.died.or_else(|| guest.untimely_end());
        if let Some(why) = ended {
            return Err(format!("{} did not start: {why}", guest.name));
        }
        if interrupt.is_set() {
            return Err(format!("interrupted before {} ran", guest.name));
        }
        if begun.elapsed() > START_PATIENCE {
            return Err(format!("{} did not start within {} s", guest.name, START_PATIENCE.as_secs()));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Marks through the VMM itself.
struct Asked {
    ram: Vec<Ram>,
    control: UnixStream,
    answers: Receiver<Answer>,
    patience: Duration,
    /// It has not answered what it was asked last.
    owes: bool,
}

impl Marker for Asked {
    fn mark(&mut self, range: HvaRange, merging: Merging) -> io::Result<()> {
        let nowhere = || io::Error::other(format!("{range} is no memory of the guest's"));
        let asked = MergeRange::in_guest(&self.ram, range, merging).ok_or_else(nowhere)?;
        self.owes &= self.answers.try_recv().is_err();
        if self.owes {
            return Err(io::ErrorKind::TimedOut.into());
        }
        send(&self.control, &Command::Merge(asked))?;
        let until = Instant::now() + self.patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let answer = self.answers.recv_timeout(left).map_err(|error| {
                self.owes = error == RecvTimeoutError::Timeout;
                io::Error::other(error)
            })?;
            // Another is none to this.
            if answer.range == asked {
                return answer.refused.map_or(Ok(()), |why| Err(io::Error::other(why)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_vmm::control::MergeMode;
    use std::io::Read;

    #[test]
    fn a_vmm_that_does_not_answer_is_waited_for_once_and_asked_again_when_it_did() {
        const PATIENCE: Duration = Duration::from_millis(200);
        const BLOCK: u64 = BLOCK_SIZE as u64;
        let (control, vmm) = UnixStream::pair().unwrap();
        let (sender, answers) = std::sync::mpsc::channel();
        let ram = vec![Ram { gpa: 0, hva: 0x7000_0000_0000, bytes: 64 * BLOCK }];
        let mut asked = Asked { ram, control, answers, patience: PATIENCE, owes: false };
        let block = |index| HvaRange::new(Hva(0x7000_0000_0000 + index * BLOCK), ByteCount(BLOCK)).unwrap();
        let answer = |refused| {
            let range = MergeRange { gpa: 0, bytes: BLOCK, merging: MergeMode::Offered };
            sender.send(Answer { range, refused }).unwrap();
        };
        let begun = Instant::now();
        for index in 0..24 {
            asked.mark(block(index), Merging::Offered).unwrap_err();
        }
        let waited = begun.elapsed();
        assert!((PATIENCE..2 * PATIENCE).contains(&waited), "{waited:?}");
        // One question is on the line, and no more.
        let mut questions = [0; 4096];
        let length = (&vmm).read(&mut questions).unwrap();
        assert_eq!(questions[..length].iter().filter(|byte| **byte == b'\n').count(), 1);

        // Its late answer is not taken for one to what is asked then.
        answer(Some("late".to_owned()));
        let reply = std::thread::spawn({
            let sender = sender.clone();
            move || {
                assert!((&vmm).read(&mut questions).unwrap() > 0);
                let range = MergeRange { gpa: 30 * BLOCK, bytes: BLOCK, merging: MergeMode::Offered };
                sender.send(Answer { range, refused: None }).unwrap();
            }
        });
        asked.patience = MARK_PATIENCE;
        asked.mark(block(30), Merging::Offered).unwrap();
        reply.join().unwrap();
    }
}
