//! Who is entitled to how much memory, what to do about it, and why.
//!
//! A host that runs more virtual machines than it has memory for has to decide, about once a second, who has too much,
//! who has too little, and how to move memory from the one to the other so that nobody waits for it longer than was
//! promised. This crate is that decision and nothing else: no I/O, no clock, no chance, no float. A host (Linux, bare
//! metal, a simulator) shows what it sees and does what it is told:
//!
//! ```text
//! settings --> Tree ----.
//!                        v
//! HostView --> decide(view, state) --> Plan { actions, reasons, where each machine stands }
//!                        ^   |
//!                        '---'  PolicyState: what was remembered
//! ```
//!
//! * [`settings`]: what an operator says, in ESX's words (reservation, limit, shares) or Hyper-V's (startup, minimum,
//!   maximum, buffer, weight). [`tree`]: host, groups and machines, checked whole. [`admission`]: whether one more
//!   fits.
//! * [`demand`]: what a machine needs, by what the host sampled; what guests claim only lowers it.
//! * [`auction`]: who gets what of it, by shares, with idle memory taxed.
//! * [`host_state`]: how short the host is. [`ladder`]: the ways to take memory, by what they cost. [`costs`]: what that is.
//!   [`balloon`]: when not to wait for one.
//! * [`damper`]: why targets do not flutter. [`reason`]: each decision as a value that prints as a sentence.
//!
//! # What holds
//!
//! Each is a test over random hosts; entitlements also against auctions that are held page by page, which is slow and
//! plainly right:
//!
//! 1. **A guarantee is kept.** Nobody's entitlement is below its reservation or minimum, nor its target below what it uses
//!    of it; nothing is taken from a machine, or asked of its balloon, that would leave it less, what its guest has free apart.
//! 2. **Memory is neither invented nor left lying.** Entitlements sum to the budget to the page, or everyone has all
//!    it may have. Targets never exceed the budget, unless more is guaranteed than there is: then that is said, and
//!    guarantees are kept. Where machines have more than there is, as on a part of a host, the budget is what there is.
//!    What is above a limit is taken however short the host is or is not, and whatever targets are held at, or it is said
//!    that it cannot be; the machines of a group give together what is above its limit, and for it no more than that.
//! 3. **The auction is what it says:** page by page to the highest price. More shares, or more memory, never bring
//!    less.
//! 4. **Idle memory is taxed:** at equal shares it moves from who does not use it to who does.
//! 5. **A group is an island.** What is inside a group (shares, stalls, number of machines) changes nothing of what others
//!    have a right to, as long as the sum of what it uses and may have is the same; what its machines are entitled to, and
//!    what they are to come to, is never above its limit, and the former not below its reservation. Only how fast targets get
//!    there depends on the room that all of them leave.
//! 6. **What does not change is left alone.** On constant input a fixed point is reached and kept; on steady input with
//!    5 % of noise no target moves more than 5 % back and forth within a minute. On any input one moves only
//!    towards what is due, so it swings by no more than that does, and only where there is no other way: up to what it is
//!    guaranteed, or down while the host is at its end (*low*), while targets on the host, or in a group around it, are all
//!    that may be there, or while such a group takes up more than its limit. But for what is guaranteed, no target is raised
//!    on more, by a 64th, than all machines have shared for a minute.
//! 7. **Bad numbers harm nobody else.** Missing, stale, negative or absurd samples are named, and the others' targets
//!    stay the same.
//! 8. **A recorded decision replays** to the bit, from JSON.
//! 9. **It is O(n log n):** comparisons are counted for 10, 1,000 and 100,000 bidders, and whole decisions about 1,000 and
//!    100,000 machines, half of which give and half of which are given to, are held against each other.
//!
//! # Where memory goes: an example
//!
//! A tenant's three machines have 3 GiB between them. `web` serves, `batch` is idle, `db` has a reservation:
//!
//! ```
//! use plimsoll_policy::auction::{Bidder, IdleTax, auction};
//! use plimsoll_types::{ByteCount, PageCount};
//!
//! let mib = |count| ByteCount::mib(count).pages_floor();
//! let machine = |floor, active, shares| Bidder { floor: mib(floor), cap: mib(2048), active: mib(active), shares };
//! let (web, batch, db) = (machine(0, 1500, 1000), machine(0, 100, 1000), machine(1024, 200, 1000));
//! let grants = auction(mib(3072), &[web, batch, db], IdleTax::USUAL).grants;
//! // db keeps its 1024 although it uses 200 of them. Of the 2048 that are left, an idle page of batch's costs
//! // four times what a page costs that web uses. Both come to a cost of 1696 and a bit: web has its 1500 and 49 idle
//! // ones, batch has its 100 and 399 idle ones.
//! let mib_of = |grant: &PageCount| grant.bytes().0 >> 20;
//! assert_eq!(grants.iter().map(mib_of).collect::<Vec<_>>(), [1549, 499, 1024]);
//! ```
//!
//! # Known holes
//!
//! * Memory is one pool: no NUMA nodes. A host with several decides for each.
//! * A guest that touches memory for no purpose is active. Shares and limits are what bounds it, as in ESX.
//! * What is guaranteed and not wanted is lent to the others. A machine that grows into its guarantee faster than
//!   memory can be taken back from them lives on minFree meanwhile, and stalls if that is not enough.
//! * A stalling machine takes from siblings above their guarantees until they stall too: stalls are evened out inside
//!   a group, whatever the shares, until all stall.
//! * The cost of a disk was not measured, nor which part of the pages comes back before it is known (10 % are
//!   supposed).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod admission;
pub mod auction;
pub mod balloon;
pub mod costs;
pub mod damper;
mod decide;
pub mod demand;
mod entitlement;
pub mod host_state;
pub mod ladder;
mod part;
pub mod plan;
pub mod reason;
pub mod settings;
mod stall;
pub mod tree;
pub mod view;

pub use costs::Costs;
pub use decide::{PolicyState, decide, limits::SLIVER};
pub use ladder::{Rung, Rungs};
pub use part::Ppm;
pub use plan::{Action, Note, Plan, Position, Step};
pub use reason::Reason;
