//! What would happen: hosts with machines on them, simulated, decided about by the very policy that runs on Linux.
//!
//! Enters: a scenario in TOML (hosts, classes of machines, what they demand over time, restarts). Leaves: a [`Report`] of
//! what was placed, who waited for memory, whether a guarantee was broken, and what broke first; as a value, as text, and
//! as one HTML page. Admission is [`plimsoll_policy::admission`], decisions are [`plimsoll_policy::decide()`], working
//! sets are estimated by [`plimsoll_core::sampler`]: nothing here decides anything. What is modelled is what is below
//! them: guests that touch memory ([`mod@demand`]) and a host in which memory moves as fast as was measured
//! ([`mod@machine`]).
//!
//! ```text
//! scenario.toml --> Scenario --> placement (admit) --> for each host, on any thread:
//!                                                        view --> decide --> plan
//!                                                         ^                    |
//!                                                         '- memory moves for  '
//!                                                            as long as nothing can change, at most 5 minutes
//!                                                      --> Report --> text, JSON, HTML
//! ```
//!
//! # What holds
//!
//! 1. **The same seed gives the same report**, to the byte, with any number of threads: a host shares nothing with another
//!    after placement, chance is a function of seed, machine and time, and all sums are of whole numbers.
//! 2. **No float decides anything.** They appear where a picture is drawn.
//! 3. **No page is invented:** what machines consume, what is free, and what the host uses itself sum to its memory at
//!    every step.
//! 4. **A step is long only where nothing happens in it** (see [`mod@host`]).
//!
//! # Known holes
//!
//! * What coldest-first reclaim misses is one number, not a model of heat per block.
//! * A merged page stays merged. Huge pages and NUMA nodes do not exist.
//! * A machine that was placed stays on its host; there is no migration.
//! * Processors are not short: what waits, waits for memory.
#![forbid(unsafe_code)]

mod chance;
pub mod comparison;
pub mod demand;
pub mod fleet;
pub mod host;
mod html;
pub mod machine;
mod placement;
mod record;
pub mod report;
pub mod scenario;
mod svg;
mod text;
pub mod time;
pub mod trace;

pub use fleet::{Options, Stage, run};
pub use html::html;
pub use report::Report;
pub use scenario::{Scenario, ScenarioError};
pub use text::text;
