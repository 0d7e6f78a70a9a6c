//! What a pager charges to the ledger: before something is there, and as it is found to be.
//!
//! Enters: pages and bytes that are about to be there, and the machine's words. Leaves: room below the line of their purpose, or
//! none. What must never happen: something that is there and charged by nobody once a turn is over.
use super::host::Host;
use super::pager::{Pager, PagerError};
use super::space::Space;
use plimsoll_core::ledger::{Kind, LedgerError, Purpose};
use plimsoll_core::map::Words;
use plimsoll_core::word::StateKind;
use plimsoll_store::SlabMemory;
use plimsoll_types::{ByteCount, MachineId, PageCount};

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    pub(super) fn charge(&self, pages: u32, purpose: Purpose) -> bool {
        let bytes = PageCount(u64::from(pages)).bytes();
        self.host.ledger(|ledger| ledger.charge(self.id, Kind::Resident, bytes, purpose)).is_ok()
    }

    /// Charges what will be there twice, below the hard line; near it, what nobody names any more goes first. False where there is no
    /// room even then.
    pub(super) fn charge_passing(&mut self, bytes: ByteCount) -> Result<bool, PagerError> {
        Ok(pass(&self.host, self.id, bytes) || (self.shed()? && pass(&self.host, self.id, bytes)))
    }

    /// Gives back what nobody names any more, and has it charged no longer. False where there is none of it.
    pub(super) fn shed(&mut self) -> Result<bool, PagerError> {
        if self.machine.airlock().residue() == PageCount(0) {
            return Ok(false);
        }
        self.zap()?;
        self.settle()?;
        Ok(true)
    }

    /// Brings the ledger to what the words and the airlock say, charges that came to nothing included.
    pub(super) fn settle(&mut self) -> Result<(), PagerError> {
        let census = self.machine.census();
        let resident = census.in_ram() + census.of(StateKind::Capturing);
        let limbo = self.machine.airlock().limbo() + self.machine.airlock().residue();
        let tables = self.machine.table_bytes()
            + self.prefetch.table_bytes()
            + self.machine.layout().page_limit().get() * size_of::<u64>();
        self.is_tight = self.host.ledger(|ledger| {
            ledger.settle(self.id, Kind::Resident, resident.bytes())?;
            ledger.settle(self.id, Kind::Limbo, limbo.bytes())?;
            ledger.settle(self.id, Kind::Tables, ByteCount(tables as u64))?;
            Ok::<bool, LedgerError>(ledger.used() > ledger.budget().high)
        })?;
        Ok(())
    }

    /// Brings the ledger to what the domain's store holds.
    pub(super) fn settle_store(&self) -> Result<(), PagerError> {
        Ok(self.domain.settle(&self.host)?)
    }
}

/// Charges what will be there twice, where there is room for it below the hard line.
pub(super) fn pass(host: &Host, machine: MachineId, bytes: ByteCount) -> bool {
    host.ledger(|ledger| ledger.charge(machine, Kind::Limbo, bytes, Purpose::Passing)).is_ok()
}
