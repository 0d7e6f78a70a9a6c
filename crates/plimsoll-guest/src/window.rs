//! The true working set: distinct pages touched in a window, counted by the one who touches them.
//!
//! What enters are local pages and window numbers; what leaves is a count. The bits lie in guest memory. A
//! second count beside them, in the program's own state, must agree when a window closes: bits that were lost
//! or came back from another time are found, not reported as a working set.
use crate::layout::Layout;
use crate::machine::Machine;

/// One vCPU's current window.
#[derive(Debug)]
pub(crate) struct Window {
    /// Its number, given by the VMM.
    pub(crate) number: u64,
    touched: u64,
}

/// A window that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClosedWindow {
    /// Its number.
    pub(crate) number: u64,
    /// Distinct pages touched, counted when each was touched first.
    pub(crate) touched: u64,
    /// The same by counting bits; differs only when memory was wrong.
    pub(crate) bits: u64,
}

impl Window {
    pub(crate) const fn new(number: u64) -> Self {
        Self { number, touched: 0 }
    }

    /// Notes that a page was touched.
    #[inline]
    pub(crate) fn touch<M: Machine>(&mut self, machine: &mut M, layout: &Layout, vcpu: u32, local: u64) {
        let gpa = layout.bitmap_gpa(vcpu, local);
        let bit = 1 << (local % 64);
        let word = machine.read_word(gpa);
        if word & bit == 0 {
            machine.write_word(gpa, word | bit);
            self.touched += 1;
        }
    }

    /// Ends the window and starts the one called `next`.
    pub(crate) fn close<M: Machine>(
        &mut self,
        machine: &mut M,
        layout: &Layout,
        vcpu: u32,
        next: u64,
    ) -> ClosedWindow {
        let mut bits = 0;
        for word_of_pages in 0..layout.owned_pages(vcpu).div_ceil(64) {
            let gpa = layout.bitmap_gpa(vcpu, word_of_pages * 64);
            let word = machine.read_word(gpa);
            if word != 0 {
                bits += u64::from(word.count_ones());
                machine.write_word(gpa, 0);
            }
        }
        let closed = ClosedWindow { number: self.number, touched: self.touched, bits };
        *self = Self::new(next);
        closed
    }
}
