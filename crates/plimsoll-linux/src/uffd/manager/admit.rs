//! How a machine comes in: its VMM hands it over.
//!
//! Enters: a hand-over. Leaves: a machine that is in the ledger and, where there is an estate, in its register, with pagers that
//! run; or nothing of it, and a VMM that was told why. What must never happen: a VMM that is told that its machine is managed
//! before the register has it.
use super::{Manager, Membership, MemfdWords, Origin, Part};
use crate::explain;
use crate::slabs::MemfdSlabs;
use crate::uffd::estate::EstateError;
use crate::uffd::handover::{Handover, HandoverError};
use crate::uffd::host::Domain;
use crate::uffd::linux_space::{Custody, LinuxSpace};
use crate::uffd::shards::{MachineVault, ShardVault};
use crate::uffd::space::SpaceError;
use crate::uffd::stats::MachineStats;
use plimsoll_core::airlock::Shape;
use plimsoll_core::ledger::LedgerError;
use plimsoll_core::machine::Machine;
use plimsoll_core::map::MapError;
use plimsoll_store::Store;
use plimsoll_sys::mapping::MemfdError;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, DomainId, MachineId};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How long a VMM may take to hand its machine over.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(30);

/// A machine may own this many times the budget and no more: its tables are made before it uses anything.
const OVERCOMMIT_MAX: u64 = 64;

/// A machine was not taken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdmitError {
    /// The VMM did not hand over properly.
    #[error("the machine could not be taken over")]
    Handover(#[from] HandoverError),
    /// The ledger has no room for it.
    #[error("the machine was not admitted")]
    Ledger(#[from] LedgerError),
    /// Its memory could not be looked at.
    #[error("the machine's memory could not be looked at")]
    Space(#[from] SpaceError),
    /// No memory for its tables or its store.
    #[error("no memory for the machine's tables")]
    Memory(#[from] MemfdError),
    /// A bug: fresh words were not fresh.
    #[error("the machine's page words could not be set up")]
    Map(#[from] MapError),
    /// zstd has no memory.
    #[error("no memory for the dense codec")]
    Codec(#[source] std::io::Error),
    /// A thread could not be started.
    #[error("no thread for the machine")]
    Thread(#[source] std::io::Error),
    /// It owns more memory than a machine of this host may.
    #[error("the machine owns {size}; a machine of this host may own at most {limit}")]
    TooLarge {
        /// What it owns.
        size: ByteCount,
        /// What it may own.
        limit: ByteCount,
    },
    /// It could not be entered into what outlives this process.
    #[error("the machine could not be entered into the register")]
    Estate(#[from] EstateError),
    /// Its domain has no store, and a machine that is to be taken over needs one.
    #[error("{domain} has no store")]
    NoSuchDomain {
        /// The domain.
        domain: DomainId,
    },
    /// Its domain's store could not be taken over, and its machines wait for that one.
    #[error("the store of {domain} could not be taken over, and its machines wait: end them first")]
    StoreAwaited {
        /// The domain.
        domain: DomainId,
    },
}

impl Manager {
    /// Takes the machine that `process` hands over on `socket` and starts managing it.
    ///
    /// # Errors
    /// [`AdmitError`]; the VMM is told why before the socket closes.
    pub fn admit(
        &mut self,
        socket: OwnedFd,
        process: Pidfd,
        membership: Membership,
    ) -> Result<MachineId, AdmitError> {
        self.welcome(Handover::receive(socket, process, HANDOVER_PATIENCE)?, membership)
    }

    /// Takes a machine that was handed over and starts managing it.
    ///
    /// # Errors
    /// [`AdmitError`]; the VMM is told why.
    pub fn welcome(&mut self, handover: Handover, membership: Membership) -> Result<MachineId, AdmitError> {
        let ids: Vec<MachineId> = (self.next_id..).map(MachineId).take(handover.shards.len()).collect();
        let admitted = self.take(&ids, &handover, membership);
        match &admitted {
            Ok(_) => self.next_id += u32::try_from(ids.len()).unwrap_or(u32::MAX),
            Err(error) => {
                // Its domain may have been made for it.
                self.seen_endings = None;
                handover.refuse(explain(error));
                self.dismiss(MachineId(self.next_id), ids);
            }
        }
        admitted
    }

    fn take(
        &mut self,
        ids: &[MachineId],
        handover: &Handover,
        membership: Membership,
    ) -> Result<MachineId, AdmitError> {
        let sizes = handover.shards.iter().map(|custody| custody.hello.layout.pages().bytes());
        let size: ByteCount = sizes.sum();
        let hard = self.host.ledger(|ledger| ledger.budget().hard);
        let limit = ByteCount(hard.0.saturating_mul(OVERCOMMIT_MAX));
        if size > limit {
            return Err(AdmitError::TooLarge { size, limit });
        }
        if !self.domains.contains_key(&membership.domain.0) {
            // The next manager would look for their pages in a store that never had them.
            if self.awaited().any(|domain| domain == membership.domain) {
                return Err(AdmitError::StoreAwaited { domain: membership.domain });
            }
            let slabs = MemfdSlabs::create("plimsoll-store", self.store_limit)?;
            if let Some(estate) = &self.estate {
                // One that could not be taken over, and that nobody needs any more.
                estate.strike_domain(membership.domain);
                estate.enter_domain(membership.domain, membership.group, &slabs, self.store_limit)?;
            }
            let domain = Domain::new(membership.domain, membership.group, Store::new(slabs));
            self.add_domain(domain);
        }
        let id = ids.first().copied().unwrap_or(MachineId(self.next_id));
        let mut kept = MachineVault { id, membership, shards: Vec::new() };
        let mut parts = Vec::new();
        for (id, custody) in ids.iter().zip(&handover.shards) {
            let (shard, part) = self.furnish(*id, custody)?;
            kept.shards.push(shard);
            parts.push(part);
        }
        kept.enlist(&self.host);
        self.enter(&kept, &parts)?;
        if let Some(estate) = &self.estate {
            estate.set_next_id(self.next_id.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX)));
            estate.offer(&kept, handover.agents())?;
        }
        handover.accept(id, self.epoch)?;
        if let Some(estate) = &self.estate {
            estate.taken(id);
        }
        self.launch(kept, parts, Origin::New).map_err(|(_, error)| error)?;
        Ok(id)
    }

    /// Makes the tables of a shard that was just handed over.
    fn furnish(&self, id: MachineId, custody: &Arc<Custody>) -> Result<(ShardVault, Part), AdmitError> {
        let hello = &custody.hello;
        let words = Arc::new(MemfdWords::create(hello.layout.page_limit().get())?);
        let presence = custody.presence()?;
        let shape = Shape::blocks(hello.airlock_slots);
        let seed = u64::from(id.0);
        let machine = Machine::new(hello.layout.clone(), Arc::clone(&words), shape, seed, |page| {
            presence.has_page(page)
        })?;
        let space = LinuxSpace::new(Arc::clone(custody), words.fresh_journal()?, self.epoch);
        let stats = MachineStats::default();
        Ok((ShardVault { id, custody: Arc::clone(custody), words, stats }, (machine, space)))
    }
}
