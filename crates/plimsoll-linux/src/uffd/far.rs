//! Reads of the disk that a pager does not wait for.
//!
//! Enters: handles of objects that lie away, as faults and read-ahead come to them. Leaves: the objects, when they have been read.
//! What must never happen: a pager that waits for the disk while faults of its machine can be served. So what is to be read is asked
//! for at a [`Desk`] of the one thread that reads for all pagers, which kicks the pager when something has come; the pager decrypts
//! and checks it when it comes by, together with whatever else came with it. What has been read already costs no wait at all.
//!
//! An answer is a copy of the object, good whatever becomes of the object meanwhile; the pager looks up its page's word again
//! before it uses one. What nobody asks for again is dropped.
use super::host::Domain;
use crate::disk::reader::Desk;
use crate::disk::tier::Tier;
use crate::disk::window::Window;
use crate::disk::{Fetch, Progress};
use crate::explain;
use plimsoll_store::{Fetched, Handle, SlabMemory};
use plimsoll_sys::eventfd::EventFd;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Answers kept that nobody has asked for again yet: more than faults and read-ahead ask for at once.
const KEPT_MAX: usize = 128;

/// An object as it was read, or why it could not be.
type Read = Result<Fetched, String>;

/// See the file's head.
pub struct Far<M: SlabMemory> {
    tier: Arc<Tier>,
    domain: Arc<Domain<M>>,
    desk: Desk,
    window: Window,
    /// What waits for a read, with that read's number.
    asked: Vec<(Fetch, u64)>,
    arrived: VecDeque<(Handle, Read)>,
}

/// What is known of an object that lies away.
pub enum Sight<'a> {
    /// It has been read, or could not be.
    Read(Result<&'a Fetched, String>),
    /// It is being read. The pager is kicked when it is there.
    UnderWay,
}

impl<M: SlabMemory> Far<M> {
    /// Has a tier read for a domain's pager, which is kicked.
    ///
    /// # Errors
    /// [`io::Error`] when there is no thread to be had.
    pub fn new(tier: Arc<Tier>, domain: Arc<Domain<M>>, kick: Arc<EventFd>) -> io::Result<Self> {
        let desk = tier.desk(kick)?;
        let (asked, arrived) = (Vec::new(), VecDeque::new());
        Ok(Self { tier, domain, desk, window: Window::default(), asked, arrived })
    }

    /// True when the object has been read, or could not be. If neither, it is asked for.
    pub fn has(&mut self, handle: Handle) -> bool {
        self.place_of(handle).is_some()
    }

    /// The object, if it has been read since it was asked for; else asks for it. That it could not be read is said once: who
    /// asks again has it read again.
    pub fn look(&mut self, handle: Handle) -> Sight<'_> {
        let Some(place) = self.place_of(handle) else { return Sight::UnderWay };
        if matches!(self.arrived.get(place), Some((_, Err(_))))
            && let Some((_, Err(cause))) = self.arrived.remove(place)
        {
            return Sight::Read(Err(cause));
        }
        match self.arrived.get(place) {
            Some((_, Ok(fetched))) => Sight::Read(Ok(fetched)),
            _ => Sight::UnderWay,
        }
    }

    /// Nobody wants what was asked for any more. What is being read is kept for who comes back to it.
    pub fn forget(&mut self) {
        self.take_answers();
        self.asked.clear();
        self.arrived.clear();
    }

    /// Which of the answers that have arrived is the object's. If none, it is asked for.
    fn place_of(&mut self, handle: Handle) -> Option<usize> {
        self.take_answers();
        let place = |far: &Self| far.arrived.iter().position(|(arrived, _)| *arrived == handle);
        if place(self).is_none() && !self.asked.iter().any(|(asked, _)| asked.handle() == handle) {
            self.advance(Fetch::new(handle));
        }
        place(self)
    }

    /// Takes what was read, and goes on with what waited for it.
    fn take_answers(&mut self) {
        while let Some((ticket, came)) = self.desk.answer() {
            let mut failed = self.window.came(ticket, came).err();
            for (mut fetch, _) in self.asked.extract_if(.., |(_, waits)| *waits == ticket).collect::<Vec<_>>()
            {
                // Who asked for it comes first.
                if let Some(error) = failed.take() {
                    fetch.fail(error);
                }
                self.advance(fetch);
            }
        }
    }

    fn advance(&mut self, mut fetch: Fetch) {
        let mut fetched = Fetched::new();
        let read = match fetch.go_on(&self.domain, Some(&self.tier), &mut fetched, &mut self.window) {
            Ok(Progress::Here) => Ok(fetched),
            Ok(Progress::Waits(ticket)) => return self.asked.push((fetch, ticket)),
            Ok(Progress::Wants(wanted)) => {
                self.desk.ask(wanted);
                return self.asked.push((fetch, wanted.ticket));
            }
            Err(error) => Err(explain(&error)),
        };
        if self.arrived.len() == KEPT_MAX {
            self.arrived.pop_front();
        }
        self.arrived.push_back((fetch.handle(), read));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::device::FileDisk;
    use crate::disk::mover::Mover;
    use crate::disk::tier::{Limits, Tier};
    use crate::slabs::MemfdSlabs;
    use plimsoll_store::{Encoder, NoDense, Store, Whereabouts};
    use plimsoll_types::{ByteCount, DomainId, GroupId, PAGE_SIZE};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    const PAGE: [u8; PAGE_SIZE] = {
        let mut page = [0; PAGE_SIZE];
        page[7] = 1;
        page
    };

    fn wait(kick: &EventFd) {
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&kick.as_fd(), PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ready, 1, "no kick came");
        kick.drain().unwrap();
    }

    #[test]
    fn what_is_asked_for_arrives_with_a_kick_and_what_failed_is_read_anew_when_it_is_asked_for_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tier");
        let limits = Limits { disk: ByteCount::mib(4), domain: None };
        let disk = Box::new(FileDisk::create(&path).unwrap());
        let tier = Arc::new(Tier::create(disk, limits).unwrap());
        let slabs = MemfdSlabs::create("test-far", ByteCount::mib(4)).unwrap();
        let domain = Arc::new(Domain::new(DomainId(1), GroupId(1), Store::new(slabs)));
        let stored = domain.store(|store| store.put(&PAGE, &mut Encoder::new())).unwrap();
        let handle = stored.unwrap().handle;
        let mut mover = Mover::new(Arc::clone(&tier));
        assert!(mover.demote(&domain, handle, None).unwrap());
        mover.flush().unwrap();
        let mut fetched = Fetched::new();
        let away = domain.store(|store| store.fetch(handle, &mut fetched)).unwrap();
        assert!(matches!(away, Whereabouts::Away(_)));

        let kick = Arc::new(EventFd::new().unwrap());
        let mut far = Far::new(tier, Arc::clone(&domain), Arc::clone(&kick)).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        // The first segment behind the reserve.
        let place = 2 << 20;
        let mut good = [0; 4096];
        file.read_exact_at(&mut good, place).unwrap();
        file.write_all_at(&[0; 4096], place).unwrap();
        assert!(matches!(far.look(handle), Sight::UnderWay));
        assert!(matches!(far.look(handle), Sight::UnderWay), "it is asked for once");
        wait(&kick);
        assert!(matches!(far.look(handle), Sight::Read(Err(_))));
        file.write_all_at(&good, place).unwrap();
        assert!(matches!(far.look(handle), Sight::UnderWay));
        wait(&kick);
        let Sight::Read(Ok(read)) = far.look(handle) else { panic!("it has arrived") };
        assert!(fetched.adopt(read));
        let mut page = [0; PAGE_SIZE];
        fetched.unpack(&mut page, &mut NoDense).unwrap();
        assert_eq!(page, PAGE);
        far.forget();
        assert!(matches!(far.look(handle), Sight::Read(Ok(_))), "it was read a moment ago");
        drop(far);
        assert!(Arc::into_inner(domain).is_some(), "nobody else has it");
    }
}
