//! Our own pager: memory of machines that hand it over, managed page by page through userfaultfd.
//!
//! Enters: a machine as its VMM hands it over ([`wire`]). Leaves: the same machine in less memory than it owns. What
//! must never happen: a guest that reads a byte it, or a predecessor of it, did not write there.
//!
//! # The protocol
//!
//! Three parties act on a guest page. The **guest** touches it, writes it, discards it, at any moment, on any vCPU. The
//! **agent**, a thread of the VMM, moves it between guest RAM and the airlock and gives airlock memory back, when asked
//! and in the order asked. The **pager**, one thread of the manager for each machine, does everything else and is the
//! only writer of the machine's page words. The kernel serialises what they do to one page.
//!
//! *Taking a page*
//!
//! ```text
//!  1  word: resident -> capturing(slot)      the intent; from here on the slot counts
//!  2  agent: UFFDIO_MOVE RAM -> slot         atomic: the page is in one place or the other
//!  3  word: capturing -> limbo(slot)
//!     ... rests; a touch brings it back ...
//!  4  read the slot, store the bytes         an object that no word names yet
//!  5  word: limbo -> stored(object)          or zero, if the bytes were
//!  6  agent: MADV_DONTNEED slot              only now is the memory free
//!  7  slot free for the next page            only now is the slot
//! ```
//!
//! *Bringing a page back*
//!
//! ```text
//!  1  read the bytes: zeros, the slot, the object
//!  2  UFFDIO_COPY into RAM                   wakes the waiter; the guest may write at once
//!  3  word: -> resident
//!  4  release the object, or leave the slot page to be zapped
//! ```
//!
//! A limbo page is brought back by reading and copying rather than by a MOVE: MOVE has to run in the VMM, and waking the
//! agent there costs about what waking the pager did. A page that is copied back takes its slot page's memory once more
//! until the next batch is given back. That is charged up to the hard line; refused there, what is to be given back goes at once,
//! however little it is, and the page comes back all the same: it must not wait for memory that it has. A
//! **huge page** comes back whole, and that is worth waking the agent for: it moves slot to RAM, and 512 words follow.
//!
//! *Before they are touched* pages come back in the same way, in pieces of some pages between the faults: what a reader in
//! steps will touch next, what lies around, a working set the guest has returned to ([`plimsoll_core::prefetch`]).
//!
//! *Leaving a block to the kernel.* Registered memory gets no huge pages. So a block of which nothing is anywhere is
//! unregistered when it is first touched, as long as memory is plentiful, and charged whole:
//!
//! ```text
//!  1  agent: UFFDIO_UNREGISTER block         waiters go on; the kernel serves touches there, with zeros
//!  2  words: zero -> unwatched
//!     ... the kernel's: no event tells of touches or discards ...
//!  3  agent: UFFDIO_REGISTER block           waits for discards under way; later ones are events
//!  4  look at what is there
//!  5  words: unwatched -> resident or absent
//! ```
//!
//! Nothing is taken from a block between 1 and 5.
//!
//! *Giving a machine back* for good: `giveback.rs`.
//!
//! *A discard* (`MADV_DONTNEED` in the VMM: a balloon, free page reporting). The kernel queues an event and holds the
//! discarder until the pager has read it. Then the discarder goes on, and the pages go away at some later moment. The
//! pager applies the event to the words before it does anything else, and only then looks at faults.
//!
//! # The interleavings that worry us
//!
//! * **A discard between 1 and 3 of taking.** The pager applies no event between the request to the agent and its reply,
//!   so a discard finds the word either before step 1 or after step 3. If the pages go away meanwhile, the MOVE finds
//!   nothing and the page is marked absent.
//! * **A discard while bytes are being brought back.** As long as the event is unread (and until the discarder has run on),
//!   COPY answers EAGAIN, and the pager reads it. Once it is read the word says absent, so whatever is installed afterwards
//!   is zeros. What was installed before goes away with the rest.
//! * **A fault that was read before a discard and is served after it.** Its page may have been installed by another's fault
//!   and be there still, because the discarder has yet to take it away: taken for resident, its old bytes could be captured
//!   before they go, and come back. So a discard drops the faults on its pages that are waiting to be served, and wakes
//!   their waiters, who ask again.
//! * **The pages go away after zeros have been installed for a new touch.** Then a touch finds a page missing whose word
//!   says resident. It is zeros: the guest discarded the page while it was using it. Counted as an anomaly.
//! * **Two vCPUs touch one page.** One install wakes both. A fault that is read later finds the word resident; installing
//!   answers EEXIST; the waiter is woken. If the page has been taken again meanwhile, the stale fault brings it back
//!   needlessly.
//! * **A device holds the page.** A pin by `FOLL_PIN` makes the MOVE answer EBUSY. Other references are invisible to it, so
//!   the VMM's own I/O goes through its pin table, which the agent holds still while it moves.
//! * **The page was shared with a forked child, or merged by KSM.** The MOVE answers EBUSY; the agent makes the page the
//!   VMM's own (`MADV_POPULATE_WRITE`) and the MOVE is tried once more; then the page is marked pinned, with the cause,
//!   and left alone for a while.
//! * **A fault or a discard that was queued before its block was left to the kernel.** The waiter was woken by
//!   UNREGISTER. The discarder goes on when the event is read; the word stays *unwatched*, because the kernel serves what
//!   comes after.
//! * **A discard in a block that is being watched again.** REGISTER takes the memory map's lock for writing, so it waits for a
//!   discard that saw the block unregistered. One that comes later is an event, and newer than what was seen. A block of
//!   which anything was ever given back *while it was watched* is not left to the kernel again: such a page may still
//!   be there when it is looked at, and must not be found.
//! * **A discard while a huge page moves back.** MOVE answers EAGAIN as long as the event is unread; what came until then
//!   is marked, the rest of the block goes back page by page.
//! * **A page is packed densely, or moved inside the store, while it is brought back.** Reading copies its bytes out
//!   under the store's lock; where they lie is the store's business, and the page's hash is checked. Objects keep their
//!   names.
//! * **The store is full.** Limbo keeps what it has, faults that need memory wait, the operator is told.
//! * **Stored bytes are damaged.** The page is poisoned: a touch fails, nothing wrong is ever read.
//! * **The VMM dies at any point.** Calls fail and its pidfd becomes readable; the pager releases every object the words
//!   name and ends. A closed socket alone is no death: such a machine is lost to management, stalls, and keeps its bytes.
//!   Other machines have their own threads and notice nothing.
//! * **A machine gives nothing when asked** (pinned pages, a silent agent, a full store). After a while others are asked in its
//!   place, so that it cannot keep the host at its hard line.
//! * **The manager dies at any point.** Words, slots, objects and descriptors outlive it, in a
//!   [`Vault`](manager::Vault), or with its process in an [`estate`]. [`recovery`] tells how the next
//!   one puts them together. Between the two the guest waits; it never reads zeros, because the last copy of its
//!   userfaultfd is not closed.
//!
//! *Shards.* One thread reads a descriptor in order, and one thread writes a page's word. So a large machine is cut by
//! region into shards, each with its own descriptors, airlock, agent, socket, words and pager. To all of the above, and to
//! the ledger, a shard is a machine; only the VMM and the operator know that several are one. A discard that crosses from
//! one shard to the next is an event of each. On a host of several NUMA nodes the pager of a shard whose memory is of one of them runs
//! there and stores there (`seats`).
//!
//! The same [`pager`] runs over a simulated kernel in `tests/pager_model`, where guests, discards, refusals and crashes
//! are interleaved at every step.
//!
//! # Known holes
//!
//! * One thread serves a shard, so its faults are served one after the other. A machine's shards are cut once, by its VMM.
//! * On a host of several NUMA nodes a machine whose memory is bound to none has shards over all of them, and where those and their
//!   pagers are is left to the kernel ([`crate::nodes`]).
//! * Pages are compressed by the thread that serves their machine, between faults: a fault waits for one page at most.
//! * A discard that was read and not applied when its manager died, of a block that was left to the kernel in that very turn,
//!   can make a page that the guest has written since count as absent: it stays in RAM uncharged until it is given back
//!   or the next take-over.
//! * A block of which something was ever given back is not left to the kernel again, and gets huge pages only by
//!   collapsing. Pages discarded in a block that is left to the kernel stay charged until it is looked at.
//! * Pages that come back from limbo are not charged beforehand: up to about half a MiB a machine can be out before the
//!   next batch is given back.
//! * A machine that could not be taken over, or whose pager panicked, keeps everything it holds until the next take-over.
//! * While words of a machine cannot be opened, nothing of its domain's store is freed, until a manager that can takes over: machines
//!   that share that domain may fill the store meanwhile, also after that machine's VMM has ended.
//! * A store that a new manager has not touched is not in the sum over /proc of its processes, and is charged: until its pages
//!   have been looked at, what is in use beside machines looks smaller by as much. A memory cgroup counts it.
//! * Machines are admitted one after the other: a VMM that hands nothing over keeps later ones waiting.
//! * Memory that a VMM withholds (it reports an airlock page as given back and keeps it) is not seen as its own: it counts as
//!   overhead of the host.
//! * After an event of a discard is read the pager asks again without sleeping until the discarder has run on.
//! * An operator who freezes a VMM's cgroup for longer than the agent's patience loses the machine's management: it
//!   stays stalled until its VMM is ended.
mod ahead;
pub mod allowance;
mod blocks;
pub mod bustle;
mod charges;
mod drive;
pub mod estate;
pub mod far;
mod gifts;
mod giveback;
pub mod governor;
pub mod handover;
pub mod host;
pub mod housekeeper;
mod kit;
pub mod linux_space;
pub mod manager;
pub mod pager;
mod parking;
pub mod probe;
mod reclaim;
pub mod recovery;
mod seats;
mod shards;
pub mod space;
pub mod stats;
pub mod times;
pub mod waiting;
pub mod wire;
