//! Writes that may still be under way, and what the disk refuses.
//!
//! Enters: writes that came to an error, or in which a manager died. Leaves: their places, once nothing of them is under way. What
//! must never happen: a write that is done over something that came to its place later.
//!
//! # A write may be done late
//! A manager that is killed leaves a request in a queue, or with a server. One that was refused may be done all the same: the
//! kernel gave up waiting, and the device, the array or the server did not; of a request that was cut into several, one failed
//! and another has not been answered; a short count says what is there, and nothing of the rest. So there is one rule:
//!
//! *A place to which a write went that did not end in success is not used again until every sector of that write has been seen
//! on the disk.*
//!
//! This is enough if (1) a write of which the disk has said that it took all of it is done; (2) no sector of a write is done twice, the
//! second time after it was seen; (3) what was read comes from where it was written to. The first two hold for whatever a file system
//! stands on: where they do not, it is lost as well. The third is not left to belief: [`shows_what_has_landed`](super::device::Disk::shows_what_has_landed) is
//! true only where the kernel says that reads go past its cache, and elsewhere no place in doubt is ever used again.
//!
//! That nothing else is under way anywhere follows from these:
//!
//! * *One write a place.* A segment is one call, and never gone on with or repeated in the same place: two writes of the same
//!   bytes could not be told apart, and to see the second would prove nothing of the first. So a short count is a refusal, and so is
//!   a call that a signal ended.
//! * *It is said before it is done.* The table names the sequence number before the disk is asked, and until the disk has taken
//!   all of it: whoever dies in between leaves the place in doubt. Sequence numbers are used for one segment's bytes each, so no
//!   earlier or later writing of the place passes for this one.
//! * *Every sector is looked at.* The header's check, the tags of the entries, and that of the directory, which goes to the end of
//!   its block, leave no sector of what was written without a part that only this writing has.
//! * *No room is no doubt.* Room is asked for before anything is written, so a disk that is full costs no place. One that
//!   promises and does not keep it has refused a write as any other.
//! * *A tier has a file of its own.* What an earlier one was still writing goes to a file that was removed
//!   ([`FileDisk::create`](super::device::FileDisk::create)). On a block device nothing is known of an earlier tier's writes. A kernel does
//!   not give such a device to a second opener before the first one's requests have been answered, so only one that was refused, or
//!   one beyond a network, could come late: give a device that timed out to another tier after it was reset.
//! * *A manager is gone before the next one writes.* The keeper starts that when the process has ended, all its threads with it, and
//!   a thread in a write on a local disk does not end before the write has.
//!
//! A disk that refuses is *tried* before anything else is risked with it, in a place that is in doubt anyhow. After that more
//! than one write may be under way there, which no reading can tell apart: the place is spoilt, for good. So a disk that refuses
//! everything for a day costs the places of the first attempt, and not one each time.
use super::device::write_once;
use super::draft::Closed;
use super::error::WriteError;
use super::format::offset_of;
use super::image::Image;
use super::table::Holds;
use super::tier::{Duty, Purpose, State, Tier};
use std::io;
use std::time::{Duration, Instant};

/// Places that are looked at in one go: each is a segment to be read.
const LOOKS: usize = 4;

/// Why the disk is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It gave no room for another segment. Those that have theirs can be written.
    NoRoom,
    /// It had none for a segment that was being written, although that had been promised, or it promises nothing.
    RoomRefused,
    /// It took nothing.
    Refused,
}

/// The disk is left alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rest {
    pub(super) until: Instant,
    patience: Duration,
    pub(super) trouble: Trouble,
}

impl Tier {
    /// Tries whether a disk that has refused takes something again, in a place that is given up for that.
    pub(super) fn try_out(&self, closed: &mut Closed, purpose: Purpose) -> Result<(), WriteError> {
        let Some(place) = self.place_to_try(purpose, Instant::now()) else { return Ok(()) };
        write_once(&*self.disk, offset_of(place), closed.at(place))
            .map_err(|error| self.without_room(error, Trouble::RoomRefused))?;
        self.state.lock().rest = None;
        Ok(())
    }

    fn place_to_try(&self, purpose: Purpose, now: Instant) -> Option<u32> {
        let mut state = self.state.lock();
        let State { rest, doubtful, spoilt, segments, .. } = &mut *state;
        let is_due = |rest: &Rest| match rest.trouble {
            Trouble::NoRoom => false,
            // What has its room can be cleaned into.
            Trouble::RoomRefused => rest.until <= now && purpose == Purpose::Demote,
            Trouble::Refused => rest.until <= now,
        };
        rest.as_ref().filter(|rest| is_due(rest))?;
        if spoilt.is_none() {
            let place = doubtful.pop_back()?;
            self.table.set(place, Holds::Spoilt);
            if let Some(segment) = segments.get_mut(place as usize) {
                segment.duty = Duty::Spoilt;
            }
            *spoilt = Some(place);
        }
        *spoilt
    }

    /// What a refusal means. One for want of room has the disk left alone as far as that goes.
    pub(super) fn without_room(&self, error: io::Error, trouble: Trouble) -> WriteError {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.rest(trouble);
            self.state.lock().stats.no_room += 1;
            return WriteError::NoSpace(error);
        }
        self.state.lock().stats.refused += 1;
        WriteError::Failed(error)
    }

    pub(super) fn rest(&self, trouble: Trouble) {
        let [first, most] = self.patience;
        let mut state = self.state.lock();
        let patience = state.rest.map_or(first, |rest| (rest.patience * 2).min(most));
        state.rest = Some(Rest { until: Instant::now() + patience, patience, trouble });
    }

    /// A write did not end in success. The table has it as being written, and keeps it so.
    pub(super) fn doubt(&self, number: u32) {
        let mut state = self.state.lock();
        if let Some(segment) = state.segments.get_mut(number as usize) {
            segment.duty = Duty::Doubtful;
            state.doubtful.push_back(number);
        }
    }

    /// Looks whether writes that were in doubt have ended, some at a time. What all of is there is free: nobody's record names it.
    pub fn prove(&self) {
        if !self.disk.shows_what_has_landed() {
            return;
        }
        let doubtful: Vec<u32> = self.state.lock().doubtful.iter().copied().take(LOOKS).collect();
        for number in doubtful {
            let Holds::Writing(sequence) = self.table.holds(number) else { continue };
            let image = Image::read(&*self.disk, self, number, sequence);
            let has_landed = image.is_ok_and(|image| image.is_whole(self));
            let mut state = self.state.lock();
            let State { segments, free, doubtful, .. } = &mut *state;
            doubtful.retain(|other| *other != number);
            match segments.get_mut(number as usize).filter(|segment| segment.duty == Duty::Doubtful) {
                Some(segment) if has_landed => self.set_free(number, segment, free),
                Some(_) => doubtful.push_back(number),
                None => {}
            }
        }
    }
}
