//! The shards of a machine: what of them outlives a manager, and their pagers' threads while there is one.
//!
//! A shard is to its pager, to the ledger and to the governor what a machine would be: it has an identity of its own, the
//! next after that of the shard before it, its own part of the size and of the reservation. The first shard's identity is
//! the machine's. What must never happen: a manager that has some shards of a machine and not the others.
use super::drive::End;
use super::governor;
use super::host::{Domain, Host, Orders};
use super::linux_space::Custody;
use super::manager::Membership;
use super::seats::Seat;
use super::stats::MachineStats;
use super::wire::Welcome;
use crate::slabs::MemfdSlabs;
use parking_lot::Mutex;
use plimsoll_core::layout::Region;
use plimsoll_core::ledger::Terms;
use plimsoll_core::map::Words;
use plimsoll_core::word::{PageState, PageWord, StateKind};
use plimsoll_store::Handle;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::mapping::{Memfd, MemfdError, SharedMapping};
use plimsoll_sys::uffd::Journal;
use plimsoll_types::{ByteCount, MachineId, PAGE_SIZE, PageCount, PageIndex};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a stopping manager waits for a pager before it ends the VMM that keeps it.
const STOP_PATIENCE: Duration = Duration::from_secs(40);

/// Events that may have been read and not applied: what a pager takes in a turn.
const JOURNAL_EVENTS: usize = 256;

/// Page words in a memfd, and behind them the journal of events.
#[derive(Debug)]
pub struct MemfdWords {
    file: Memfd,
    memory: Arc<SharedMapping>,
    pages: usize,
}

impl MemfdWords {
    pub(super) fn create(pages: usize) -> Result<Self, MemfdError> {
        Self::map(Memfd::create("plimsoll-words", Self::size(pages))?, pages)
    }

    /// Those that an earlier manager made for so many pages.
    pub(super) fn inherit(file: OwnedFd, pages: usize) -> Result<Self, MemfdError> {
        let file = Memfd::try_from(file)?;
        if file.size() != Self::size(pages) {
            return Err(MemfdError::Size { size: file.size() });
        }
        Self::map(file, pages)
    }

    fn map(file: Memfd, pages: usize) -> Result<Self, MemfdError> {
        let memory = Arc::new(SharedMapping::new(&file)?);
        Ok(Self { file, memory, pages })
    }

    const fn journal_offset(pages: usize) -> ByteCount {
        ByteCount((pages * size_of::<u64>()).next_multiple_of(PAGE_SIZE) as u64)
    }

    const fn size(pages: usize) -> ByteCount {
        let journal = Journal::size(JOURNAL_EVENTS).0.next_multiple_of(PAGE_SIZE as u64);
        ByteCount(Self::journal_offset(pages).0 + journal)
    }

    /// The journal of words that had no pager yet.
    pub(super) fn fresh_journal(&self) -> Result<Journal, MemfdError> {
        let journal =
            Journal::fresh(Arc::clone(&self.memory), Self::journal_offset(self.pages), JOURNAL_EVENTS);
        journal.ok_or(MemfdError::Size { size: self.file.size() })
    }

    /// The journal, with what an earlier pager has left in it.
    pub(super) fn journal(&self) -> Result<Journal, MemfdError> {
        let journal =
            Journal::open(Arc::clone(&self.memory), Self::journal_offset(self.pages), JOURNAL_EVENTS);
        journal.ok_or(MemfdError::Size { size: self.file.size() })
    }

    /// For whoever keeps a copy for the next manager.
    pub(super) fn keepsake(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Every object a word names, once per word. A word that is damaged names none.
    pub(super) fn handles(&self) -> impl Iterator<Item = Handle> + '_ {
        self.words().iter().filter_map(|word| match PageWord(word.load(Ordering::Acquire)).state() {
            Some(PageState::Stored(object)) => Handle::from_bits(object.bits()),
            _ => None,
        })
    }
}

impl Words for MemfdWords {
    fn words(&self) -> &[AtomicU64] {
        &self.memory.as_atomic_u64s()[..self.pages]
    }
}

/// A shard's page words, for whoever reads them, and whose they are.
#[derive(Clone, Debug)]
pub struct ShardWords {
    /// Where its pages lie in the guest: the words are of these, page by page.
    pub regions: Vec<Region>,
    /// To be read only: the shard's pager alone writes them.
    pub words: Arc<MemfdWords>,
}

/// What of a shard outlives its manager.
pub(super) struct ShardVault {
    pub(super) id: MachineId,
    pub(super) custody: Arc<Custody>,
    pub(super) words: Arc<MemfdWords>,
    pub(super) stats: MachineStats,
}

/// What of a machine outlives its manager.
pub(super) struct MachineVault {
    pub(super) id: MachineId,
    pub(super) membership: Membership,
    pub(super) shards: Vec<ShardVault>,
}

impl MachineVault {
    /// Each shard with its part of the machine's size and reservation.
    pub(super) fn terms(&self) -> impl Iterator<Item = (MachineId, Terms)> + '_ {
        let sizes: Vec<ByteCount> = self.shards.iter().map(|shard| size_of_custody(&shard.custody)).collect();
        let reservations = divide(self.membership.reservation.0, &sizes);
        let terms = sizes.into_iter().zip(reservations);
        let terms = terms.map(|(size, reservation)| Terms { size, reservation: ByteCount(reservation) });
        self.shards.iter().map(|shard| shard.id).zip(terms)
    }

    /// Has incidents of the shards told of the machine.
    pub(super) fn enlist(&self, host: &Host) {
        let mut first = PageIndex(0);
        for shard in &self.shards {
            if shard.id != self.id {
                host.enlist(shard.id, self.id, first);
            }
            first.0 += shard.custody.hello.layout.page_limit().0;
        }
    }

    /// True once its VMM has ended: the shards are of one process.
    pub(super) fn has_ended(&self) -> bool {
        self.shards.iter().all(|shard| shard.custody.has_ended(Duration::ZERO))
    }
}

fn size_of_custody(custody: &Custody) -> ByteCount {
    custody.hello.layout.pages().bytes()
}

/// Divides an amount among shards in proportion to their sizes. The parts add up to the amount.
fn divide(amount: u64, sizes: &[ByteCount]) -> Vec<u64> {
    let whole: u128 = sizes.iter().map(|size| u128::from(size.0)).sum();
    let (mut reached, mut given) = (0, 0);
    let part = |size: &ByteCount| {
        reached += u128::from(size.0);
        // At most the amount, because at most the whole has been reached.
        let due = u64::try_from(u128::from(amount) * reached / whole.max(1)).unwrap_or(amount);
        let part = due - given;
        given = due;
        part
    };
    sizes.iter().map(part).collect()
}

/// What the governor and the operator know of a shard.
#[derive(Clone)]
pub(super) struct Controls {
    pub(super) orders: Arc<Orders>,
    pub(super) kick: Arc<EventFd>,
    pub(super) stats: Arc<Mutex<MachineStats>>,
    /// One for all shards of the machine.
    pub(super) sabotage: Arc<AtomicBool>,
    /// The VMM has ended and everything of the shard has been freed.
    pub(super) is_buried: Arc<AtomicBool>,
    /// Its pager cannot go on: the guest waits at absent pages until its VMM is ended.
    pub(super) is_lost: Arc<AtomicBool>,
    /// All of the shard is the VMM's again, and everything that was kept for it has been freed.
    pub(super) is_given_back: Arc<AtomicBool>,
    pub(super) custody: Arc<Custody>,
    pub(super) words: Arc<MemfdWords>,
    pub(super) seat: Arc<Seat>,
    /// Weak, so that a store can be taken out of its domain when its manager stops.
    pub(super) domain: Weak<Domain<MemfdSlabs>>,
}

/// A shard and the thread of its pager.
pub(super) struct Shard {
    pub(super) id: MachineId,
    pub(super) controls: Controls,
    pub(super) thread: JoinHandle<End>,
}

impl Shard {
    /// Tells its pager to stop where it is.
    pub(super) fn ask_to_stop(&self) {
        self.controls.orders.stop.store(true, Ordering::Relaxed);
        let _ = self.controls.kick.signal();
    }

    /// Waits for its pager, which was `asked` to stop then. `None` if the VMM has ended and nothing is left.
    fn stopped(self, asked: Instant) -> Option<ShardVault> {
        let Self { id, controls: Controls { stats, custody, words, .. }, thread } = self;
        while !thread.is_finished() {
            if asked.elapsed() > STOP_PATIENCE {
                // It waits in the kernel for memory that its VMM has withdrawn.
                custody.end();
            }
            std::thread::sleep(governor::PERIOD);
        }
        // A thread that panicked is a manager that crashed: its machine is in the state a crash leaves.
        let is_left = !matches!(thread.join(), Ok(End::Gone));
        let stats = stats.lock().clone();
        is_left.then_some(ShardVault { id, custody, words, stats })
    }
}

/// A machine whose shards are managed, each by its thread. There is at least one.
pub(super) struct Running {
    pub(super) membership: Membership,
    pub(super) shards: Vec<Shard>,
}

impl Running {
    /// What it is called.
    pub(super) fn name(&self) -> String {
        self.shards.first().map(|shard| shard.controls.custody.hello.name.clone()).unwrap_or_default()
    }

    fn sizes(&self) -> Vec<ByteCount> {
        self.shards.iter().map(|shard| size_of_custody(&shard.controls.custody)).collect()
    }

    /// The size of all shards.
    pub(super) fn size(&self) -> ByteCount {
        self.sizes().into_iter().sum()
    }

    /// The counts of all shards, as last published.
    pub(super) fn totals(&self) -> MachineStats {
        MachineStats::merge(self.shards.iter().map(|shard| shard.controls.stats.lock().clone()))
    }

    /// The page words of all shards, in their order.
    pub(super) fn words(&self) -> Vec<ShardWords> {
        let words = |Controls { words, custody, .. }: &Controls| ShardWords {
            regions: custody.hello.layout.regions().to_vec(),
            words: Arc::clone(words),
        };
        self.shards.iter().map(|shard| words(&shard.controls)).collect()
    }

    /// Pages of all shards that are in the store, as last published.
    pub(super) fn stored(&self) -> PageCount {
        self.shards.iter().map(|shard| shard.controls.stats.lock().census.of(StateKind::Stored)).sum()
    }

    /// True once everything of every shard has been freed.
    pub(super) fn is_buried(&self) -> bool {
        let is_freed = |controls: &Controls| {
            controls.is_buried.load(Ordering::Acquire) || controls.is_given_back.load(Ordering::Acquire)
        };
        self.shards.iter().all(|shard| is_freed(&shard.controls))
    }

    /// True while any of its pagers has no memory to bring it home, or for its guest.
    pub(super) fn is_short(&self) -> bool {
        self.shards.iter().any(|shard| shard.controls.orders.is_short.load(Ordering::Relaxed))
    }

    /// True once any of its pagers cannot go on.
    pub(super) fn is_lost(&self) -> bool {
        self.shards.iter().any(|shard| shard.controls.is_lost.load(Ordering::Acquire))
    }

    /// True once nothing of the machine is elsewhere, as far as its pagers have been told to see to that.
    pub(super) fn is_home(&self) -> bool {
        self.shards.iter().all(|shard| shard.controls.orders.is_home.load(Ordering::Acquire))
    }

    /// True from the order to park on, until the one to wake.
    pub(super) fn is_parked(&self) -> bool {
        self.shards.iter().any(|shard| shard.controls.orders.is_parked.load(Ordering::Relaxed))
    }

    /// True while nothing is to be taken from it.
    pub(super) fn is_held(&self) -> bool {
        self.shards.iter().any(|shard| shard.controls.orders.hold.load(Ordering::Relaxed))
    }

    /// True once its pagers have been told to leave it: some may have, so there is no way back.
    pub(super) fn is_let_go(&self) -> bool {
        self.shards.iter().any(|shard| shard.controls.orders.let_go.load(Ordering::Relaxed))
    }

    /// True once all of every shard is the VMM's again, which has not been told yet.
    pub(super) fn is_given_back(&self) -> bool {
        self.shards.iter().all(|shard| shard.controls.is_given_back.load(Ordering::Acquire))
    }

    /// Tells the VMM, shard by shard, that it is alone with its memory.
    pub(super) fn part(&self) {
        for shard in &self.shards {
            // One that has ended needs no telling.
            let _ = shard.controls.custody.tell(&Welcome::GivenBack.encode(), &[]);
        }
        self.shards.iter().for_each(Shard::ask_to_stop);
    }

    /// Gives every pager an order and wakes it.
    pub(super) fn order(&self, give: impl Fn(&Orders)) {
        for shard in &self.shards {
            give(&shard.controls.orders);
            let _ = shard.controls.kick.signal();
        }
    }

    /// Takes so many pages from the machine, from each shard in proportion to its size.
    pub(super) fn squeeze(&self, pages: u32) {
        for (shard, pages) in self.shards.iter().zip(divide(u64::from(pages), &self.sizes())) {
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            // Of most machines nothing is wanted, again and again: that wakes nobody.
            if shard.controls.orders.squeeze.swap(pages, Ordering::Relaxed) != pages {
                let _ = shard.controls.kick.signal();
            }
        }
    }

    /// Each shard with its part of a size, by its own.
    pub(super) fn divided(
        &self,
        size: Option<ByteCount>,
    ) -> impl Iterator<Item = (MachineId, Option<ByteCount>)> {
        let parts = size.map(|size| divide(size.0, &self.sizes()));
        let part =
            move |place: usize| parts.as_ref().and_then(|parts| parts.get(place)).copied().map(ByteCount);
        self.shards.iter().enumerate().map(move |(place, shard)| (shard.id, part(place)))
    }

    /// Waits for the pagers, which were `asked` to stop then. `None` if the VMM has ended: whatever of it a pager has left
    /// is nobody's.
    pub(super) fn stopped(self, id: MachineId, asked: Instant) -> Option<MachineVault> {
        let shards: Vec<_> = self.shards.into_iter().map(|shard| shard.stopped(asked)).collect();
        let shards = shards.into_iter().collect::<Option<_>>()?;
        Some(MachineVault { id, membership: self.membership, shards })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_divided_adds_up_and_all_of_a_machine_is_all_of_each_shard() {
        let sizes = [3, 1, 4, 1, 5, 9, 2, 6].map(|blocks| ByteCount(blocks << 21));
        let pages: Vec<u64> = sizes.iter().map(|size| size.pages_floor().0).collect();
        for amount in [0, 1, 7, 12_345, 1 << 40, u64::MAX] {
            assert_eq!(divide(amount, &sizes).iter().sum::<u64>(), amount);
        }
        assert_eq!(divide(pages.iter().sum(), &sizes), pages);
        let most = divide(u64::from(u32::MAX), &sizes);
        assert!(most.iter().zip(&pages).all(|(part, pages)| part >= pages), "{most:?} of {pages:?}");
        assert_eq!(divide(17, &sizes[..1]), [17]);
    }
}
