//! Memory of machines that hand nothing over, managed from outside with the kernel's own mechanisms.
//!
//! Enters: a process, and where in it the guest's RAM lies. Leaves: pages in the host's swap (zram, zswap behind a disk, a
//! disk), what the machine uses, and why less was taken than wanted. Nothing of the process is stopped, changed or
//! entered: [`process_madvise(2)`](plimsoll_sys::process_memory::advise) asks the kernel to page out, and the page map
//! shows what came of it. When this program dies nothing changes for the machine. What must never happen: a page counted
//! as taken that is still in RAM; a page taken from a machine whose cgroup forbids swap; advice to a process that has
//! taken the machine's place.
//!
//! * [`KernelMachine`] is one machine: `tick` once a period, `reclaim` when memory is wanted. Start there.
//! * [`Counter`] looks at memory that may not be managed.
//! * What is chosen, and what a machine uses, is decided in [`plimsoll_core::outside`]; here is only looked and asked.
//! * [`source`]: ways to see which pages are used, to compare them.
//!
//! **How a step goes.** Whereabouts of blocks are read with PAGEMAP_SCAN, as late as can be; runs of pages are chosen; the
//! kernel is asked in pieces of 4 MiB; after each piece the page map is read again, because advice "succeeds" for locked,
//! pinned and shared pages, with swap full, and for pages that the guest touches meanwhile. Only what is gone counts.
//!
//! **Exec.** A pidfd goes on when its process executes another program, and advice would then go to that. The page map
//! does not: opened before, it reads as empty. So that is looked at before each step, and a machine is gone either way.
//!
//! Known holes:
//!
//! * The page map of *shared* memory (memfd) tells of a swapped page nothing at all. It counts as elsewhere if it was taken
//!   here and has not been seen since; what the host's own reclaim swapped out does not. A page that another process
//!   (vhost-user) has mapped too is not paged out by the kernel, and one that only the other process touched again looks
//!   away here.
//! * Taking one page of a huge one splits it. Samples do so in at most 128 blocks at a time, see [`plimsoll_core::outside`].
//! * Faults that a kernel thread takes for the machine (vhost-net) are in no fault counter of the process: the page map
//!   shows the page, but the pace does not see it come back.
//! * When somebody withdraws swap, what is read back is told from what is used by there being fewer faults than samples came
//!   back. A machine that faults much meanwhile looks as if it used all its samples, until the period is over.
//! * Between looking whether the process is still the same and advising it there is a moment in which it can execute
//!   another program; pages of that could then be paged out, and come back unharmed.

mod collapse;
mod counter;
mod error;
mod gate;
mod idle;
mod layout;
mod machine;
mod signs;
pub mod source;
mod take;
mod view;

pub use counter::Counter;
pub use error::KernelError;
pub use layout::Layout;
pub use machine::{BlockUse, KernelMachine, PERIOD, PERIOD_MAX, Tick, Totals};
pub use signs::PressureScope;
