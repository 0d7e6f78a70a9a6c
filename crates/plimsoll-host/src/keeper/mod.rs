//! The keeper: the process that holds what a manager must not lose, and starts the next one.
//!
//! Enters: descriptors from the manager, over a socket, each for a numbered slot; signals. Leaves: the same descriptors, to the
//! next manager; children, one at a time. What must never happen: a descriptor of a machine closed that no manager said
//! to close. So the keeper does next to nothing: it understands none of the descriptors, reads no memory of any machine, parses
//! nothing but eight bytes from its own child (and, before it starts, the names of what its supervisor hands on), and allocates no
//! memory once it has started.
//!
//! * [`protocol`]: what the two say to each other. [`client`]: the manager's side.
//! * [`serve`]: the keeper's side, and what it does when the manager ends. [`store`]: what a supervisor keeps for the next keeper.
//!
//! ```text
//! keeper                                   manager
//!   | starts it, its socket as descriptor 3  |
//!   |<---------------------------------------|  list          everything that is kept, slot by slot
//!   |--------------------------------------->|
//!   |<---------------------------------------|  serving       back-off begins anew; then every second, or it hangs
//!   |<---------------------------------------|  keep 9 + fd   answered when it is there, and stored
//!   |<---------------------------------------|  let go 9
//!   |                  ... SIGKILL ...       x
//!   | reaps it, starts the next
//! ```
//!
//! Keeper and manager are always of one build: the keeper starts its managers from its own executable
//! (`/proc/self/exe`), also when that has been replaced on disk. An upgrade ends the manager and has the keeper execute what is at
//! the path now; descriptors stay open across that, and the new keeper's first manager takes over as after a crash.
//!
//! # Known holes
//! * A manager counts as hanging when its main thread does. A pager's thread that hangs shows in its machine.
//! * When a keeper dies that no supervisor has started, the manager goes on and says so; when that one dies too, the VMMs' own copies of
//!   their userfaultfds keep their guests waiting, and nobody can bring the pages.
pub mod client;
pub mod protocol;
pub mod serve;
pub mod store;
