//! Reads of the disk that a pager does not wait for.
//!
//! Enters: handles of objects that lie away, as faults and read-ahead come to them. Leaves: the objects, when they have been read,
//! and a kick for the pager that asked. What must never happen: a pager that waits for the disk while faults of its machine can
//! be served. So each pager whose host has a disk has a thread that reads for it, in the order in which it asks, which is that in
//! which pages were written where a guest goes on in order.
//!
//! An answer is a copy of the object, good whatever becomes of the object meanwhile; the pager looks up its page's word again
//! before it uses one. What nobody asks for again is dropped.
use super::host::{Domain, Host};
use crate::disk::fetch;
use crate::disk::window::Window;
use crate::explain;
use plimsoll_store::{Fetched, Handle, SlabMemory};
use plimsoll_sys::eventfd::EventFd;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

/// Answers kept that nobody has asked for again yet: more than faults and read-ahead ask for at once.
const KEPT_MAX: usize = 128;

/// An object as it was read, or why it could not be.
type Read = Result<Fetched, String>;

/// See the file's head.
pub(super) struct Far {
    /// `None` once the thread is to end.
    asks: Option<Sender<Handle>>,
    answers: Receiver<(Handle, Read)>,
    asked: Vec<Handle>,
    arrived: VecDeque<(Handle, Read)>,
    thread: Option<JoinHandle<()>>,
}

/// What is known of an object that lies away.
pub(super) enum Sight<'a> {
    /// It has been read, or could not be.
    Read(Result<&'a Fetched, String>),
    /// It is being read. The pager is kicked when it is there.
    UnderWay,
}

impl Far {
    /// Starts the thread, which kicks that pager.
    ///
    /// # Errors
    /// [`io::Error`] when there is no thread to be had.
    pub(super) fn start<M: SlabMemory + Send + 'static>(
        name: String,
        host: Arc<Host>,
        domain: Arc<Domain<M>>,
        kick: Arc<EventFd>,
    ) -> io::Result<Self> {
        let (asks, asked) = channel::<Handle>();
        let (answer, answers) = channel();
        let work = move || {
            let mut window = Window::default();
            while let Ok(handle) = asked.recv() {
                let mut fetched = Fetched::new();
                let read = fetch(&domain, host.tier(), handle, &mut fetched, &mut window);
                let read = read.map(|()| fetched).map_err(|error| explain(&error));
                if answer.send((handle, read)).is_err() {
                    break;
                }
                let _ = kick.signal();
            }
        };
        let thread = Builder::new().name(name).spawn(work)?;
        let (asked, arrived) = (Vec::new(), VecDeque::new());
        Ok(Self { asks: Some(asks), answers, asked, arrived, thread: Some(thread) })
    }

    /// True when the object has been read, or could not be. If neither, it is asked for.
    pub(super) fn has(&mut self, handle: Handle) -> bool {
        self.place_of(handle).is_some()
    }

    /// The object, if it has been read since it was asked for; else asks for it. That it could not be read is said once: who
    /// asks again has it read again.
    pub(super) fn look(&mut self, handle: Handle) -> Sight<'_> {
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

    /// Nobody wants what was asked for any more.
    pub(super) fn forget(&mut self) {
        self.take_answers();
        self.arrived.clear();
    }

    /// Which of the answers that have arrived is the object's. If none, it is asked for.
    fn place_of(&mut self, handle: Handle) -> Option<usize> {
        self.take_answers();
        let place = self.arrived.iter().position(|(arrived, _)| *arrived == handle);
        let is_asked = place.is_some() || self.asked.contains(&handle);
        if !is_asked && self.asks.as_ref().is_some_and(|asks| asks.send(handle).is_ok()) {
            self.asked.push(handle);
        }
        place
    }

    fn take_answers(&mut self) {
        for (handle, read) in self.answers.try_iter() {
            self.asked.retain(|asked| *asked != handle);
            self.arrived.push_back((handle, read));
        }
        let surplus = self.arrived.len().saturating_sub(KEPT_MAX);
        self.arrived.drain(..surplus);
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            // It ends after the read that it is in.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::device::FileDisk;
    use crate::disk::mover::Mover;
    use crate::disk::tier::{Limits, Tier};
    use crate::slabs::MemfdSlabs;
    use plimsoll_core::ledger::Budget;
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
        let host = Arc::new(Host::new(Budget::of(ByteCount::mib(64))));
        host.set_tier(Arc::clone(&tier));
        let slabs = MemfdSlabs::create("test-far", ByteCount::mib(4)).unwrap();
        let domain = Arc::new(Domain::new(DomainId(1), GroupId(1), Store::new(slabs)));
        let stored = domain.store(|store| store.put(&PAGE, &mut Encoder::new())).unwrap();
        let handle = stored.unwrap().handle;
        let mut mover = Mover::new(tier);
        assert!(mover.demote(&domain, handle, None).unwrap());
        mover.flush().unwrap();
        let mut fetched = Fetched::new();
        let away = domain.store(|store| store.fetch(handle, &mut fetched)).unwrap();
        assert!(matches!(away, Whereabouts::Away(_)));

        let kick = Arc::new(EventFd::new().unwrap());
        let mut far = Far::start("far".to_owned(), host, Arc::clone(&domain), Arc::clone(&kick)).unwrap();
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
        assert!(matches!(far.look(handle), Sight::UnderWay), "nobody wanted it any more");
        drop(far);
        assert!(Arc::into_inner(domain).is_some(), "its thread has ended");
    }
}
