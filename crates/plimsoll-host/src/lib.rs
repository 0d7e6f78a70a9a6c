//! The host's memory manager as a service: what joins the policy to the back ends, and keeps both alive.
//!
//! What enters: machines, whoever keeps their memory, and what an operator says about them. What leaves: decisions that are
//! carried out, recorded and explained. What must never happen: one machine's bad data or dead process stopping the others'
//! decisions, or the end of a manager being the end of a machine.
//!
//! * [`backend`]: one machine as the control loop sees it. [`control`]: the loop. [`config`]: what an operator says, as a file.
//! * [`trace`]: decisions on record, and the same decisions made again. [`line`](mod@line) and [`advise`]: what follows from them.
//! * [`keeper`]: the process that outlives every manager. [`daemon`]: the manager as a process of its own.
//! * [`stores`]: how full and how fragmented the page stores are.
//! * [`api`]: what clients ask of it. [`dashboard`]: a page for a browser, which is such a client.
pub mod advise;
pub mod api;
pub mod backend;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dashboard;
pub mod helm;
pub mod homecoming;
pub mod keeper;
pub mod line;
pub mod metrics;
pub mod roster;
pub mod stores;
pub mod trace;
mod traits;
mod voice;
pub mod why;
