//! How a manager puts together what an earlier one left.
//!
//! Enters: the register, and what the keeper has. Leaves: machines, stores, the disk tier; of what cannot be put together, why, and what is
//! known of it. What must never happen: a machine taken for ended whose VMM lives, or anything let go that a later manager may need: memory
//! may be short for a moment, a descriptor missing, a record damaged. So what cannot be put together stays as it is.
use super::{DOMAIN, Estate, EstateError, LEFT, NO_SLOT, OFFERED, PROCESS, Record, SOCKET, TIER, TIER_SLOTS};
use crate::disk::device::FileDisk;
use crate::disk::tier::Tier;
use crate::explain;
use crate::slabs::MemfdSlabs;
use crate::uffd::linux_space::Custody;
use crate::uffd::manager::Membership;
use crate::uffd::shards::{MachineVault, MemfdWords, ShardVault};
use crate::uffd::stats::MachineStats;
use crate::uffd::wire::{Hello, Welcome};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::uffd::Userfaultfd;
use plimsoll_sys::{ProcessId, fdpass};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an earlier manager may take to let go of all its stores once it is dead to everybody else. No guest is served until
/// then, however many stores there are.
const ENDING_MAX: Duration = Duration::from_secs(10);

/// A record that is in use: its place, its state, what it says.
type Entry = (usize, u64, Record);

/// What there was before.
#[derive(Default)]
pub(in crate::uffd) struct Inheritance {
    pub(in crate::uffd) machines: Vec<MachineVault>,
    pub(in crate::uffd) domains: Vec<(DomainId, GroupId, MemfdSlabs)>,
    /// The disk tier, or why it cannot be had, although there is one: what it has is still there.
    pub(in crate::uffd) tier: Option<Result<Tier, EstateError>>,
    /// Machines that cannot be put together again, and why. Their descriptors stay where they are: their guests wait.
    pub(in crate::uffd) lost: Vec<(MachineId, EstateError)>,
    /// What is known of those machines.
    pub(in crate::uffd) fragments: BTreeMap<MachineId, Fragment>,
}

/// A machine that cannot be put together, as its sound records tell of it, if there are any.
#[derive(Default)]
pub(in crate::uffd) struct Fragment {
    pub(in crate::uffd) domain: Option<DomainId>,
    process: Option<Arc<Pidfd>>,
}

impl Fragment {
    /// True for what may have pages in that domain's store. One whose domain nobody knows may be of any.
    pub(in crate::uffd) fn may_be_of(&self, id: DomainId) -> bool {
        self.domain.is_none_or(|domain| domain == id)
    }

    /// True once its VMM has ended. One that is not known has not.
    pub(in crate::uffd) fn has_ended(&self) -> bool {
        self.process.as_ref().is_some_and(|process| matches!(process.is_alive(), Ok(false)))
    }
}

impl Estate {
    /// Puts together what an earlier manager left. Machines that were offered are welcomed once more. What belongs to nothing
    /// is let go.
    pub(in crate::uffd) fn inherit(&self) -> Inheritance {
        let until = Instant::now() + ENDING_MAX;
        let mut inheritance = Inheritance::default();
        let mut shards: BTreeMap<u32, Vec<Entry>> = BTreeMap::new();
        let mut domains: BTreeMap<u32, Vec<Record>> = BTreeMap::new();
        let mut named = BTreeSet::new();
        let mut is_damaged = false;
        for (at, state, record) in self.records() {
            if record.is_damaged() {
                // What it held stays unknown, and so everything that no other record names has to stay. Of which machine it
                // is, too: one of those that are not whole.
                is_damaged = true;
                let what = "a record of the machines' register is damaged".to_owned();
                inheritance.lost.push((MachineId(record.machine), EstateError::Damaged { what }));
                named.extend(self.taken.lock().iter());
                // No single bit makes a shard's kind another, whose machines are counted themselves.
                if ![DOMAIN, TIER].contains(&record.kind) {
                    inheritance.fragments.entry(MachineId(record.machine)).or_default();
                }
                continue;
            }
            named.extend(record.held(state));
            match record.kind {
                DOMAIN => domains.entry(record.domain).or_default().push(record),
                TIER => inheritance.tier = Some(self.tier(&record)),
                _ => shards.entry(record.machine).or_default().push((at, state, record)),
            }
        }
        let has_tier = TIER_SLOTS.iter().any(|slot| self.taken.lock().contains(slot));
        if is_damaged && has_tier && inheritance.tier.is_none() {
            let what =
                "a record of the machines' register is damaged, and it may be the disk tier's".to_owned();
            inheritance.tier = Some(Err(EstateError::Damaged { what }));
        }
        for (domain, records) in domains {
            // One process lets go of them all: what it took for one is gone from what it may take for the next.
            let patience = until.saturating_duration_since(Instant::now());
            match self.domain(DomainId(domain), &records, patience) {
                Ok(domain) => inheritance.domains.push(domain),
                Err(error) => inheritance.lost.push((MachineId(0), error)),
            }
        }
        for (machine, records) in shards {
            let id = MachineId(machine);
            if records.iter().any(|(_, state, _)| *state == LEFT) {
                self.see_off(&records);
                continue;
            }
            // Before its descriptors are claimed.
            let fragment = self.fragment(&records);
            match self.machine(id, &records, fragment.process.clone()) {
                Ok(Some(machine)) => inheritance.machines.push(machine),
                Ok(None) if is_damaged => {
                    let what = "records of it are missing, and one of the register is damaged".to_owned();
                    inheritance.lost.push((id, EstateError::Damaged { what }));
                    inheritance.fragments.insert(id, fragment);
                }
                // It was being entered, or struck.
                Ok(None) => self.strike_all(&records),
                Err(error) => {
                    inheritance.lost.push((id, error));
                    inheritance.fragments.insert(id, fragment);
                }
            }
        }
        let unnamed: Vec<u32> = self.taken.lock().difference(&named).copied().collect();
        self.let_go(unnamed);
        // Whatever could not be put together is the next manager's, from the keeper.
        self.kept.lock().clear();
        inheritance
    }

    fn claim(&self, slot: u32) -> Result<OwnedFd, EstateError> {
        let what = || EstateError::Damaged { what: format!("the keeper has nothing in slot {slot}") };
        self.kept.lock().remove(&slot).ok_or_else(what)
    }

    fn tier(&self, record: &Record) -> Result<Tier, EstateError> {
        let [table, disk, key, ..] = record.slots;
        let quota = Some(ByteCount(record.amount)).filter(|quota| quota.0 > 0);
        let damaged = |error: &dyn std::error::Error| EstateError::Damaged { what: explain(error) };
        let disk = FileDisk::inherit(self.claim(disk)?).map_err(|error| damaged(&error))?;
        let key = Some(key).filter(|slot| *slot != NO_SLOT).map(|slot| self.claim(slot)).transpose()?;
        Tier::inherit(Box::new(disk), self.claim(table)?, key, quota).map_err(|error| damaged(&error))
    }

    /// A domain from its record. Of two stores it cannot be told which one has a machine's pages.
    fn domain(
        &self,
        id: DomainId,
        records: &[Record],
        patience: Duration,
    ) -> Result<(DomainId, GroupId, MemfdSlabs), EstateError> {
        let [record] = records else {
            return Err(EstateError::Damaged {
                what: format!("the register has {} stores of {id}", records.len()),
            });
        };
        let file = self.claim(record.slots[0])?;
        let slabs = MemfdSlabs::inherit(file, ByteCount(record.amount), patience)?;
        Ok((id, GroupId(record.group), slabs))
    }

    /// Tells the VMM of a machine that was left that it is alone with it, as far as it was not told, and forgets the machine.
    fn see_off(&self, records: &[Entry]) {
        for (.., record) in records {
            if let Ok(socket) = self.claim(record.slots[SOCKET]) {
                // An agent that was told has shut its end, and one that has ended needs no telling.
                let _ = fdpass::send(&socket, &Welcome::GivenBack.encode(), &[]);
            }
        }
        self.strike_all(records);
    }

    /// What sound records tell of a machine, whether it can be put together from them or not.
    fn fragment(&self, records: &[Entry]) -> Fragment {
        Fragment {
            domain: records.first().map(|(.., record)| DomainId(record.domain)),
            process: self.process(records).map(Arc::new),
        }
    }

    /// The VMM's process, of the descriptors that may be it. One of a process that was reaped does not say any more whose it was. So
    /// one that lives counts, wherever it is; and where there is none the VMM has ended only if nobody has its ends of the
    /// sockets any more. Whoever has one is asked.
    fn process(&self, records: &[Entry]) -> Option<Pidfd> {
        let kept = self.kept.lock();
        let held = |(.., record): &Entry| {
            let copy = kept.get(&record.slots[PROCESS])?.try_clone().ok()?;
            Pidfd::adopt(copy, ProcessId::new(record.process)?).ok()
        };
        let is_alive = |process: &Pidfd| matches!(process.is_alive(), Ok(true));
        let mut found: Vec<Pidfd> = records.iter().filter_map(held).collect();
        if let Some(at) = found.iter().position(is_alive) {
            return Some(found.swap_remove(at));
        }
        // While a shard is offered, its agent's end may be with the keeper.
        let with_agents =
            records.iter().filter(|(_, state, record)| *state != OFFERED || record.agent().is_none());
        let sockets =
            with_agents.filter_map(|(.., record)| Some((kept.get(&record.slots[SOCKET])?, record.process)));
        let mut open = sockets.filter(|(socket, _)| !fdpass::is_hung_up(socket)).peekable();
        if open.peek().is_none() {
            return found.pop();
        }
        let peers = open.filter_map(|(socket, process)| Some((fdpass::peer_pidfd(socket).ok()?, process)));
        let mut its = peers.filter(|(peer, process)| peer.process().get() == *process && is_alive(peer));
        its.next().map(|(peer, _)| peer)
    }

    /// A machine from its records, and its VMM's process; `None` if they are not all there.
    fn machine(
        &self,
        id: MachineId,
        records: &[Entry],
        process: Option<Arc<Pidfd>>,
    ) -> Result<Option<MachineVault>, EstateError> {
        let mut shards = Vec::new();
        for (_, state, record) in records {
            let bytes = record.hello.get(..record.hello_bytes as usize).unwrap_or_default();
            let hello = Hello::decode(bytes, 2);
            shards.push((
                hello.map_err(|error| EstateError::Damaged { what: error.to_string() })?,
                *state,
                record,
            ));
        }
        shards.sort_by_key(|(hello, ..)| hello.shard);
        let is_whole = shards.first().is_some_and(|(hello, ..)| hello.shards as usize == shards.len());
        let Some((_, first_state, first)) = shards.first().filter(|_| is_whole) else { return Ok(None) };
        let (offered, first) = (*first_state == OFFERED, *first);
        let damaged = |what: String| EstateError::Damaged { what };
        let unknown = || damaged("nothing that is kept for it is of its VMM's process".to_owned());
        let process = process.ok_or_else(unknown)?;
        let (mut vaults, mut agents) = (Vec::new(), Vec::new());
        for (hello, state, record) in shards {
            let [ram, airlock, socket, words, ..] = record.slots;
            let uffd =
                |slot| Userfaultfd::try_from(self.claim(slot)?).map_err(|error| damaged(error.to_string()));
            let uffds = [uffd(ram)?, uffd(airlock)?];
            let words = MemfdWords::inherit(self.claim(words)?, hello.layout.page_limit().get())?;
            let custody = Custody::new(hello, Arc::clone(&process), uffds, self.claim(socket)?);
            if let Some(agent) = record.agent().filter(|_| state == OFFERED) {
                agents.push(self.claim(agent)?);
            }
            let (id, custody, words) = (MachineId(record.shard), Arc::new(custody), Arc::new(words));
            vaults.push(ShardVault { id, custody, words, stats: MachineStats::default() });
        }
        if offered && let Some(first) = vaults.first() {
            let agents: Vec<BorrowedFd<'_>> = agents.iter().map(AsFd::as_fd).collect();
            let welcome = Welcome::Accepted { machine: id.0, epoch: self.epoch() };
            // One that has ended meanwhile is found so when it is taken over.
            let _ = first.custody.tell(&welcome.encode(), &agents);
        }
        // Also where the earlier manager has come only half way.
        records.iter().for_each(|(at, state, record)| self.take(*at, *state, record));
        let membership = Membership {
            group: GroupId(first.group),
            domain: DomainId(first.domain),
            reservation: ByteCount(first.amount),
        };
        Ok(Some(MachineVault { id, membership, shards: vaults }))
    }
}
