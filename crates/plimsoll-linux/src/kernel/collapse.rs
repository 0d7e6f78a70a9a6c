//! Huge pages for blocks that have become hot one page at a time.
use super::KernelError;
use super::machine::KernelMachine;
use crate::reclaimer::Collapsed;
use plimsoll_sys::HvaRange;
use plimsoll_sys::process_memory::{Advice, Refusal, advise};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, BlockIndex, ByteCount};

/// A block is hot when so many of its pages have come back after they were taken.
const PROVEN_MIN: u32 = BLOCK_PAGES / 4;
/// Blocks considered in one call.
const LOOKS: u32 = 4096;

impl KernelMachine {
    /// Makes huge pages of at most `blocks_max` blocks that are hot, all in RAM, and not huge yet. One takes about 7 ms here,
    /// during which the guest cannot touch the block. Of a machine that gave nothing but samples none is made: what came back of
    /// it are samples, and the next one would split the huge page again.
    pub(super) fn collapse(&mut self, blocks_max: u32) -> Result<Collapsed, KernelError> {
        self.check_alive()?;
        let is_wanted = self.totals.taken.0 > 0;
        let blocks = if is_wanted { self.known.block_count() } else { 0 };
        let mut done = Collapsed::default();
        for _ in 0..blocks.min(LOOKS) {
            if done.made + done.refused >= blocks_max {
                break;
            }
            let block = BlockIndex(self.collapsing % blocks);
            self.collapsing = (block.0 + 1) % blocks;
            let Some(range) = self.candidate(block)? else { continue };
            match advise(&self.process, &[range], Advice::Collapse).stop {
                None => done.made += 1,
                Some(gone @ (Refusal::NoProcess | Refusal::NotPermitted)) => {
                    return Err(KernelError::refused(self.process.process(), gone));
                }
                Some(_) => done.refused += 1,
            }
        }
        Ok(done)
    }

    fn candidate(&mut self, block: BlockIndex) -> Result<Option<HvaRange>, KernelError> {
        if self.known.proven(block) < PROVEN_MIN {
            return Ok(None);
        }
        self.view.forget();
        let is_whole = self.view.look(block, 1)?.present.len() == BLOCK_PAGES;
        let range =
            self.view.layout().window(block, 1).filter(|range| range.len() == ByteCount(BLOCK_SIZE as u64));
        let Some(range) = range.filter(|_| is_whole) else { return Ok(None) };
        Ok((!self.view.is_huge(block)?).then_some(range))
    }
}
