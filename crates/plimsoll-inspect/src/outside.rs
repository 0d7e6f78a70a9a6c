//! A guest's tables as they lie in the VMM's process. Guest physical addresses enter, words leave; nothing is ever written.
use crate::ram::GuestRam;
use plimsoll_mmu::{Output, TableMemory};
use plimsoll_sys::ProcessId;
use plimsoll_sys::process_memory::{self, Refusal};
use plimsoll_types::Gpa;

/// Why an entry cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unreadable {
    /// The guest's tables lead out of its RAM.
    #[error("{0} is not in the guest's RAM")]
    OutsideRam(Gpa),
    /// The process does not let it be read.
    #[error("{gpa} cannot be read: {refusal}")]
    Refused {
        /// The guest's address.
        gpa: Gpa,
        /// What the kernel said.
        refusal: Refusal,
    },
    /// Nothing is written here.
    #[error("{0} is not written: an observer leaves no marks")]
    ReadOnly(Gpa),
}

/// The memory of a guest that is looked at from outside.
#[derive(Clone, Copy, Debug)]
pub struct Outside<'a> {
    process: ProcessId,
    ram: &'a GuestRam,
}

impl<'a> Outside<'a> {
    /// The guest whose RAM lies there in that process.
    pub const fn new(process: ProcessId, ram: &'a GuestRam) -> Self {
        Self { process, ram }
    }

    /// Where its RAM lies.
    pub const fn ram(&self) -> &'a GuestRam {
        self.ram
    }

    /// Reads guest memory from `gpa` on until `bytes` is full. A page that is in swap comes back for it.
    ///
    /// # Errors
    /// Not all of it is in one piece of the guest's RAM, or the process does not let it be read.
    pub fn bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreadable> {
        let hva = self.ram.hva(gpa, bytes.len() as u64).ok_or(Unreadable::OutsideRam(gpa))?;
        match process_memory::read(self.process, hva, bytes).stop {
            None => Ok(()),
            Some(refusal) => Err(Unreadable::Refused { gpa, refusal }),
        }
    }
}

impl TableMemory for Outside<'_> {
    type Error = Unreadable;

    /// The kernel copies an aligned word whole.
    fn read(&self, at: Output) -> Result<u64, Unreadable> {
        let mut bytes = [0; 8];
        self.bytes(Gpa(at.0), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn compare_exchange(&self, at: Output, _: u64, _: u64) -> Result<u64, Unreadable> {
        Err(Unreadable::ReadOnly(Gpa(at.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Piece;
    use plimsoll_sys::HvaRange;
    use plimsoll_types::{ByteCount, Hva};

    #[test]
    fn words_of_a_process_are_read_by_guest_address_and_none_outside_of_ram() {
        let words: Vec<u64> = (0..1024).map(|word| word * 3).collect();
        let hva = HvaRange::new(Hva(words.as_ptr().addr() as u64), ByteCount(8192)).unwrap();
        let ram = GuestRam::new(vec![Piece { gpa: Gpa(0x10_0000), hva }]).unwrap();
        let outside = Outside::new(ProcessId::own(), &ram);
        assert_eq!(outside.read(Output(0x10_0000)), Ok(0));
        assert_eq!(outside.read(Output(0x10_1ff8)), Ok(1023 * 3));
        for at in [0, 0xf_fff8, 0x10_2000, u64::MAX - 7] {
            assert_eq!(outside.read(Output(at)), Err(Unreadable::OutsideRam(Gpa(at))));
        }
        assert_eq!(
            outside.compare_exchange(Output(0x10_0000), 0, 1),
            Err(Unreadable::ReadOnly(Gpa(0x10_0000)))
        );
    }

    #[test]
    fn ram_that_is_not_mapped_is_an_error() {
        let hva = HvaRange::new(Hva(0x1000), ByteCount(4096)).unwrap();
        let ram = GuestRam::new(vec![Piece { gpa: Gpa(0), hva }]).unwrap();
        let refused = Unreadable::Refused { gpa: Gpa(8), refusal: Refusal::NotMapped };
        assert_eq!(Outside::new(ProcessId::own(), &ram).read(Output(8)), Err(refused));
    }
}
